"""Quantization as a stage: measured as integers, trained on rounded weights, written small, zeros zero."""

from __future__ import annotations

import importlib.util
import json
import runpy

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur import load_quantized_
from secateur import measure as measuring
from secateur.core.masks import Masks
from secateur.deploy.packed import quantized_header
from secateur.errors import UsageError
from secateur.folder import interrupted, write_manifest
from secateur.model import load
from secateur.pipeline import experiment, experiment_to
from secateur.verification import problems

from .support import OWN, STAGES, spec
from .test_runner import Stop, results, run, stopping, value

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
SMALL = {
    "prune": {"sparsity": 0.85},
    "quantize": {"scheme": "int4", "outer": "int4"},
    "fine-tune": {"epochs": 4, "lr": 2e-2},
}


def assert_same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def order(*names):
    return [STAGES[0], *({name: SMALL[name]} for name in names)]


@needs_torchao
def test_the_recommended_order_learns_the_rounding(tmp_path):
    stages = {"train": STAGES[0]["train"], **dict(reversed(SMALL.items()))}
    outcome = run(spec(stages), tmp_path / "out")
    assert list(outcome.measurements) == ["0 load", "1 train", "2 prune", "3 quantize", "4 fine-tune"]
    assert value(outcome, "4 fine-tune", "accuracy") >= value(outcome, "3 quantize", "accuracy")
    assert value(outcome, "3 quantize", "disk_bytes") < value(outcome, "2 prune", "state_bytes")
    assert outcome.records[3]["details"]["schemes"] == ["int4"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["quantized.safetensors"]
    assert problems(tmp_path / "out") == []
    file = tmp_path / "out" / "quantized.safetensors"
    masks = Masks.load(tmp_path / "out" / "run" / "masks.safetensors")
    again = load_quantized_(load(f"{OWN}:build").model, file, dense=True)
    for name, mask in masks.items():
        assert not again.get_parameter(name)[~mask].any()
    assert file.stat().st_size == value(outcome, "4 fine-tune", "disk_bytes")
    assert "quantized.safetensors" in (tmp_path / "out" / "README.md").read_text()
    for loaded in (
        load(f"{OWN}:build@{tmp_path / 'out'}").model,
        secateur.load(tmp_path / "out", lambda: load(f"{OWN}:build").model),
    ):
        assert_same(loaded, again)


@needs_torchao
def test_what_is_measured_is_what_is_written(tmp_path):
    outcome = run(spec(order("prune", "quantize")), tmp_path / "out")
    loaded = load_quantized_(load(f"{OWN}:build").model, tmp_path / "out" / "quantized.safetensors")
    by = measuring.Yardstick(labelled=runpy.run_path(str(OWN))["test"](), labelled_name="own.py:test")
    found = measuring.measure(loaded, by, measuring.answers(loaded, by))
    assert found[0].value == value(outcome, "3 quantize", "accuracy")


@needs_torchao
@pytest.mark.parametrize("after", [120, 145])
def test_training_on_rounded_weights_resumes(tmp_path, after):
    stages = order("prune", "quantize", "fine-tune")
    run(spec(stages), tmp_path / "whole")
    with pytest.raises(Stop):
        run(spec(stages), tmp_path / "parts", tell=stopping(after))
    assert interrupted(tmp_path / "parts") is not None
    run(spec(stages), tmp_path / "parts")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    one, other = (tmp_path / name / "quantized.safetensors" for name in ("parts", "whole"))
    assert one.read_bytes() == other.read_bytes()


@needs_torchao
def test_a_checkpoint_of_rounded_weights_loads_anywhere(tmp_path):
    run(spec([*order("prune", "quantize"), {"export": {"to": "checkpoint"}}]), tmp_path / "out")
    weights = load(f"{OWN}:build@{tmp_path / 'out' / 'model.safetensors'}").model
    assert all(len(row.unique()) <= 15 for row in weights[0].weight)
    assert not (tmp_path / "out" / "quantized.safetensors").exists()
    assert problems(tmp_path / "out") == []


@needs_torchao
def test_a_weight_that_came_back_is_found(tmp_path):
    run(spec(order("prune", "quantize")), tmp_path / "out")
    file = tmp_path / "out" / "quantized.safetensors"
    tensors, header = load_file(file), quantized_header(file)
    name = next(name for name in tensors if name.endswith(":values"))
    tensors[name] = torch.full_like(tensors[name], 0x11)
    kept = name.replace(":values", ":kept")
    if kept in tensors:
        tensors.pop(kept)
        shape = header["weights"][name.removesuffix(":values")]["shape"]
        tensors[name] = torch.full(((torch.tensor(shape).prod().item() + 1) // 2,), 0x11, dtype=torch.uint8)
    save_file(tensors, file, metadata={"secateur": json.dumps(header)})
    write_manifest(tmp_path / "out")
    assert any("pruned weights that are not zero" in line for line in problems(tmp_path / "out"))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_torchao_is_missed_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match=r"torchao .*pip install 'secateur\[quantize\]'"):
        experiment_to(experiment(spec(order("prune", "quantize"))), tmp_path / "out", allow_code=True)
    assert not list(tmp_path.iterdir())
