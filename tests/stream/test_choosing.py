"""Whole units chosen from streamed tensors: those that `prune_` keeps, and files that saving in memory writes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from secateur import choose_units, flap, prune_, shrink, shrink_checkpoint
from secateur.cli import app
from secateur.core.example import analysis_of
from secateur.core.unit_masks import keep_of
from secateur.errors import ResourceError, UsageError
from secateur.model import load, save
from secateur.pattern import Axes, Heads, Neurons
from secateur.recipes import METHODS, activation, l2, magnitude, random, taylor
from secateur.stream import prune_checkpoint
from secateur.stream.writing import write_tensors

BOTH = Heads() | Neurons()
IDS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))


@cache
def analysed(folder: Path):
    model = load(folder).model
    return model, analysis_of(model, {"input_ids": IDS})[0]


def same_units(source: Path, recipe, **named) -> dict[str, torch.Tensor]:
    """Streamed and in memory the same units stay."""
    found = choose_units(source, recipe=recipe, **named)
    model, analysis = load(source).model, analysed(source)[1]
    masks = prune_(model, recipe=recipe, example=analysis, **named)
    wanted = keep_of(analysis, masks)
    lost = {name: kept for name, kept in found.items() if len(kept) < analysis[name].size}
    assert lost.keys() == wanted.keys()
    assert all(torch.equal(kept, wanted[name]) for name, kept in lost.items())
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        replace(l2, pattern=BOTH),
        replace(magnitude, pattern=Neurons(multiple=8), allocate=METHODS["global-magnitude"].allocate),
        replace(random, pattern=Axes("hidden", "feed-forward unit")),
    ],
    ids=["l2", "global", "random"],
)
@pytest.mark.thorough
def test_scores_of_weights_choose_as_in_memory(checkpoints, recipe) -> None:
    same_units(checkpoints("llama", torch.bfloat16), recipe, sparsity=0.4, seed=3)


@pytest.mark.parametrize(
    ("kind", "score"), [("llama", flap), pytest.param("gpt2", activation, marks=pytest.mark.slow)]
)
@pytest.mark.thorough
def test_scores_of_activations_choose_as_in_memory(checkpoints, kind, score) -> None:
    draw = torch.Generator().manual_seed(2)
    data = [{"input_ids": torch.randint(3, 64, (2, 11), generator=draw)} for _ in range(2)]
    same_units(checkpoints(kind), replace(score, pattern=BOTH, update=None), sparsity=0.5, data=data)


@pytest.mark.thorough
def test_targets_in_real_units(checkpoints) -> None:
    source = checkpoints("llama")
    keep = same_units(source, replace(l2, pattern=Neurons()), target="0.8 parameters")
    analysis = analysed(source)[1]
    assert analysis.parameter_count(keep) / analysis.parameter_count() == pytest.approx(0.8, rel=0.02)


@pytest.mark.thorough
def test_files_are_those_of_saving_in_memory(checkpoints, tmp_path: Path) -> None:
    """Byte for byte in one file, from shards in bfloat16; and the same tensors in several, which transformers loads."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    source, weights = checkpoints("llama", torch.bfloat16), "model.safetensors"
    model, analysis = analysed(source)
    keep = {
        u.name: range(1, u.size, 2)
        for u in analysis.units
        if u.kind in ("head", "KV group", "feed-forward unit")
    }
    assert shrink_checkpoint(source, keep, tmp_path / "streamed") == "hf"
    small = shrink(model, keep, {"input_ids": IDS}, analysis=analysis)
    save(small, None, tmp_path / "memory", source=source, dtype=torch.bfloat16)
    assert (tmp_path / "streamed" / weights).read_bytes() == (tmp_path / "memory" / weights).read_bytes()
    one, other = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("streamed", "memory"))
    assert {k: v for k, v in one.items() if other.get(k) != v} == {}
    assert shrink_checkpoint(source, keep, tmp_path / "several", to="hf", shard="12 kB") == "hf"
    files = [*(tmp_path / "several").glob("*.safetensors")]
    assert len(files) > 1
    parts = {name: value for path in files for name, value in load_file(path).items()}
    whole = load_file(tmp_path / "streamed" / weights)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    assert found.num_parameters() == small.num_parameters()


def test_the_writer_writes_what_the_library_writes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kinds = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
    tensors = {f"{'ä' * (at % 3)}t{at}": torch.randn(3, at + 1).to(kinds[at % 4]) for at in range(9)} | {
        "none": torch.zeros(0, 4)
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    announced = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    digest = write_tensors(tmp_path / "ours", announced, tensors.__getitem__, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    from secateur.manifest import sha256

    assert digest == sha256(tmp_path / "ours")
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "bad", announced, lambda _: torch.zeros(1), {})


def test_what_cannot_be_streamed_is_refused(checkpoints) -> None:
    source = checkpoints("llama")
    on = replace(l2, pattern=BOTH)
    with pytest.raises(UsageError, match=r"^TakeOver.* mends what stays .* leave it out"):
        choose_units(source, 0.5, flap)
    with pytest.raises(UsageError, match=r"gradients need the whole model in memory"):
        choose_units(source, 0.5, replace(taylor, pattern=BOTH), data=[IDS])
    with pytest.raises(UsageError, match=r"a target in ms is measured on the whole model"):
        choose_units(source, None, on, target="2x faster")
    with pytest.raises(UsageError, match=r"cuts no whole units"):
        choose_units(source, 0.5, l2.__class__(l2.score))
    with pytest.raises(UsageError, match=r"needs calibration data for input_variance"):
        choose_units(source, 0.5, replace(flap, update=None))
    with pytest.raises(ResourceError, match=r"are allowed"):
        choose_units(source, 0.5, on, memory="400 MB")
    with pytest.raises(UsageError, match=r"choose them with choose_units"):
        prune_checkpoint(source, source.parent / "out", 0.5, on)


def run(*words: object) -> str:
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.mark.thorough
def test_on_the_command_line(checkpoints, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = checkpoints("llama")
    words = ["prune", source, "--stream", "--shrink", "--pattern", "heads,neurons", "--sparsity", "0.5"]
    said = run(*words, "--method", "l2", "--out", "small")
    assert "prune    l2 on Heads() | Neurons()" in said
    assert "written  small (plain)" in said
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.intermediate_size == 24
    assert json.loads((tmp_path / "small" / "run" / "units.json").read_text()).keys()
    (tmp_path / "data.py").write_text(
        "import torch\n\ndef batches():\n    return [torch.randint(3, 64, (2, 10), generator=torch.Generator())]\n"
    )
    plan = json.loads(run(*words, "--data", "data.py:batches", "--dry-run", "--json"))["plan"]
    assert any("No --method was given: flap" in line for line in plan)
    assert any(line.startswith("memory   about") for line in plan)
    assert not [path for path in tmp_path.rglob(".*") if "secateur" in path.name]


def test_refused_on_the_command_line(checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama")
    words = [
        "prune",
        source,
        "--stream",
        "--pattern",
        "neurons",
        "--sparsity",
        "0.5",
        "--out",
        tmp_path / "out",
    ]
    for more, match in [
        ([], r"taken out of the files, not zeroed; add --shrink"),
        (["--shrink"], r"which units\? Give --data TEXT"),
        (["--shrink", "--method", "best"], r"best is for single weights"),
        (["--shrink", "--method", "flap"], r"mends what stays"),
        (["--shrink", "--method", "l2", "--if-exists", "resume"], r"in one go"),
    ]:
        with pytest.raises(UsageError, match=match):
            run(*words, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_export_from_file_to_file(checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama")
    loaded = load(source)
    masks = prune_(loaded.model, 0.5, replace(l2, pattern=BOTH), example=analysed(source)[1])
    save(loaded.model, None, tmp_path / "run", source=source)
    (tmp_path / "run" / "run").mkdir()
    with pytest.raises(UsageError, match=r"nothing says which units go"):
        run("export", tmp_path / "run", "--stream", "--out", tmp_path / "none")
    masks.save(tmp_path / "run" / "run" / "masks.safetensors")
    assert "(plain)" in run("export", tmp_path / "run", "--stream", "--out", tmp_path / "small")
    small, inputs = load(tmp_path / "small").model, {"input_ids": IDS}
    assert small.num_parameters() < loaded.model.num_parameters()
    with torch.no_grad():
        assert torch.allclose(small(**inputs).logits, loaded.model(**inputs).logits, atol=1e-6)
    for words, match in [
        (["--to", "padded"], "is that already"),
        (["--to", "sparse"], "does not go with --stream"),
    ]:
        with pytest.raises(UsageError, match=match):
            run("export", tmp_path / "run", "--stream", *words, "--out", tmp_path / "no")
