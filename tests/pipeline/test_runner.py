"""Stages follow each other, each measured; a run that dies goes on to the same result."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur.core.masks import Masks
from secateur.errors import InputError, UsageError
from secateur.folder import interrupted, write_manifest
from secateur.pipeline import experiment, experiment_to
from secateur.pipeline.spec import STAGES as KINDS
from secateur.pipeline.stages import _STAGES

from ..tiny import digests
from .support import OWN, STAGES, spec


def run(given, out, **more):
    return experiment_to(experiment(given), out, allow_code=True, **more)


def test_every_stage_of_the_schema_is_carried_out():
    assert set(_STAGES) == set(KINDS)


def value(outcome, stage, name):
    return next(m.value for m in outcome.measurements[stage] if m.name == name)


def test_stages_follow_each_other_and_are_measured(tmp_path):
    outcome = run(spec(), tmp_path / "out")
    assert list(outcome.measurements) == ["0 load", "1 train", "2 prune", "3 fine-tune"]
    accuracy = [value(outcome, stage, "accuracy") for stage in outcome.measurements]
    assert accuracy[1] > accuracy[0]
    assert accuracy[3] > accuracy[2]
    masks = Masks.load(tmp_path / "out" / "run" / "masks.safetensors")
    assert masks.sparsity == pytest.approx(0.85, abs=2e-3)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
    assert not (tmp_path / "out" / "run" / "state").exists()
    with (tmp_path / "out" / "run" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == set(outcome.measurements)
    said = json.loads((tmp_path / "out" / "run" / "results.json").read_text())["stages"]
    assert [stage["name"] for stage in said] == ["load", "train", "prune", "fine-tune"]
    assert said[3]["details"]["epoch kept"] in range(5)
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_a_finished_experiment_is_told_again_and_nothing_is_repeated(tmp_path):
    stages = [{"prune": {"sparsity": 0.5}}, {"fine-tune": {"epochs": 1}}]
    first = run(spec(stages), tmp_path / "out")
    before, said = digests(tmp_path / "out"), []
    assert run(spec(stages), tmp_path / "out", say=said.append) == first
    assert said == ["everything is done: 2 stages, nothing is repeated"]
    assert digests(tmp_path / "out") == before
    for other, what in (
        (spec(stages[:1]), "stages was"),
        (spec(stages, labelled=f"{OWN}:train"), "labelled was"),
    ):
        with pytest.raises(UsageError, match=rf"finished result, of another experiment: .*{what}"):
            run(other, tmp_path / "out")
    with pytest.raises(UsageError, match="already holds a finished result; choose"):
        run(spec(stages), tmp_path / "out", if_exists="fail")
    (tmp_path / "out" / "run" / "run.json").write_text("{}")
    write_manifest(tmp_path / "out")
    with pytest.raises(UsageError, match="a finished result of something else"):
        run(spec(stages), tmp_path / "out")


class Stop(BaseException):
    """What a Ctrl-C is."""


def stopping(after: int):
    """A `tell` that raises after so many calls."""
    calls = iter(range(after))

    def tell(label, done, total):
        if next(calls, None) is None:
            raise Stop

    return tell


def results(out: Path):
    said = json.loads((out / "run" / "results.json").read_text())["stages"]
    timed = ("latency", "speedup")
    return [
        {key: value for key, value in stage.items() if key not in ("seconds", "measurements")}
        | {"measurements": [m for m in stage["measurements"] if m["name"] not in timed]}
        for stage in said
    ]


def weights(out: Path):
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(spec(), out)
    return out


@pytest.mark.parametrize("after", [3, 20, 80, 140])
@pytest.mark.thorough
def test_a_run_that_stops_goes_on_to_the_same_result(tmp_path, whole, after):
    with pytest.raises(Stop):
        run(spec(), tmp_path / "parts", tell=stopping(after))
    left = interrupted(tmp_path / "parts")
    assert left is None or not (tmp_path / "parts").exists()
    run(spec(), tmp_path / "parts")
    assert results(tmp_path / "parts") == results(whole)
    one, other = weights(tmp_path / "parts"), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_what_is_done_is_on_disk_before_the_next_stage_begins(tmp_path):
    seen = []

    def say(line):
        left = interrupted(tmp_path / "out")
        seen.append((line, [stage["name"] for stage in results(left)]))

    run(spec(), tmp_path / "out", say=say)
    assert [names for _, names in seen] == [
        ["load"],
        ["load", "train"],
        ["load", "train", "prune"],
        ["load", "train", "prune", "fine-tune"],
    ]
    assert seen[2][0].startswith("2 prune: accuracy")


CHANGED = [
    (spec(seed=1), "seed was not there, now 1"),
    (spec([*STAGES[:1], {"prune": {"sparsity": 0.5}}, STAGES[2]]), "stages 2.prune.sparsity was 0.85, now 0.5"),
    (spec(STAGES[:2]), "stages was"),
    (spec(train=f"{OWN}:test"), "the training data changed"),
    (spec(labelled=f"{OWN}:train"), "the batches judged by changed"),
]


@pytest.mark.parametrize(("other", "said"), CHANGED)
@pytest.mark.thorough
def test_another_experiment_does_not_go_on(tmp_path, other, said):
    with pytest.raises(Stop):
        run(spec(), tmp_path / "out", tell=stopping(80))
    with pytest.raises(UsageError) as caught:
        run(other, tmp_path / "out")
    assert "this experiment was begun otherwise: " in str(caught.value)
    assert said in str(caught.value)
    assert "--if-exists overwrite" in str(caught.value)
    run(spec(), tmp_path / "out")


@pytest.mark.thorough
def test_other_code_does_not_go_on(tmp_path):
    """The weights are the same, what is computed with them is not."""
    copied = tmp_path / "own.py"
    copied.write_text(OWN.read_text())
    asked = {"model": f"{copied}:build", "train": f"{OWN}:train", "labelled": f"{OWN}:test"}
    with pytest.raises(Stop):
        run(spec(**asked), tmp_path / "out", tell=stopping(80))
    copied.write_text(OWN.read_text().replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(UsageError, match="begun otherwise: the code of the model changed"):
        run(spec(**asked), tmp_path / "out")


def test_a_garbled_state_is_refused(tmp_path):
    with pytest.raises(Stop):
        run(spec(), tmp_path / "out", tell=stopping(80))
    state = interrupted(tmp_path / "out") / "run" / "state"
    model = next(state.glob("model-*.safetensors"))
    model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read .*start anew with --if-exists overwrite"):
        run(spec(), tmp_path / "out")
    (state / "progress.json").write_text("{")
    with pytest.raises(InputError, match="no readable state of an experiment"):
        run(spec(), tmp_path / "out")
    run(spec(), tmp_path / "out", if_exists="overwrite")


def test_code_that_a_file_names_needs_a_word(tmp_path):
    with pytest.raises(UsageError, match=r"names code of your own, .*own.py:build, .*--allow-code"):
        experiment_to(experiment(spec()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_stages_that_train_need_data(tmp_path):
    given = {key: text for key, text in spec().items() if key != "train"}
    with pytest.raises(UsageError, match="stages that train need data; give train: a text"):
        run(given, tmp_path / "out")
    with pytest.raises(UsageError, match="this model does not learn from text alone"):
        run(spec(train="python-docs"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_prunings_nest(tmp_path):
    stages = [
        {"prune": {"sparsity": 0.5, "only": "0"}},
        {"prune": {"sparsity": 0.75}},
        {"fine-tune": {"epochs": 1}},
    ]
    outcome = run(spec(stages), tmp_path / "out")
    assert [round(value(outcome, f"{n} prune", "sparsity"), 2) for n in (1, 2)] == [0.5, 0.75]
    assert value(outcome, "3 fine-tune", "sparsity") == value(outcome, "2 prune", "sparsity")


GRADUALLY = [
    STAGES[0],
    {
        "prune": {
            "schedule": "cubic",
            "method": "taylor",
            "sparsity": 0.85,
            "epochs": 4,
            "lr": 2e-2,
            "updates": 7,
        }
    },
]


@pytest.mark.thorough
def test_pruning_gradually_ends_at_its_target_and_resumes(tmp_path):
    whole = run(spec(GRADUALLY), tmp_path / "whole")
    assert value(whole, "2 prune", "sparsity") == pytest.approx(0.85, abs=2e-3)
    details = whole.records[2]["details"]
    assert (details["schedule"], details["recipe"]["score"]) == ("cubic(0, 0.85)", "taylor")
    assert details["epoch kept"] >= 3  # the target is reached at 70 % of four epochs
    with pytest.raises(Stop):
        run(spec(GRADUALLY), tmp_path / "parts", tell=stopping(138))
    assert (interrupted(tmp_path / "parts") / "run" / "state" / "training.safetensors").exists()
    run(spec(GRADUALLY), tmp_path / "parts")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert all(torch.equal(weights(tmp_path / "parts")[k], v) for k, v in weights(tmp_path / "whole").items())


def test_pruning_gradually_goes_on_from_what_is_pruned(tmp_path):
    stages = [
        {"prune": {"sparsity": 0.4}},
        {"prune": {"schedule": "exponential", "sparsity": 0.8, "epochs": 2, "lr": 1e-2}},
    ]
    outcome = run(spec(stages), tmp_path / "out")
    assert outcome.records[2]["details"]["schedule"] == "exponential(0.401515, 0.8)"
    assert value(outcome, "2 prune", "sparsity") == pytest.approx(0.8, abs=2e-3)
    weights_now = weights(tmp_path / "out")
    for name, mask in Masks.load(tmp_path / "out" / "run" / "masks.safetensors").items():
        assert not weights_now[name][~mask].any()


def test_a_dense_teacher_and_another(tmp_path):
    stages = [{"prune": {"sparsity": 0.5}}, {"distil": {"epochs": 1, "lr": 1e-3}}]
    outcome = run(spec(stages), tmp_path / "one")
    stages = [{"distil": {"epochs": 1, "teacher": f"{OWN}:build"}}, {"prune": {"sparsity": 0.5}}]
    assert list(run(spec(stages), tmp_path / "two").measurements)[1] == "1 distil"
    assert value(outcome, "2 distil", "top1_agreement") >= value(outcome, "1 prune", "top1_agreement")


@pytest.mark.thorough
def test_a_killed_process_loses_nothing_done(tmp_path):
    """SIGKILL, not an exception: whatever is on disk then must do."""
    stages = [*STAGES[:2], {"fine-tune": {"epochs": 40, "lr": 5e-3}}]
    given = spec(stages)
    (tmp_path / "e.yaml").write_text(json.dumps(given))
    command = [sys.executable, "-m", "secateur", "run", "e.yaml", "--out", "out", "--allow-code"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("2 prune"):
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    left = interrupted(tmp_path / "out")
    assert [stage["name"] for stage in results(left)] == ["load", "train", "prune"]
    rows = (left / "run" / "results.csv").read_text().splitlines()
    assert rows[-1].startswith("2 prune")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "going on after stage 2" in again.stdout
    run(given, tmp_path / "whole")
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert all(torch.equal(weights(tmp_path / "out")[k], v) for k, v in weights(tmp_path / "whole").items())
