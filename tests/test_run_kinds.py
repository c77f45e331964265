"""Runs by every pattern, of every kind of model: exact counts, types, defaults, the same again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml

from secateur.core.masks import Masks
from secateur.folder import verify
from secateur.model import fingerprint
from secateur.prune import prune_
from secateur.request import request
from secateur.run import prepare, prune_to

from .running import copied, is_attention, same_weights
from .tiny import digests, rewrite, weights

pytest.importorskip("transformers")
pytest.importorskip("plotly")


# Exactness


def test_the_asked_number_of_nonzeros_is_in_the_file(prune, models):
    out = prune(models["gpt2"], nonzero="20.123k", method="global-magnitude")
    assert sum(int(torch.count_nonzero(weight)) for weight in weights(out).values()) == 20_123


def test_a_threshold_cuts_what_lies_at_or_below_it(prune, models):
    out = prune(models["gpt2"], method="threshold", tau=0.05, only=["attention"])
    before, after = weights(models["gpt2"]), weights(out)
    for name, weight in before.items():
        expected = torch.where(weight.abs() <= 0.05, 0.0, weight) if is_attention(name) else weight
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


def test_the_default_of_other_models_is_said_with_what_keeps_more(own):
    asked = {"model": f"{own}:mlp_with_example", "sparsity": 0.5}
    note = "No --method was given: magnitude is the default for what is no causal language model."
    assert str(prepare(request(asked), offline=True)).count(note) == 1
    assert note not in str(prepare(request({**asked, "method": "magnitude"}), offline=True))


def test_a_computed_weight_is_listed_and_not_warned_of(prune, tmp_path):
    code = tmp_path / "normed.py"
    code.write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    out = prune(f"{code}:build", sparsity=0.5, method="magnitude")  # warnings are errors here
    assert (
        "Left as they are: 0.weight: is computed from other parameters" in (out / "run/report.html").read_text()
    )
    assert [each["name"] for each in json.loads((out / "run/layers.json").read_text())] == [
        "2.weight",
        "0.weight",
    ]


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
    mixed = copied(models["bf16"], tmp_path / "mixed")
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


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, marks=pytest.mark.thorough),
        pytest.param({"data": "own.py:ids"}, marks=pytest.mark.thorough),
        {"data": "story"},
    ],
)
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
