"""Runs that cannot be: what does not fit together, hostile names, folders taken, full disks, kills."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from secateur import results
from secateur.core.masks import Masks
from secateur.errors import NumericError, ResourceError, UsageError
from secateur.folder import verify
from secateur.manifest import write_manifest
from secateur.request import request
from secateur.run import carry_out, check_apart, prepare, prune_to

from .running import copied, environment
from .tiny import Secateur, digests, text, weights

pytest.importorskip("transformers")
pytest.importorskip("plotly")


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        (
            "bert",
            {"method": "wanda"},
            "needs calibration data, and this model writes no text of its own; give --data TEXT",
        ),
        ("vit", {"method": "wanda"}, "give --data file.py:function (it returns an iterable of inputs)"),
        ("vit", {"data": "python-docs"}, "--data python-docs: this model has no tokenizer and reads no text"),
        ("vit", {"evaluate": "python-docs"}, "give batches with --labelled file.py:function"),
        (
            "bert",
            {"evaluate": "python-docs"},
            "--evaluate measures perplexity, which only a causal language model",
        ),
        ("t5", {"data": "python-docx"}, '"python-docx": no such file. Nearest there: python-docs.'),
        ("gpt2", {"context": 65}, "context 65 is longer than the model's 64 positions; use at most 64"),
        ("gpt2", {"evaluate": "tory.txt"}, '"tory.txt": no such file.'),
        ("gpt2", {"method": "wanda", "data": "OWN:rows"}, "the model cannot be run on the calibration data ("),
        ("vit", {"labelled": "OWN:rows"}, "batch 0 must be a pair (inputs, labels)"),
        (
            "vit",
            {"labelled": "OWN:labelled_rows"},
            "the model cannot be run on the batches of own.py:labelled_rows (",
        ),
        ("vit", {"labelled": "OWN:empty"}, "own.py:empty gave no batches"),
        (
            "OWN:mlp",
            {"method": "wanda", "data": "OWN:images"},
            "the model cannot be run on the example input (",
        ),
        (
            "OWN:mlp_with_example",
            {"method": "wanda", "data": "OWN:images"},
            "0.weight: takes inputs of width 16, and calibration data bring it 8 (input of shape (8, 1, 8, 8)); give",
        ),
        ("OWN:moody", {}, "own.py:moody: this model cannot be copied ("),
        ("OWN:shared", {"only": ["first"]}, "is the same tensor as second.weight"),
    ],
)
@pytest.mark.thorough
def test_what_does_not_fit_together_is_told(models, own, tmp_path, kind, asked, message):
    model = kind.replace("OWN", str(own)) if "OWN" in kind else str(models[kind])
    asked = {k: v.replace("OWN", str(own)) if isinstance(v, str) else v for k, v in asked.items()}
    with pytest.raises(UsageError) as told:
        prune_to(prepare(request({"model": model, "sparsity": 0.5, **asked}), offline=True), tmp_path / "out")
    assert message in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_no_fault_of_the_data(models, own, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        )

    monkeypatch.setattr("secateur.evaluate.flops", full)
    with pytest.raises(ResourceError, match="the model runs out of memory on the example input"):
        prune_to(prepare(request({"model": f"{own}:mlp_with_example", "sparsity": 0.5})), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Hostile names


def test_a_models_name_is_data_in_every_file(models, tmp_path):
    name = "x|y`z<img src=q onerror=alert(1)><script>alert(2)<"
    shown = tmp_path / f"{name}\n# not a heading"
    copied(models["gpt2"], shown)
    out = tmp_path / "out"
    prune_to(
        prepare(
            request({"model": str(shown), "method": "magnitude", "sparsity": 0.5, "evaluate_tokens": 100}),
            offline=True,
        ),
        out,
    )
    page, card = (out / "run/report.html").read_text(), (out / "README.md").read_text()
    assert "<img" not in page
    assert "<script>alert" not in page
    assert "x|y`z&lt;img src=q onerror=alert(1)&gt;&lt;script&gt;" in page
    assert card.splitlines()[0] == f"# `{name.replace('`', chr(39))}?# not a heading`, pruned"
    assert "\n# not a heading" not in card
    assert yaml.safe_load((out / "run/recipe.yaml").read_text())["model"] == str(shown)


def test_a_texts_name_stays_in_its_cell_of_the_card(models, tmp_path):
    strange = tmp_path / "a|b <b>`c`.txt"
    strange.write_text(text())
    out = tmp_path / "out"
    asked = {"model": str(models["gpt2"]), "method": "magnitude", "sparsity": 0.5}
    asked |= {"evaluate": str(strange), "evaluate_tokens": 100}
    prune_to(prepare(request(asked), offline=True), out)
    row = next(line for line in (out / "README.md").read_text().splitlines() if line.startswith("| perplexity"))
    assert r"a\|b \<b>\`c\`.txt" in row
    assert row.replace(r"\|", "").count("|") == 4


# Dying


def test_a_dry_preparation_writes_nothing_and_changes_nothing(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = prepare(request({"model": str(models["gpt2"]), "method": "wanda", "sparsity": 0.5}), offline=True)
    said = str(run)
    assert "wanda on Weights(), per_row: 8 layers with 24,576 weights to sparsity 0.5000" in said
    assert "128 texts of 64 tokens that the model writes itself" in said
    assert "transformer.wte.weight is the same tensor as lm_head.weight" in said
    assert list(tmp_path.iterdir()) == []
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(run.loaded.model.state_dict()[name], weights(models["gpt2"])[name])


def test_a_folder_that_is_taken(prune, own, tmp_path):
    out = prune(f"{own}:mlp", sparsity=0.3)
    before = digests(out)
    run = prepare(request({"model": f"{own}:mlp", "sparsity": 0.6}))
    with pytest.raises(UsageError, match="already holds a finished result"):
        prune_to(run, out)
    assert digests(out) == before
    prune_to(run, out, if_exists="overwrite")
    assert Masks.load(out / "run/masks.safetensors").zeros == round(832 * 0.6)
    (out / "mine.txt").write_text("do not lose this")
    with pytest.raises(UsageError, match=r"mine\.txt in it is not a file that a run wrote"):
        prune_to(run, out, if_exists="overwrite")


@pytest.mark.parametrize("out", ["gpt2", "gpt2/pruned", "."])
def test_the_source_is_not_written_into(models, out, monkeypatch):
    models["gpt2"]  # made
    monkeypatch.chdir(models.root)
    with pytest.raises(UsageError, match="and the model's folder gpt2 lie in each other"):
        check_apart("gpt2", out)
    check_apart("gpt2", "gpt2-pruned")
    check_apart("own.py:mlp", "own")


@pytest.mark.parametrize("step", ["model.save_pretrained", "results.write_json", "report.write"])
@pytest.mark.thorough
def test_a_full_disk_leaves_the_earlier_result(models, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    asked = {"model": str(models["gpt2"]), "method": "magnitude", "sparsity": 0.5, "evaluate_tokens": 100}
    asked = request(asked)
    prune_to(prepare(asked, offline=True), out)
    before = digests(out)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = prepare(asked, offline=True)
    if step.startswith("model."):
        run.loaded.model.save_pretrained = full
    else:
        monkeypatch.setattr(results if step.startswith("results") else results.report, step.split(".")[1], full)
    with pytest.raises(ResourceError, match="no space left on the disk; earlier results are intact"):
        prune_to(run, out, if_exists="overwrite")
    assert digests(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SLOW = """
import time, torch
from torch import nn

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)

def slow():
    return Slow(16, 10)

def rows():
    return [(torch.randn(8, 16), torch.randint(0, 10, (8,))) for _ in range(300)]
"""


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
@pytest.mark.thorough
def test_a_run_that_dies_leaves_no_folder_that_looks_finished(tmp_path, own, kill, code):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [
        "prune",
        "slow.py:slow",
        "--sparsity",
        "0.5",
        "--labelled",
        "slow.py:rows",
        "--out",
        "results/out",
    ]
    running = subprocess.Popen(
        [sys.executable, "-m", "secateur", *command],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background jobs ignore Ctrl-C, and so would the child of a test run that is one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        partial = tmp_path / "results" / ".out.secateur-partial"
        assert running.stdout is not None
        assert running.stdout.readline().startswith("model ")  # it says first what it will do, then does it
        assert partial.is_dir()
        time.sleep(0.5)
        running.send_signal(kill)
        _, said = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == code
    assert "Traceback" not in said
    assert not (tmp_path / "results/out").exists()
    if code == 130:
        assert said.splitlines()[-1] == "secateur: interrupted; nothing half-finished was left behind"
        assert list((tmp_path / "results").iterdir()) == []
    prune_to(prepare(request({"model": f"{own}:mlp", "sparsity": 0.5})), tmp_path / "results/out")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["out"]


def test_carrying_out_needs_only_a_folder(own, tmp_path):
    """`prune_to` is `carry_out` in a new folder; a caller may bring a folder of another kind."""
    carry_out(prepare(request({"model": f"{own}:mlp", "sparsity": 0.5})), tmp_path)
    write_manifest(tmp_path)
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (errno.EACCES, 3, "/some/file: Permission denied; check the path and its permissions."),
        (errno.ENOSPC, 4, "/some/file: no space left on the disk; earlier results are intact."),
    ],
)
def test_what_the_file_system_refuses_is_one_line_wherever_it_happens(
    monkeypatch, capsys, tmp_path, number, code, message
):
    def refuses(folder):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("secateur.verification.problems", refuses)
    assert message in Secateur(monkeypatch, capsys).refused(code, "verify", tmp_path)


def test_weights_that_are_not_finite_are_told_before_anything_is_measured(models, tmp_path):
    from safetensors.torch import load_file, save_file

    copied(models["gpt2"], tmp_path / "ill")
    state = load_file(tmp_path / "ill" / "model.safetensors")
    name = next(name for name in state if name.endswith("h.1.mlp.c_fc.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, tmp_path / "ill" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericError, match=r"h\.1\.mlp\.c_fc\.weight: NaN or Inf among its weights.* leave the layer out"
    ):
        prepare(request({"model": str(tmp_path / "ill"), "method": "magnitude", "sparsity": 0.5}), offline=True)
