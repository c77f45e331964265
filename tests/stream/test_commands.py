"""`secateur prune --stream` and `secateur resume`, as typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import (
    InterruptedRunError,
    ResourceError,
    SecateurError,
    UsageError,
)
from secateur.request import request
from secateur.stream import asked_before, blocks, output
from secateur.verification import problems

from .support import contents

BATCHES = """
import torch

def batches():
    torch.manual_seed(4)
    return [torch.randint(3, 64, (2, 10)) for _ in range(3)]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "data.py").write_text(BATCHES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> str:
    """Standard output of a command that is to succeed."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_streamed_run(checkpoints, here):
    source = checkpoints("llama")
    said = run("prune", source, "--stream", "--sparsity", 0.5, "--out", "out", "--max-ram", "2 GB")
    assert said.index("memory   about 524 MB, at scoring the") < said.index("written  out")
    assert "note     No --method was given: magnitude, without --data" in said
    assert "pruned   8,704 of 17,408 weights, sparsity 0.5000" in said
    assert problems(here / "out") == []
    typed = yaml.safe_load((here / "out" / "run" / "recipe.yaml").read_text())
    assert request(typed).stream
    assert typed["max_ram"] == "2 GB"
    resolved = yaml.safe_load((here / "out" / "run" / "recipe.resolved.yaml").read_text())
    assert resolved["model"] == source.name
    assert len(resolved["resolved"]["layers"]) == 14
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(here / "out")
    assert int((loaded.model.layers[0].mlp.up_proj.weight == 0).sum()) == 768
    with pytest.raises(UsageError, match="already holds a finished result"):
        run("prune", source, "--stream", "--sparsity", 0.5, "--out", "out")
    with pytest.raises(UsageError, match="no run of `secateur prune --stream` was interrupted here"):
        run("resume", "out")


def test_json_and_dry_run(checkpoints, here):
    words = ["prune", checkpoints("opt"), "--stream", "--method", "sparsegpt", "--data", "data.py:batches"]
    said = json.loads(run(*words, "--sparsity", 0.5, "--out", "out", "--json"))
    assert said == {"out": "out", "sparsity": 0.5, "weights": 14336}
    plan = json.loads(run(*words, "--pattern", "2:4", "--dry-run", "--json"))["plan"]
    assert [line.split()[0] for line in plan[:5]] == ["model", "prune", "data", "memory", "disk"]
    assert plan[2] == "data     3 batches, 60 tokens"
    assert not [path for path in here.iterdir() if path.name not in ("data.py", "out", "__pycache__")]


def test_channels_are_put_in_order_where_that_is_asked(checkpoints, here):
    words = ["prune", checkpoints("llama"), "--stream", "--permute", "--pattern", "2:4"]
    assert "order    input channels of 4 axes, before pruning" in run(*words, "--dry-run")
    said = json.loads(run(*words, "--out", "out", "--json"))
    assert said["sparsity"] == 0.5
    assert yaml.safe_load((here / "out/run/recipe.yaml").read_text())["permute"]
    assert "put in order on 4 axes" in (here / "out/README.md").read_text()


SLIPS = [
    (["--evaluate", "python-docs"], "--evaluate does not go with --stream.* measure the result afterwards"),
    (["--dtype", "bfloat16"], "--dtype does not go with --stream"),
    (["--device", "cuda"], "--device cuda does not go with --stream"),
    (
        ["--method", "wanda"],
        "method wanda needs calibration data, and a streamed model writes no text of its own",
    ),
    (["--method", "wanda", "--data", "python-docs"], "this model has no tokenizer and reads no text"),
    (["--if-exists", "perhaps"], "expected fail or overwrite or resume"),
    (["--method", "best", "--data", "a.txt"], "best compares whole models in memory.* --method alps"),
    (["--evolution"], "--evolution does not go with --stream.* belongs to method best"),
    (["--max-ram", "much"], "expected an amount such as"),
]


@pytest.mark.parametrize(("words", "message"), SLIPS)
def test_slips(checkpoints, here, words, message):
    source = checkpoints("llama")
    with pytest.raises(UsageError, match=message):
        run("prune", source, "--stream", "--sparsity", 0.5, "--out", "out", *words)
    assert sorted(path.name for path in here.iterdir()) == ["data.py"]


def test_slips_without_stream(checkpoints, here):
    words = ["prune", checkpoints("llama"), "--sparsity", 0.5, "--out", "out"]
    with pytest.raises(UsageError, match="--max-ram belongs to --stream"):
        run(*words, "--max-ram", "1 GB")
    with pytest.raises(UsageError, match=r"expected fail or overwrite$"):
        run(*words, "--if-exists", "resume")
    with pytest.raises(UsageError, match="--stream needs a folder with safetensors files"):
        run("prune", "data.py:batches", "--stream", "--sparsity", 0.5, "--out", "out")


@pytest.fixture
def interrupted(checkpoints, here, monkeypatch):
    """A run that Ctrl-C stopped after the first layers."""
    monkeypatch.setattr(output, "_INTERVAL", 1)
    words = ["prune", checkpoints("llama").relative_to("/"), "--stream", "--sparsity", 0.5]
    monkeypatch.chdir("/")  # the model's path holds from there only
    run(*words, "--out", here / "whole")
    with monkeypatch.context() as patch:
        put, calls = output._put, []

        def stop(*given):
            calls.append(given)
            if len(calls) > 30:
                raise KeyboardInterrupt
            put(*given)

        patch.setattr(output, "_put", stop)
        with pytest.raises(
            InterruptedRunError, match=r"interrupted; go on with: secateur resume .*out"
        ) as error:
            run(*words, "--out", here / "out")
    assert error.value.exit_code == 130
    monkeypatch.chdir(here)
    return here / "out"


def test_resume_goes_on_from_any_directory(interrupted, here):
    before = asked_before("out")
    assert (before.asked["sparsity"], before.directory) == (0.5, "/")
    said = run("resume", "out", "--max-ram", "1 GB")
    assert "sparsity 0.5000" in said
    assert contents(here / "out") == contents(here / "whole")
    assert asked_before("out") is None


def test_a_damaged_state_is_told(interrupted, here):
    state = here / ".out.secateur-partial" / "run" / "state"
    for text, words in (
        ("{", "not readable as JSON"),
        ('{"asked": {}}', "lacks 'directory'"),
        ('{"asked": 1, "directory": "/", "threads": 1}', "not what a run wrote there"),
        ('{"asked": {"model": "a", "tau": []}, "directory": "/", "threads": 1}', "tau"),
    ):
        (state / "asked.json").write_text(text)
        with pytest.raises(SecateurError, match=words):
            run("resume", "out")
    (state / "asked.json").unlink()
    with pytest.raises(UsageError, match=r'prune_checkpoint goes on with if_exists="resume"'):
        run("resume", "out")


def test_code_that_a_file_names_is_not_run(checkpoints, here, monkeypatch):
    words = ["prune", checkpoints("opt"), "--stream", "--method", "wanda", "--data", "data.py:batches"]
    words += ["--sparsity", 0.5, "--out", "out"]
    with monkeypatch.context() as patch:

        def full(*given):
            raise OSError(28, "No space left on device")

        patch.setattr(blocks, "save", full)
        with pytest.raises(ResourceError, match=r"no space left on the disk.* go on with: secateur resume out"):
            run(*words)
    with pytest.raises(
        UsageError, match=r"from data.py:batches, and no code is run .* with --if-exists resume"
    ):
        run("resume", "out")
    run(*words, "--if-exists", "resume")
    assert problems(here / "out") == []


@pytest.mark.slow
def test_kill_9_of_the_program_and_resume(checkpoints, here):
    """The program as a user starts it, killed after every line of its journal, ends with the same bytes."""
    source = checkpoints("mixtral")
    (here / "text.txt").write_text("a b c d e f g h " * 400)
    _with_tokenizer(source)
    words = [
        source,
        "--stream",
        "--method",
        "sparsegpt",
        "--sparsity",
        0.5,
        "--data",
        "text.txt",
        "--samples",
        4,
    ]
    program = [sys.executable, "-W", "ignore", "-m", "secateur"]

    def started(*rest):
        return subprocess.Popen([str(word) for word in (*program, *rest)], stderr=subprocess.DEVNULL)

    assert started("prune", *words, "--context", 32, "--out", "whole").wait() == 0
    journal = here / ".out.secateur-partial" / "run" / "state" / "journal.jsonl"
    kills, verb = 0, ["prune", *words, "--context", 32, "--out", "out"]
    while not (here / "out").exists() and kills < 10:
        before = len(journal.read_bytes()) if journal.is_file() else 0
        running = started(*verb)
        while running.poll() is None and not (journal.is_file() and len(journal.read_bytes()) > before):
            time.sleep(0.005)
        if running.poll() is None:  # it has just got a step further
            os.kill(running.pid, signal.SIGKILL)
            kills += 1
        running.wait()
        verb = ["resume", "out"]
    assert kills > 1
    assert contents(here / "out") == contents(here / "whole")


def _with_tokenizer(folder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
