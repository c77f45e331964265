"""`secateur verify` on what is no whole folder of a run."""

from __future__ import annotations

import pytest
from torch import nn

from secateur import model as models
from secateur import prune_
from secateur.folder import new_folder
from secateur.verification import problems

from .tiny import Secateur


@pytest.fixture
def command(monkeypatch, capsys) -> Secateur:
    return Secateur(monkeypatch, capsys)


def run(place):
    model = nn.Linear(4, 4)
    masks = prune_(model, 0.5)
    with new_folder(place) as folder:
        (folder / "run").mkdir()
        models.save(model, None, folder)
        masks.save(folder / "run" / "masks.safetensors")
    return place


def test_a_folder_of_somebody_else_is_named_as_such(command, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = (
        f"{tmp_path} is no folder that secateur wrote: MANIFEST.sha256, the list of its files, is not in it. Give the "
        "folder that --out named"
    )
    assert command.refused(2, "verify", tmp_path) == said
    run(tmp_path / "out")
    assert command.refused(2, "verify", tmp_path, "--json") == f"{said}; in it are out"


def test_a_run_that_lost_its_manifest_is_still_read(command, tmp_path):
    place = run(tmp_path / "out")
    assert problems(place) == []
    whole = f"{place}: every file is as it was written, and every pruned weight is zero\n"
    assert command("verify", place).out == whole
    (place / "MANIFEST.sha256").unlink()
    (line,) = problems(place)
    assert line.startswith("MANIFEST.sha256 is missing, so nothing says which files belong here")
    models.save(nn.Linear(4, 4), None, place)
    said = command("verify", place)
    assert said.code == 3
    assert said.out.splitlines() == [line, "model.safetensors: weight holds 8 pruned weights that are not zero"]
