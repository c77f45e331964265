"""Pruning from file to file without data gives bit by bit what loading, prune_ and saving give."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from secateur import recipes
from secateur.allocate import Percentile, per_row
from secateur.core.masks import Masks
from secateur.errors import InputError, NumericError, ResourceError, UsageError
from secateur.folder import verify
from secateur.pattern import NM, Blocks, Rows
from secateur.recipes import magnitude
from secateur.stream import output, prune_checkpoint
from secateur.verification import problems

from .support import contents, killed, refused, same_as_in_memory, with_weight

RECIPES = {
    "magnitude": (0.5, magnitude),
    "per row": (0.3, replace(magnitude, allocate=per_row)),
    "global": (0.637, recipes.global_magnitude),
    "global blocks": (0.5, replace(recipes.global_magnitude, pattern=Blocks(4, 1))),
    "threshold": (None, recipes.threshold(0.01)),
    "relative threshold": (None, recipes.threshold(0.5, relative=True)),
    "percentile": (None, recipes.percentile(30.0)),
    "percentile of the model": (None, replace(magnitude, allocate=Percentile(30.0, "model"))),
    "2:4": (None, replace(magnitude, pattern=NM(2, 4))),
    "rows": (0.25, replace(magnitude, pattern=Rows())),
    "random": (0.5, recipes.random),
}


@pytest.mark.parametrize("name", RECIPES)
def test_llama_is_pruned_as_in_memory(checkpoints, tmp_path, name):
    sparsity, recipe = RECIPES[name]
    same_as_in_memory(checkpoints("llama"), tmp_path / "out", sparsity, recipe)


@pytest.mark.parametrize("name", ["per row", "global", "random"])
def test_bfloat16_is_pruned_as_in_memory(checkpoints, tmp_path, name):
    sparsity, recipe = RECIPES[name]
    same_as_in_memory(checkpoints("llama", torch.bfloat16), tmp_path / "out", sparsity, recipe)


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "global"), ("opt", "2:4"), ("mixtral", "global"), ("mixtral", "2:4")]
)
def test_other_architectures_are_pruned_as_in_memory(checkpoints, tmp_path, kind, name):
    sparsity, recipe = RECIPES[name]
    same_as_in_memory(checkpoints(kind), tmp_path / "out", sparsity, recipe)


def test_only_and_skip_and_tied_tensors(checkpoints, tmp_path):
    same_as_in_memory(checkpoints("llama"), tmp_path / "a", 0.5, only="attention", skip="*.0.*")
    same_as_in_memory(checkpoints("gpt2"), tmp_path / "b", 0.5, only=["*wte", "lm_head"])


def test_an_exact_number_of_nonzeros(checkpoints, tmp_path):
    source = checkpoints("llama")
    same_as_in_memory(source, tmp_path / "out", recipe=recipes.global_magnitude, nonzero=20_000)
    with pytest.raises(UsageError, match="1 non-zero parameters cannot be reached"):
        prune_checkpoint(source, tmp_path / "few", nonzero=1)
    with pytest.raises(UsageError, match="nonzero fixes the count"):
        prune_checkpoint(source, tmp_path / "few", 0.5, nonzero=20_000)
    with pytest.raises(UsageError, match="needs single weights as units"):
        prune_checkpoint(source, tmp_path / "few", recipe=replace(magnitude, pattern=Rows()), nonzero=20_000)


def test_files_keep_their_names_layout_and_headers(checkpoints, tmp_path):
    source = checkpoints("llama")
    prune_checkpoint(source, tmp_path / "out", 0.5)
    for path in source.iterdir():
        other = (tmp_path / "out" / path.name).read_bytes()
        if path.suffix == ".safetensors":
            head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert other[:head] == path.read_bytes()[:head]
            assert len(other) == path.stat().st_size
        else:
            assert other == path.read_bytes()
    assert verify(tmp_path / "out") == problems(tmp_path / "out") == []
    assert not (tmp_path / "out" / "run" / "state").exists()
    layers = json.loads((tmp_path / "out" / "run" / "layers.json").read_text())
    assert layers[0]["pruned"] == layers[0]["zeros"] == 512


@pytest.mark.parametrize("at", [5, 40])
@pytest.mark.thorough
def test_killed_and_resumed_gives_the_same_bytes(checkpoints, tmp_path, monkeypatch, at):
    monkeypatch.setattr(output, "_INTERVAL", 1)
    source, arguments = checkpoints("llama"), (0.6, recipes.global_magnitude)
    prune_checkpoint(source, tmp_path / "whole", *arguments)
    killed(at, source, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    prune_checkpoint(source, tmp_path / "out", *arguments, if_exists="resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_torn_line_of_the_journal_is_no_harm(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_INTERVAL", 1)
    source = checkpoints("llama")
    prune_checkpoint(source, tmp_path / "whole", 0.5)
    killed(20, source, tmp_path / "out", 0.5)
    journal = tmp_path / ".out.secateur-partial" / "run" / "state" / "journal.jsonl"
    lines = journal.read_text()
    assert lines.count("\n") > 3
    journal.write_text(lines[:-4])
    prune_checkpoint(source, tmp_path / "out", 0.5, if_exists="resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.thorough
def test_a_resume_with_other_arguments_is_refused_and_the_state_stays(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_INTERVAL", 1)
    source = checkpoints("llama")
    killed(20, source, tmp_path / "out", 0.5)
    for change, words in (
        ({"sparsity": 0.6}, "weights kept was"),
        ({"seed": 3}, "seed was 0 and is 3 now"),
        ({"only": "attention", "sparsity": 0.5}, "layers was"),
        ({"recipe": recipes.random}, "recipe was"),
    ):
        with pytest.raises(UsageError, match=words):
            prune_checkpoint(source, tmp_path / "out", **{"sparsity": 0.5, "if_exists": "resume", **change})
    changed = shutil.copytree(source, tmp_path / "changed")
    path = changed / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UsageError, match="source is another one"):
        prune_checkpoint(changed, tmp_path / "out", 0.5, if_exists="resume")
    with pytest.raises(UsageError, match="a run was interrupted here"):
        prune_checkpoint(source, tmp_path / "out", 0.5)
    prune_checkpoint(source, tmp_path / "out", 0.5, if_exists="resume")
    assert verify(tmp_path / "out") == []


@pytest.fixture
def broken(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("llama"), tmp_path / "broken")


def test_truncated_and_missing_shards(broken, tmp_path):
    path = sorted(broken.glob("*.safetensors"))[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert not refused(broken, tmp_path, InputError, path.name).exists()
    path.unlink()
    assert not refused(broken, tmp_path, InputError, f"{path.name}: missing").exists()


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_layer(broken, tmp_path, bad):
    with_weight(broken, LAYER, lambda w: w.index_fill(0, torch.tensor([3]), bad))
    for recipe in (magnitude, recipes.global_magnitude):
        assert not refused(broken, tmp_path, NumericError, LAYER, 0.5, recipe).exists()


def test_a_layer_of_another_shape_and_a_missing_layer(broken, tmp_path):
    with_weight(broken, LAYER, lambda w: w[:-1].clone())
    refused(broken, tmp_path, InputError, rf"{LAYER} is stored with shape \(47, 32\) instead of \(48, 32\)")
    from safetensors.torch import load_file, save_file

    path = broken / json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"][LAYER]
    tensors = load_file(path)
    tensors.pop(LAYER)
    save_file(tensors or {"other": torch.zeros(1)}, path)
    refused(broken, tmp_path, InputError, f"no weight file holds {LAYER}")


def test_a_layer_narrower_than_m(checkpoints, tmp_path):
    recipe = replace(magnitude, pattern=NM(32, 64))
    refused(
        checkpoints("llama"), tmp_path, UsageError, "q_proj: 32 input columns cannot be cut 32:64", None, recipe
    )


def test_a_full_disk_keeps_the_state(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    prune_checkpoint(source, tmp_path / "whole", 0.5)
    put, calls = output._put, []

    def full(file, at, content):
        calls.append(at)
        if len(calls) > 30:
            raise OSError(28, "No space left on device")
        put(file, at, content)

    monkeypatch.setattr(output, "_put", full)
    partial = refused(source, tmp_path, ResourceError, "no space left on the disk")
    assert partial.is_dir()
    monkeypatch.setattr(output, "_put", put)
    prune_checkpoint(source, tmp_path / "out", 0.5, if_exists="resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_slips(checkpoints, tmp_path):
    source = checkpoints("llama")
    with pytest.raises(UsageError, match="no such folder"):
        prune_checkpoint(tmp_path / "nothing", tmp_path / "out", 0.5)
    with pytest.raises(UsageError, match="lie in each other"):
        prune_checkpoint(source, source / "out", 0.5)
    refused(source, tmp_path, UsageError, "needs calibration data for input_norm", 0.5, recipes.wanda)
    refused(source, tmp_path, UsageError, "data holds no batch", 0.5, recipes.wanda, data=[])
    refused(source, tmp_path, UsageError, "data is one batch", 0.5, recipes.wanda, data={"input_ids": 1})
    refused(source, tmp_path, UsageError, "sparsity 50 is not in", 50)


def test_an_architecture_that_nobody_knows(broken, tmp_path):
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llambda"}))
    outcome = prune_checkpoint(broken, tmp_path / "out", 0.5, recipes.global_magnitude)
    assert 'model_type "llambda" is not known to transformers' in outcome.notes[0]
    names = {layer.name for layer in outcome.plan.layers}
    assert LAYER in names
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in names)
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    prune_checkpoint(broken, tmp_path / "known", 0.5, recipes.global_magnitude)
    one, other = (Masks.load(tmp_path / name / "run" / "masks.safetensors") for name in ("out", "known"))
    assert one == other
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llambda"}))
    data = [torch.zeros(1, 4, dtype=torch.long)]
    shutil.rmtree(tmp_path / "out")
    refused(
        broken, tmp_path, UsageError, "needs the model to run, but model_type", 0.5, recipes.wanda, data=data
    )
