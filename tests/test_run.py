"""The whole job: what the folder holds, that it loads elsewhere, that it runs again to the same bytes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from secateur.core.masks import Masks
from secateur.folder import verify
from secateur.request import request
from secateur.run import prepare, prune_to

from .running import environment
from .tiny import digests, weights

pytest.importorskip("transformers")
pytest.importorskip("plotly")

FILES = {
    "MANIFEST.sha256",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "run/layers.json",
    "run/masks.safetensors",
    "run/metrics.json",
    "run/recipe.resolved.yaml",
    "run/recipe.yaml",
    "run/report.html",
    "run/results.csv",
    "run/run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def finished(models, story, tmp_path_factory) -> Path:
    """A run of GPT-2 by Wanda on its feed-forward layers."""
    place = tmp_path_factory.mktemp("finished")
    asked = {"model": str(models["gpt2"]), "method": "wanda", "sparsity": 0.5, "only": ["ffn"]}
    asked |= {"data": str(story), "samples": 6, "context": 32, "evaluate_tokens": 300}
    prune_to(prepare(request(asked), offline=True), place / "out")
    return place / "out"


# What the folder holds


def test_the_folder_has_the_files_of_the_design_and_no_other(finished):
    assert set(digests(finished)) == FILES
    assert verify(finished) == []
    assert sorted(path.name for path in finished.parent.iterdir()) == ["out"]


def test_exactly_half_of_each_feed_forward_row_is_zero_and_nothing_else_changed(finished, models):
    before, after, masks = (
        weights(models["gpt2"]),
        weights(finished),
        Masks.load(finished / "run/masks.safetensors"),
    )
    assert list(masks) == [
        f"transformer.h.{i}.mlp.{name}.weight" for i in (0, 1) for name in ("c_fc", "c_proj")
    ]
    assert masks.sparsity == 0.5
    assert after.keys() == before.keys()
    for name, weight in after.items():
        kept = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight.view(torch.int32), before[name].view(torch.int32) * kept), name
    for mask in masks.values():
        assert (mask.sum(0) * 2 == mask.shape[0]).all()  # Conv1D is stored (in, out): each output keeps half


def test_every_layer_is_listed_with_its_count_or_its_reason(finished):
    layers = json.loads((finished / "run/layers.json").read_text())
    assert [layer["pruned"] for layer in layers[:4]] == [2048] * 4
    assert {layer["role"] for layer in layers[:4]} == {"ffn"}
    left = {layer["name"]: layer["left out"] for layer in layers[4:]}
    assert "transformer.h.0.attn.c_attn.weight" in left
    assert left["transformer.h.0.attn.c_attn.weight"] == 'not selected by only=["ffn"]'


def test_measurements_come_in_pairs_with_their_conditions(finished):
    found = json.loads((finished / "run/metrics.json").read_text())
    dense, pruned = ({m["name"]: m for m in found[variant]} for variant in ("dense", "pruned"))
    both = {
        "perplexity",
        "parameters",
        "nonzeros",
        "state_bytes",
        "macs",
        "effective_macs",
        "latency",
        "disk_bytes",
    }
    assert set(dense) == both
    assert set(pruned) == both | {"kl_divergence", "top1_agreement", "speedup"}
    assert dense["nonzeros"]["value"] - pruned["nonzeros"]["value"] == 8192
    assert pruned["perplexity"]["value"] != dense["perplexity"]["value"]
    assert pruned["perplexity"]["conditions"]["dataset"] == "held-out fifth of story.txt"
    assert pruned["disk_bytes"]["value"] == (finished / "model.safetensors").stat().st_size
    rows = list(csv.DictReader(io.StringIO((finished / "run/results.csv").read_text())))
    assert len(rows) == len(found["dense"]) + len(found["pruned"])
    assert {row["variant"] for row in rows} == {"dense", "pruned"}
    assert float(rows[0]["value"]) == dense["perplexity"]["value"]


def test_the_recipe_runs_again_to_the_same_bytes(finished, tmp_path):
    asked = request(yaml.safe_load((finished / "run/recipe.yaml").read_text()))
    prune_to(prepare(asked, offline=True), tmp_path / "again")
    assert Masks.load(tmp_path / "again/run/masks.safetensors") == Masks.load(
        finished / "run/masks.safetensors"
    )
    first, second = digests(finished), digests(tmp_path / "again")
    varying = {
        "MANIFEST.sha256",
        "README.md",
        "run/metrics.json",
        "run/results.csv",
        "run/run.json",
        "run/report.html",
    }
    # the order of two entries in the masks' header changes from process to process
    assert {name for name in first if first[name] != second[name]} <= varying | {"run/masks.safetensors"}
    circumstances = [
        json.loads((folder / "run/run.json").read_text()) for folder in (finished, tmp_path / "again")
    ]
    assert circumstances[0]["inputs"] == circumstances[1]["inputs"]


@pytest.mark.thorough
def test_channels_are_put_in_order_first_where_that_is_asked(prune, models, story):
    asked = {
        "method": "ria",
        "pattern": "2:4",
        "data": str(story),
        "samples": 4,
        "context": 16,
        "only": ["ffn"],
    }
    folder = prune(models["gpt2"], permute=True, **asked)
    resolved = yaml.safe_load((folder / "run/recipe.resolved.yaml").read_text())
    assert resolved["permute"] is True
    assert "input channels put in order on 2 axes" in (folder / "run/report.html").read_text()
    name = "transformer.h.0.mlp.c_fc.weight"
    kept, dense = weights(folder)[name], weights(models["gpt2"])[name]
    assert not set(kept[kept != 0].tolist()) - set(dense.flatten().tolist())
    assert not torch.equal(kept, torch.where(kept != 0, dense, 0))  # columns of c_fc stand elsewhere


def test_two_texts_are_mixed_and_both_are_held_out(prune, models, story, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "other.txt"
    other.write_text(story.read_text()[::-1])
    asked = {"model": str(models["gpt2"]), "method": "wanda", "sparsity": 0.5, "data": f"{story}:0.75,{other}"}
    run = prepare(request({**asked, "samples": 8, "context": 16, "evaluate_tokens": 100}), offline=True)
    assert run.calibration.name == (
        "6 windows (96 tokens) of story.txt and 2 windows (32 tokens) of other.txt, at most 16 tokens each"
    )
    assert run.calibration.tokens == 128
    assert run.by.text_name == "held-out fifth of 75% story.txt and 25% other.txt"
    assert len(run.by.text) == 100
    assert len(run.calibration.batches()) == 8


def test_the_resolved_recipe_says_every_default(finished, models):
    resolved = yaml.safe_load((finished / "run/recipe.resolved.yaml").read_text())
    assert resolved["resolved"]["score"] == "wanda"
    assert resolved["resolved"]["allocate"] == "per_row"
    assert resolved["resolved"]["weights kept"] == 8192
    assert resolved["seed"] == 0
    assert resolved["dtype"] == "float32"
    assert set(request({"model": "m"}).model_dump()) < set(resolved)


def test_versions_and_the_digests_of_what_went_in(finished, models, story):
    said = json.loads((finished / "run/run.json").read_text())
    assert said["packages"]["torch"] == torch.__version__
    assert said["inputs"]["model.safetensors"] == digests(models["gpt2"])["model.safetensors"]
    assert {"calibration data", "text judged by", "tokenizer.json", "config.json"} <= set(said["inputs"])
    assert set(said["seconds"]) == {"measure dense", "prune", "measure pruned", "latency"}


def test_no_path_of_this_machine_but_in_the_recipe(finished, models, story):
    for path in finished.rglob("*"):
        if path.is_file() and path.name != "recipe.yaml":
            content = path.read_bytes()
            for place in (models.root, story.parent, finished.parent, Path.home()):
                assert os.fsencode(place) not in content, (path, place)
    recipe = yaml.safe_load((finished / "run/recipe.yaml").read_text())
    assert recipe["model"] == str(models["gpt2"])


def test_the_card_says_what_was_done_and_how_to_load_it(finished):
    card = (finished / "README.md").read_text()
    assert card.startswith("# `gpt2`, pruned\n\n8,192 of 16,384 weights in 4 layers are zero (sparsity 0.5000")
    assert "`GPT2LMHeadModel.from_pretrained(folder)`" in card
    assert card.count("\n| perplexity | ") == 1


@pytest.mark.thorough
def test_stock_transformers_in_a_fresh_process_load_it(finished):
    """Plain `from_pretrained`, nothing of ours imported; the zeros are where the masks say, read by hand."""
    code = """
import json, struct, sys, numpy, torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
parameters = dict(model.named_parameters())
with safe_open(f"{folder}/run/masks.safetensors", "np") as file:
    shapes = json.loads(file.metadata()["shapes"])
    for name in file.keys():
        bits = numpy.unpackbits(file.get_tensor(name))[: numpy.prod(shapes[name])].reshape(shapes[name])
        assert ((parameters[name].detach().numpy() != 0) == bits.astype(bool)).all(), name
ids = tokenizer("the cat sat on the mat", return_tensors="pt").input_ids
print(json.dumps({
    "ours": [name for name in sys.modules if "secateur" in name],
    "text": tokenizer.decode(ids[0]),
    "zeros": sum(int((p == 0).sum()) for name, p in parameters.items() if name in shapes),
    "logits": list(model(ids).logits.shape[1:]),
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ours"] == []
    assert said["text"] == "the cat sat on the mat"
    assert said["zeros"] == 8192
    assert said["logits"][1] == 300


# Real data


@pytest.mark.shared
@pytest.mark.thorough
def test_a_trained_model_loses_as_much_as_is_known(shared, tmp_path):
    model, stories = shared / "models/stories260K", shared / "data/lm/tinystories_test.txt"
    if not (model.is_dir() and stories.is_file()):
        pytest.skip("stories260K or the TinyStories text is not in ../shared")
    asked = {
        "model": str(model),
        "method": "wanda",
        "sparsity": 0.5,
        "only": ["ffn"],
        "samples": 16,
        "context": 128,
    }
    asked |= {"data": str(stories), "evaluate": str(stories), "evaluate_tokens": 8192}
    result = prune_to(prepare(request(asked), offline=True), tmp_path / "out")
    dense, pruned = (
        next(m.value for m in result.measurements[name] if m.name == "perplexity")
        for name in ("dense", "pruned")
    )
    assert 3 < dense < 4.5  # 3.67 on whole stories
    assert dense < pruned < 4 * dense
    assert verify(tmp_path / "out") == []
