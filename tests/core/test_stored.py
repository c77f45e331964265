"""Files of tensors: whole or not at all, for whoever may read other files of that folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from secateur import Masks, quantize_, save_quantized
from secateur.core.stored import save_tensors
from secateur.deploy.sparse import save_sparse
from secateur.errors import ResourceError, UsageError
from secateur.recover.state import write_state
from secateur.state import save_state


def sparse(path: Path) -> None:
    save_sparse(nn.Linear(70, 3), path)


def integers(path: Path) -> None:
    pytest.importorskip("torchao")
    model = nn.Linear(32, 4)
    quantize_(model, "int8")
    save_quantized(model, path)


def masks(path: Path) -> None:
    Masks({"weight": torch.ones(3, 5, dtype=torch.bool)}).save(path)


def state(path: Path) -> None:
    save_state(nn.Linear(3, 4), path, None)


def training(path: Path) -> None:
    write_state(path, {"a": torch.ones(2)}, {})


@pytest.mark.parametrize("write", [sparse, integers, masks, state, training])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file(tmp_path, write, umask, mode):
    (tmp_path / ".a.safetensors.tmp").touch(0o600)  # a write that was killed
    before = os.umask(umask)
    try:
        write(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        ResourceError, match=r"a\.safetensors: no space left on the disk; the earlier file is intact"
    ):
        save_tensors(path, {"a": torch.zeros(2)})
    assert load_file(path)["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_place_that_is_no_folder_is_told(tmp_path):
    with pytest.raises(
        UsageError, match=r"no/a\.safetensors: cannot be written here \(No such file or directory\)"
    ):
        Masks({"weight": torch.ones(3, 5, dtype=torch.bool)}).save(tmp_path / "no" / "a.safetensors")
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match=r"/a: cannot be written here \(Is a directory\)"):
        save_sparse(nn.Linear(2, 2), tmp_path / "a")
