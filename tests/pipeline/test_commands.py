"""The verbs: `run`, and `prune` with the flags that make an experiment."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.cli.stages import as_experiment
from secateur.errors import InterruptedRunError, NumericError, UsageError
from secateur.pipeline import experiment, runner

from .support import OWN, spec

NONE = dict.fromkeys(("schedule", "epochs", "lr", "scheme", "train"))


def invoke(*words):
    """The command's exit, its output, and the exception that `main` would tell."""
    return CliRunner().invoke(app, [str(word) for word in words])


def names(given, **more):
    return [stage.name for stage in experiment(as_experiment(given, NONE | more)).stages]


def test_flags_mean_what_the_file_means():
    given = {"model": "m", "sparsity": 0.5, "only": ("ffn",), "seed": 3, "pattern": "weights"}
    assert names(given, epochs=2) == ["prune", "fine-tune"]
    assert names(given, epochs=2, scheme="int8") == ["prune", "quantize", "fine-tune"]
    assert names(given, schedule="linear", epochs=2) == ["prune"]
    found = experiment(as_experiment(given, NONE | {"epochs": 2, "lr": 0.1, "train": "t.txt"}))
    assert found.plain() == {
        "model": "m",
        "train": "t.txt",
        "seed": 3,
        "stages": [{"prune": {"sparsity": 0.5, "only": ["ffn"]}}, {"fine-tune": {"epochs": 2, "lr": 0.1}}],
    }
    (gradual,) = experiment(as_experiment({**given, "method": "gradual"}, NONE | {"epochs": 2})).stages
    assert (gradual.settings.gradually.schedule, gradual.settings.gradually.epochs) == ("cubic", 2)


@pytest.mark.parametrize("flag", ["lr", "train"])
def test_flags_of_a_training_that_nobody_asked_for(flag):
    with pytest.raises(
        UsageError, match=f"--{flag} belongs to training; give --fine-tune-epochs or --schedule"
    ):
        as_experiment({"model": "m", "sparsity": 0.5}, NONE | {flag: 1})


def test_prune_with_fine_tuning(tmp_path):
    model = ["prune", f"{OWN}:build", "--sparsity", 0.5, "--labelled", f"{OWN}:test", "--train", f"{OWN}:train"]
    words = [*model, "--fine-tune-epochs", 1, "--lr", 0.01, "--out", tmp_path / "out"]
    done = invoke(*words)
    assert done.exit_code == 0, done.exception
    (load, prune, tune) = [line for line in done.output.splitlines() if line[:3] in ("0 l", "1 p", "2 f")]
    assert "latency" in load
    assert all("speedup" in line and "latency" not in line for line in (prune, tune))  # of one moment
    for said in (done.output, (tmp_path / "out" / "README.md").read_text()):
        assert (
            said.count("A speedup was timed in turns with the loaded model; latencies of different stages") == 1
        )
    assert "2 fine-tune: accuracy" in done.output
    assert "results.csv" in done.output
    assert isinstance(invoke(*words).exception, UsageError)  # a finished result is not begun again
    assert invoke(*words, "--dry-run").output == "1 prune\n2 fine-tune\n"
    assert isinstance(invoke(*model, "--fine-tune-epochs", 1).exception, UsageError)
    wrong = invoke(*model, "--schedule", "cubik", "--out", tmp_path / "two").exception
    assert str(wrong).startswith("schedule: Input should be 'linear', 'cubic'")


def test_run_reads_a_file_and_says_where_it_is_wrong(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(json.dumps(spec([{"prune": {"sparsity": 0.5}}])))
    assert invoke("run", file, "--out", tmp_path / "out", "--dry-run").output == "1 prune\n"
    assert "--allow-code" in str(invoke("run", file, "--out", tmp_path / "out").exception)
    done = invoke("run", file, "--out", tmp_path / "out", "--allow-code", "--json")
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said["measurements"]) == ["0 load", "1 prune"]
    again = invoke("run", file, "--out", tmp_path / "out", "--allow-code")
    assert again.exit_code == 0
    assert again.output.startswith("everything is done: 1 stages, nothing is repeated\n")
    assert "accuracy" in again.output
    file.write_text("model: m\nstages:\n- prune: {sparsity: 5}")
    assert str(invoke("run", file, "--out", tmp_path / "out").exception).startswith(
        "e.yaml, line 3: sparsity: 5 is not"
    )


def test_prune_structured_and_more_in_one_command(tmp_path):
    words = ["prune", f"{OWN}:build", "--labelled", f"{OWN}:test", "--train", f"{OWN}:train"]
    words += ["--method", "structured", "--pattern", "neurons", "--sparsity", 0.5, "--shrink"]
    done = invoke(*words, "--fine-tune-epochs", 1, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert "1 prune: accuracy" in done.output
    assert "parameters 147" in done.output
    assert (tmp_path / "out" / "compact.json").is_file()


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (KeyboardInterrupt(), InterruptedRunError, "interrupted; results so far are in "),
        (
            NumericError("NaN at step 7"),
            NumericError,
            "NaN at step 7. What was done is kept: results so far are in ",
        ),
    ],
)
def test_what_stops_a_run_says_where_the_results_are(tmp_path, monkeypatch, raised, kind, said):
    def failing(name, *_):
        raise raised

    monkeypatch.setattr(runner, "carry_out", failing)
    (tmp_path / "e.yaml").write_text(json.dumps(spec([{"prune": {"sparsity": 0.5}}])))
    found = invoke("run", tmp_path / "e.yaml", "--out", tmp_path / "out", "--allow-code").exception
    assert isinstance(found, kind)
    assert str(found).startswith(said)
    assert (tmp_path / ".out.secateur-partial" / "run" / "results.csv").is_file()
