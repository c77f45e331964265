import os
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.evaluate import disk_bytes, nonzeros, parameters, state_bytes


class Tied(nn.Module):
    """An embedding whose matrix is the output's too, a view of it as a second object, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = nn.Parameter(self.embed.weight.data)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int16))
        self.register_buffer("scratch", torch.zeros(100), persistent=False)


def test_tied_parameters_count_once():
    model = Tied()
    assert parameters(model).value == 20
    assert parameters(model).conditions["tensors"] == 1
    assert nonzeros(model).value == 20
    assert state_bytes(model).value == 20 * 4 + 3 * 2
    assert state_bytes(model).unit == "bytes"


def test_views_of_one_memory_that_differ_count_each():
    base = torch.ones(4, 4)
    model = nn.ParameterList([base[:2], base[2:], base.t()])
    assert parameters(model).value == 4 * 2 + 4 * 2 + 16


def test_trainable_parameters():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert (parameters(model, trainable=True).value, parameters(model, trainable=True).name) == (
        6,
        "trainable_parameters",
    )


def test_nonzeros_counts_negative_zero_as_zero_and_nan_as_not(monkeypatch):
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -0.0, 1.0], [float("nan"), 1e-45, 0.0], [2.0, 0.0, 3.0]]))
    assert nonzeros(model).value == 5
    assert nonzeros(model).conditions["of"] == 9
    # In pieces, and not contiguous, the same.
    monkeypatch.setattr("secateur.evaluate.size._AT_ONCE", 2)
    assert nonzeros(model).value == 5
    model.weight.data = model.weight.data.t()
    assert nonzeros(model).value == 5


def test_a_model_without_values_can_be_counted_but_not_read():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert parameters(model).value == 14
    assert state_bytes(model).value == 56
    with pytest.raises(UsageError, match="a model on the meta device has no values to count; load its weights"):
        nonzeros(model)


def test_an_empty_model_is_of_size_zero():
    assert (
        parameters(nn.Identity()).value,
        nonzeros(nn.Identity()).value,
        state_bytes(nn.Identity()).value,
    ) == (0, 0, 0)


def test_disk_bytes_adds_files_and_counts_a_second_name_once(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "deep" / "b.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"{}")
    os.link(tmp_path / "a.safetensors", tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(tmp_path / "a.safetensors")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    measured = disk_bytes(tmp_path)
    assert (measured.value, measured.unit, measured.conditions["files"]) == (1102, "bytes", 3)
    assert disk_bytes(tmp_path, "*.safetensors").value == 1100
    assert disk_bytes(str(tmp_path / "config.json")).value == 2
    assert str(tmp_path) not in str(measured.to_dict())


def test_disk_bytes_of_nothing_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="missing: no such file or folder"):
        disk_bytes(Path(tmp_path, "missing"))
    with pytest.raises(UsageError, match=r"no file matches '\*\.bin'"):
        disk_bytes(tmp_path, "*.bin")
