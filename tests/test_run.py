"""The whole job: what the folder holds, that it loads elsewhere, that it is the same again, that it dies cleanly."""

from __future__ import annotations

import copy
import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from secateur import results
from secateur.core.masks import Masks
from secateur.errors import ResourceError, UsageError
from secateur.folder import verify
from secateur.manifest import write_manifest
from secateur.model import fingerprint
from secateur.prune import prune_
from secateur.request import request
from secateur.run import carry_out, check_apart, prepare, prune_to

from .tiny import OWN, Folders, digests, rewrite, text, weights

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
def models(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(text())
    return path


@pytest.fixture
def prune(tmp_path) -> Callable[..., Path]:
    """Prune to a fresh folder with few tokens, by magnitude unless said otherwise, and return the folder."""

    def run(model: object, **asked: object) -> Path:
        asked = {"method": "magnitude", "samples": 4, "evaluate_tokens": 300, **asked}
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        prune_to(prepare(request({"model": str(model), **asked}), offline=True), out)
        return out

    return run


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
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ours"] == []
    assert said["text"] == "the cat sat on the mat"
    assert said["zeros"] == 8192
    assert said["logits"][1] == 300


# Exactness


def test_the_asked_number_of_nonzeros_is_in_the_file(prune, models):
    out = prune(models["gpt2"], nonzero="20.123k", method="global-magnitude")
    assert sum(int(torch.count_nonzero(weight)) for weight in weights(out).values()) == 20_123


def test_a_threshold_cuts_what_lies_at_or_below_it(prune, models):
    out = prune(models["gpt2"], method="threshold", tau=0.05, only=["attention"])
    before, after = weights(models["gpt2"]), weights(out)
    for name, weight in before.items():
        expected = torch.where(weight.abs() <= 0.05, 0.0, weight) if _attention(name) else weight
        assert torch.equal(after[name], expected), name


@pytest.mark.thorough
def test_a_percentile_of_each_layer(prune, models):
    out = prune(models["gpt2"], method="percentile", percentile=30)
    masks = Masks.load(out / "run/masks.safetensors")
    assert masks.zeros == round(masks.size * 0.3)
    assert all(abs(float((~mask).double().mean()) - 0.3) < 1e-3 for mask in masks.values())


@pytest.mark.thorough
def test_two_of_four(prune, models):
    masks = Masks.load(prune(models["llama"], method="ria", pattern="2:4") / "run/masks.safetensors")
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks.values())


@pytest.mark.thorough
def test_blocks(prune, models):
    masks = Masks.load(prune(models["llama"], pattern="blocks:4x1", sparsity=0.75) / "run/masks.safetensors")
    assert masks.sparsity == 0.75
    for mask in masks.values():
        assert torch.isin(mask.reshape(mask.shape[0] // 4, 4, -1).sum(1), torch.tensor([0, 4])).all()


def test_rows_of_the_users_own_module(prune, own):
    out = prune(f"{own}:mlp_with_example", pattern="rows", sparsity=0.5)
    masks = Masks.load(out / "run/masks.safetensors")
    assert {name: int(mask.any(1).sum()) for name, mask in masks.items()} == {"0.weight": 16, "2.weight": 5}
    assert verify(out) == []
    assert (
        "secateur.model.load('own.py:mlp_with_example@FOLDER/model.safetensors')"
        in (out / "README.md").read_text()
    )


@pytest.mark.thorough
def test_the_files_keep_the_type_of_the_source(prune, models, own):
    out = prune(models["bf16"], method="wanda", sparsity=0.5)
    before, after = weights(models["bf16"]), weights(out)
    masks = Masks.load(out / "run/masks.safetensors")
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        kept = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight, before[name].where(kept, 0)), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in weights(prune(f"{own}:half", sparsity=0.5)).values()} == {torch.float16}


@pytest.mark.thorough
def test_files_that_mix_types_lose_nothing(prune, models, tmp_path):
    mixed = _copy(models["bf16"], tmp_path / "mixed")
    precise = torch.linspace(0.9, 1.1, 32)  # what bfloat16 cannot hold

    def change(tensors):
        tensors["model.norm.weight"] = precise

    rewrite(mixed / "model.safetensors", change)
    assert torch.equal(weights(prune(mixed, sparsity=0.5))["model.norm.weight"], precise)


@pytest.mark.thorough
def test_a_type_too_small_for_the_weights_is_told(models):
    run = prepare(request({"model": str(models["gpt2"]), "sparsity": 0.5, "dtype": "bfloat16"}), offline=True)
    assert any("rounded to torch.bfloat16; the files hold torch.float32" in note for note in run.notes)
    run = prepare(request({"model": str(models["bf16"]), "sparsity": 0.5, "dtype": "auto"}), offline=True)
    assert not any("rounded" in note for note in run.notes)


@pytest.mark.parametrize("kind", ["mixtral", "tied"])
@pytest.mark.thorough
def test_models_whose_files_name_weights_otherwise(prune, models, kind):
    from secateur.verification import problems

    only = ["lm_head", "model.embed_tokens"] if kind == "tied" else ["ffn"]
    out = prune(models[kind], sparsity=0.5, only=only)
    assert problems(out) == []


# The default method


@pytest.mark.thorough
def test_a_language_model_gets_the_best_that_was_tried_and_every_file_says_so(models, story, tmp_path):
    asked = {"model": str(models["gpt2"]), "sparsity": 0.5, "only": ["ffn"], "data": str(story)}
    asked |= {"samples": 6, "context": 16, "evaluate_tokens": 100}
    run = prepare(request(asked), offline=True)
    assert "No --method was given: best is the default for causal language models" in str(run)
    assert "note     Method best starts at this recipe, tries shares that differ by depth" in str(run)
    out = tmp_path / "out"
    result = prune_to(run, out)
    assert yaml.safe_load((out / "run/recipe.yaml").read_text()) == asked
    resolved = yaml.safe_load((out / "run/recipe.resolved.yaml").read_text())
    assert resolved["method"] == "best"
    found = resolved["resolved"]
    assert found["update"].startswith("ALPS(")
    assert {step["name"].partition(",")[0] for step in found["tried"]} <= {"ALPS", "reconstruction"}
    assert [step["taken"] for step in found["tried"]].count(True) >= 1
    assert found["allocate"] == result.applied.recipe.describe()["allocate"]
    said = f"best: {result.applied.recipe}" + (", reconstructed" if found["reconstructed"] else "")
    page = (out / "run/report.html").read_text()
    assert said in page
    assert f"Method best picked {said.removeprefix('best: ')}. Tried, with the divergence" in page
    assert said in (out / "README.md").read_text()
    assert Masks.load(out / "run/masks.safetensors").sparsity == 0.5


@pytest.mark.parametrize("given", [{}, {"data": "own.py:ids"}, {"data": "story"}])
def test_how_long_best_takes_is_said_before(models, story, tmp_path, monkeypatch, given):
    """Whatever the data come from; the time of one block, so a bound on it is all that can be said here."""
    (tmp_path / "own.py").write_text(
        "import torch\ndef ids():\n    return [{'input_ids': torch.randint(0, 50, (4, 16))} for _ in range(4)]\n"
    )
    monkeypatch.setattr("secateur.estimate.LONG", 0.0)
    data = {"own.py:ids": f"{tmp_path / 'own.py'}:ids", "story": str(story)}.get(given.get("data", ""))
    asked = {"model": str(models["gpt2"]), "pattern": "2:4", "data": data, "context": 16, "samples": 4}
    before = copy.deepcopy(
        prepare(request({**asked, "method": "magnitude", "evaluate_tokens": 300}), offline=True)
    )
    run = prepare(request({**asked, "evaluate_tokens": 300}), offline=True)
    assert "note     Method best may take about " in str(run)
    assert "Faster: --method alps, about " in str(run)
    assert same_weights(run.loaded.model, before.loaded.model)


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "OWN"])
def test_magnitude_stays_the_default_for_all_others(models, own, kind):
    model = f"{own}:mlp" if kind == "OWN" else models[kind]
    run = prepare(request({"model": str(model), "sparsity": 0.5}), offline=True)
    assert run.asked.method == "magnitude"
    assert str(run.plan).startswith("magnitude on Weights(), per_layer")
    assert run.calibration is None
    assert not any("best" in note for note in run.notes)


# Determinism


def test_threads_change_no_byte(own):
    run = prepare(request({"model": f"{own}:wide", "method": "wanda", "sparsity": 0.5, "data": f"{own}:crowd"}))
    found = []
    for threads in (1, 2):
        model = copy.deepcopy(run.loaded.model)
        torch.set_num_threads(threads)
        try:
            found.append(
                (prune_(model, 0.5, run.plan.recipe, data=run.calibration.batches()), fingerprint(model))
            )
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 2])
def test_a_seed_is_one_choice(own, seed):
    def masks(seed: int) -> Masks:
        run = prepare(request({"model": f"{own}:mlp", "method": "random", "sparsity": 0.5, "seed": seed}))
        return prune_(run.loaded.model, 0.5, run.plan.recipe, seed=seed)

    assert masks(seed) == masks(seed)
    assert masks(seed) != masks(seed + 1)


@pytest.mark.thorough
def test_the_source_is_left_alone(prune, models):
    before = digests(models["llama"])
    prune(models["llama"], method="wanda", sparsity=0.5)
    assert digests(models["llama"]) == before


# Other models


def test_a_classifier_is_judged_by_its_labels_and_by_the_dense_one(prune, models, own):
    out = prune(models["bert"], method="wanda", sparsity=0.5, labelled=f"{own}:sentences")
    found = json.loads((out / "run/metrics.json").read_text())
    assert {"accuracy", "f1", "macs"} <= {m["name"] for m in found["dense"]}
    agreement = next(m for m in found["pruned"] if m["name"] == "top1_agreement")
    assert agreement["conditions"]["dataset"] == "own.py:sentences"
    assert "No --data was given, so the batches of --labelled served" in (out / "run/report.html").read_text()


def test_images_come_as_mappings_in_pairs(prune, models, own):
    out = prune(models["vit"], method="wanda", sparsity=0.5, labelled=f"{own}:pictures")
    assert Masks.load(out / "run/masks.safetensors").sparsity == 0.5


@pytest.mark.thorough
def test_an_encoder_decoder_reads_the_calibration_text_on_both_sides(prune, models, story):
    out = prune(models["t5"], method="wanda", sparsity=0.5, data=str(story), context=16)
    layers = json.loads((out / "run/layers.json").read_text())
    assert any(".EncDecAttention." in layer["name"] and layer.get("pruned") for layer in layers)
    found = json.loads((out / "run/metrics.json").read_text())
    assert "perplexity" not in {m["name"] for m in found["dense"]}


def test_a_network_of_the_users_own_with_weight_updates(prune, own):
    out = prune(f"{own}:cnn", method="sparsegpt", sparsity=0.5, data=f"{own}:images")
    assert Masks.load(out / "run/masks.safetensors").sparsity == 0.5


def test_pruning_on_from_a_pruned_file(prune, own):
    first = prune(f"{own}:cnn", sparsity=0.3)
    second = prune(f"{own}:cnn@{first / 'model.safetensors'}", sparsity=0.6)
    assert not (
        Masks.load(second / "run/masks.safetensors")["0.weight"] & (weights(first)["0.weight"] == 0)
    ).any()


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
            "cannot be run on the calibration data",
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
    _copy(models["gpt2"], shown)
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
        cwd=tmp_path, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    found = other.state_dict()
    return all(torch.equal(value, found[name]) for name, value in one.state_dict().items())


def _attention(name: str) -> bool:
    return ".attn.c_" in name and name.endswith("weight")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def _copy(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def test_carrying_out_needs_only_a_folder(own, tmp_path):
    """`prune_to` is `carry_out` in a new folder; a caller may bring a folder of another kind."""
    carry_out(prepare(request({"model": f"{own}:mlp", "sparsity": 0.5})), tmp_path)
    write_manifest(tmp_path)
    assert verify(tmp_path) == []
