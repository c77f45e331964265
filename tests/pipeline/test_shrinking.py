"""Whole units go in a stage and the model becomes really smaller: by numbers, in files, after a kill, as integers."""

from __future__ import annotations

import importlib.util
import runpy

import pytest
import torch

from secateur import load as load_folder
from secateur import load_quantized_
from secateur.core.masks import Masks
from secateur.deploy import shrunk
from secateur.errors import UsageError
from secateur.evaluate import accuracy, predict
from secateur.folder import interrupted
from secateur.pipeline import experiment
from secateur.verification import problems

from .support import OWN, STAGES, spec
from .test_runner import Stop, results, run, stopping, value

UNITS = {"prune": {"method": "structured", "pattern": "neurons", "sparsity": 0.5}}
FINE = {"fine-tune": {"epochs": 2, "lr": 2e-2}}
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


def loaded(folder):
    return load_folder(folder, runpy.run_path(str(OWN))["build"])


def judged(model):
    return accuracy(predict(model, runpy.run_path(str(OWN))["test"](), dataset="test")).value


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Train, distil, prune units, shrink, prune weights, fine-tune."""
    out = tmp_path_factory.mktemp("chain") / "out"
    stages = [
        STAGES[0],
        {"distil": {"teacher": f"{OWN}:build", "hard": 1.0, "soft": 0.0, "epochs": 1}},
        UNITS,
        "shrink",
        {"prune": {"sparsity": 0.5}},
        FINE,
    ]
    return run(spec(stages), out), out


def test_the_model_becomes_smaller_and_every_stage_says_how_fast_it_is(chain):
    outcome, out = chain
    names = list(outcome.measurements)
    sizes = [value(outcome, name, "parameters") for name in names]
    assert sizes == [24 * 12 + 3] * 4 + [12 * 12 + 3] * 3
    assert value(outcome, names[-1], "state_bytes") < value(outcome, names[0], "state_bytes")
    assert value(outcome, names[-1], "macs") < value(outcome, names[0], "macs")
    for name in names:
        (time,) = [m for m in outcome.measurements[name] if m.name == "latency"]
        assert (time.unit, time.spread.repeats) == ("ms", 7)
        assert time.spread.low <= time.value <= time.spread.high
        assert len([m for m in outcome.measurements[name] if m.name == "speedup"]) == (name != "0 load")
    table = (out / "run" / "results.csv").read_text()
    assert table.count(",ms,") == len(names)
    assert outcome.records[4]["details"]["parameters left"] == 12 * 12 + 3
    assert outcome.records[3]["measurements"][0]["value"] == outcome.records[4]["measurements"][0]["value"]


def test_what_is_written_is_what_was_measured_and_holds_its_zeros(chain):
    outcome, out = chain
    small = loaded(out)
    assert small[0].out_features == 12
    assert judged(small) == value(outcome, "6 fine-tune", "accuracy")
    masks = Masks.load(out / "run" / "masks.safetensors")
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)
    for name, mask in masks.items():
        assert not small.get_parameter(name)[~mask].any()
    assert problems(out) == []
    assert "secateur.load('FOLDER', build)" in (out / "README.md").read_text()


TWICE = [UNITS, "shrink", {"fine-tune": {"epochs": 1}}, {"prune": {**UNITS["prune"], "shrink": True}}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that shrinks twice, and nothing stopped it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(spec(TWICE), out)
    return out


@pytest.mark.parametrize("stage", ["1 prune", "2 shrink", "3 fine-tune"])
@pytest.mark.thorough
def test_a_run_that_stops_goes_on_to_the_same_smaller_model(tmp_path, whole, stage):

    def say(line):
        if line.startswith(stage):
            raise Stop

    with pytest.raises(Stop):
        run(spec(TWICE), tmp_path / "parts", say=say)
    assert interrupted(tmp_path / "parts") is not None
    run(spec(TWICE), tmp_path / "parts")
    assert results(tmp_path / "parts") == results(whole)
    one, other = loaded(tmp_path / "parts"), loaded(whole)
    assert one[0].out_features == 6
    assert len(shrunk(one).axes) == 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.thorough
def test_a_training_of_the_smaller_model_resumes_in_its_middle(tmp_path):
    stages = [{"prune": {**UNITS["prune"], "shrink": True}}, {"fine-tune": {"epochs": 4, "lr": 2e-2}}]
    run(spec(stages), tmp_path / "whole")
    with pytest.raises(Stop):
        run(spec(stages), tmp_path / "parts", tell=stopping(70))
    assert (interrupted(tmp_path / "parts") / "run" / "state" / "training.safetensors").exists()
    run(spec(stages), tmp_path / "parts")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@needs_torchao
def test_smaller_and_then_integers(tmp_path):
    stages = {
        "train": STAGES[0]["train"],
        "prune": {**UNITS["prune"], "shrink": True},
        "quantize": {"scheme": "int4", "outer": "int4"},
        "fine-tune": FINE["fine-tune"],
        "export": None,
    }
    outcome = run(spec(stages), tmp_path / "out")
    names = list(outcome.measurements)
    assert [name[2:] for name in names] == ["load", "train", "prune", "quantize", "fine-tune", "export"]
    assert [m.name for m in outcome.measurements["5 export"]].count("latency") == 1
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["quantized.safetensors"]
    small = loaded(tmp_path / "out")
    again = load_quantized_(loaded(tmp_path / "out"), tmp_path / "out" / "quantized.safetensors")
    for model in (small, again):
        assert judged(model) == pytest.approx(value(outcome, "5 export", "accuracy"), abs=0.01)
    assert problems(tmp_path / "out") == []


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing is pruned before shrink"):
        experiment(spec(["shrink", UNITS]))
    with pytest.raises(UsageError, match="shrink comes after quantize, and integers are not cut"):
        experiment(spec([UNITS, "quantize", "shrink"]))
    with pytest.raises(UsageError, match="no unit is wholly pruned"):
        run(spec([{"prune": {"sparsity": 0.3}}, "shrink"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
