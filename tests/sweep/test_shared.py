"""Stages that points begin with are carried out once, and the points are what they would be without."""

from __future__ import annotations

import json

import pytest

from secateur.folder import is_run_folder
from secateur.pipeline import stages
from secateur.sweep import carry_out, lines, sweep, work
from secateur.sweep.shared import shared_stages, start_of

from .test_work import CODE, OWN, Stop, table

TRAIN = {"train": {"epochs": 2, "lr": 3e-2}}


def asked(first=TRAIN, **axes):
    return sweep(
        {
            "model": f"{OWN}:build",
            "train": f"{OWN}:train",
            "labelled": f"{OWN}:test",
            "stages": [first, {"prune": {"method": "magnitude"}}, {"fine-tune": {"lr": 1e-2}}],
            "sweep": axes or {"sparsity": [0.5, 0.8], "epochs": [0, 1, 2], "seed": [0, 1]},
        }
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The table where every point does everything itself."""
    given, out = asked(), tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "shared_stages", lambda points: ())
        carry_out(given.points, out, allowed=CODE)
    return table(given, out)


@pytest.fixture
def trainings(monkeypatch):
    """Names of the stages that are carried out."""
    done, carry = [], stages.carry_out
    monkeypatch.setattr(
        "secateur.pipeline.runner.carry_out", lambda name, *more: (done.append(name), carry(name, *more))[1]
    )
    return done


def test_what_points_begin_with_is_found_where_their_ways_part():
    found = shared_stages(asked().points)
    assert [(each.length, each.plain["seed"], len(each.points)) for each in found] == [
        (1, 0, 6),
        (1, 1, 6),
        (2, 0, 3),
        (2, 1, 3),
        (2, 0, 3),
        (2, 1, 3),
    ]
    assert len({each.name for each in found}) == 6
    assert found[0].name.startswith("train-s0-")
    assert start_of(0, found).length == 2
    assert start_of(0, found, below=2) == found[0]
    assert shared_stages(asked(sparsity=[0.5], epochs=[1], seed=[0, 1]).points) == ()


@pytest.mark.thorough
def test_shared_stages_are_carried_out_once_and_the_table_is_the_same(alone, tmp_path, trainings):
    given = asked()
    carry_out(given.points, tmp_path, allowed=CODE)
    assert [trainings.count(name) for name in ("train", "prune", "fine-tune")] == [2, 4, 8]
    assert table(given, tmp_path) == alone
    assert len(list((tmp_path / "shared").glob("[!.]*"))) == 6
    carry_out(given.points, tmp_path, allowed=CODE)
    assert len(trainings) == 14
    point = tmp_path / "points" / lines(given, tmp_path)[0].folder
    told = json.loads((point / "run" / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in told] == ["load", "train", "prune"]
    assert (point / "model.safetensors").is_file()


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.thorough
def test_stopped_and_called_again_it_repeats_nothing(alone, tmp_path, monkeypatch, trainings, after):
    given, carry, left = asked(), work._attempt, [after]

    def stopping(*job):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return carry(*job)

    with monkeypatch.context() as patch:
        patch.setattr(work, "_attempt", stopping)
        with pytest.raises(Stop):
            carry_out(given.points, tmp_path, allowed=CODE)
    carry_out(given.points, tmp_path, allowed=CODE)
    assert [trainings.count(name) for name in ("train", "prune", "fine-tune")] == [2, 4, 8]
    assert table(given, tmp_path) == alone


@pytest.mark.parametrize(
    "change", [("_batches(0, 20)", "_batches(2, 20)"), ("nn.ReLU()", "nn.GELU()")], ids=["data", "code"]
)
@pytest.mark.thorough
def test_what_changed_meanwhile_is_not_taken_over(tmp_path, trainings, change):
    """Other data under the same name, or other code around the same weights."""
    copy = tmp_path / "own.py"
    copy.write_text(OWN.read_text())
    axes = {"sparsity": [0.5, 0.8]}
    given = sweep(
        {
            "model": f"{copy}:build",
            "train": f"{copy}:train",
            "labelled": f"{copy}:test",
            "stages": [TRAIN, {"prune": {"method": "magnitude"}}],
            "sweep": axes,
        }
    )
    carry_out(given.points[:1], tmp_path / "out", allowed=CODE)  # nothing to share
    carry_out(given.points[1:], tmp_path / "out", allowed=CODE)
    assert trainings.count("train") == 2
    (tmp_path / "other").mkdir()
    whole = shared_stages(given.points)
    work._share(whole, {0, 1}, tmp_path / "other", work._Way(1, None, None, CODE), lambda *_: None)
    assert is_run_folder(tmp_path / "other" / "shared" / whole[0].name)
    assert trainings.count("train") == 3
    copy.write_text(OWN.read_text().replace(*change))
    carry_out(given.points, tmp_path / "other", allowed=CODE)
    assert trainings.count("train") == 5
    assert [line.status for line in lines(given, tmp_path / "other")] == ["done"] * 2


def test_points_whose_first_stages_fail_say_why(tmp_path, trainings):
    given = sweep(
        {
            "model": f"{OWN}:build",
            "train": f"{OWN}:train",
            "labelled": f"{OWN}:test",
            "stages": [{"prune": {"sparsity": 0.5, "only": "nosuch"}}, {"fine-tune": {}}],
            "sweep": {"epochs": [0, 1, 2]},
        }
    )
    carry_out(given.points, tmp_path, allowed=CODE)
    assert ["matches none of" in line.error for line in lines(given, tmp_path)] == [True] * 3
    assert trainings == []


@pytest.mark.slow
@pytest.mark.parametrize("ray", [None, "local"])
def test_several_at_once_share_as_well(alone, tmp_path, ray):
    if ray is not None:
        pytest.importorskip("ray")
    given = asked()
    carry_out(given.points, tmp_path, workers=2, ray=ray, allowed=CODE)
    assert table(given, tmp_path) == alone
    assert len(list((tmp_path / "shared").glob("train-s?-*"))) == 2
