"""Whole units from the command line: what goes is whole, what is left is smaller, what cannot be is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from secateur import Masks, TakeOver, flap, mend_units_, prune_, undo_
from secateur.core.example import analysis_of
from secateur.core.unit_masks import keep_of
from secateur.errors import UsageError
from secateur.model import load
from secateur.pattern import Neurons
from secateur.recipes import Recipe, inactive

from .tiny import OWN, weights

pytest.importorskip("transformers")
pytest.importorskip("plotly")

MORE = """
class Moods(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x if x.sum() > 0 else -x)

def moods():
    return Moods(), torch.randn(4, 16)

class Whim(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        return x @ self.weight.T if x.sum() > 0 else -x

def whim():
    return Whim(), torch.randn(4, 16)

def normed():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN + MORE)
    return path


def of(found: dict, variant: str, name: str) -> float:
    return next(m["value"] for m in found["measurements"][variant] if m["name"] == name)


@pytest.mark.thorough
def test_heads_and_neurons_go_whole_and_the_smaller_model_is_measured(models, story, secateur, tmp_path):
    out = tmp_path / "out"
    given = ("--pattern", "heads,neurons", "--target", "0.8 parameters", "--data", story, "--samples", 4)
    size = ("--context", 32, "--evaluate-tokens", 200, "--multiple", 4)
    said = secateur("prune", models["gpt2"], *given, *size, "--out", out, "--offline", "--json")
    assert said.code == 0, said.err
    found = said.json
    assert of(found, "shrunk", "parameters") == pytest.approx(0.8 * of(found, "dense", "parameters"), rel=0.02)
    assert of(found, "shrunk", "nonzeros") == of(found, "pruned", "nonzeros")
    assert of(found, "pruned", "parameters") == of(found, "dense", "parameters")
    assert of(found, "shrunk", "macs") < of(found, "dense", "macs")

    masks = Masks.load(out / "run/masks.safetensors")
    dense = load(str(models["gpt2"]), offline=True).model
    analysis, _ = analysis_of(dense, {"input_ids": torch.arange(1, 9)[None]})
    keep = keep_of(analysis, masks)  # raises where a unit is not whole
    resolved = yaml.safe_load((out / "run/recipe.resolved.yaml").read_text())
    assert resolved["pattern"] == "heads,neurons"
    assert {n: len(k) for n, k in keep.items()} == {
        n: left for n, (left, size) in resolved["resolved"]["units left"].items() if left < size
    }
    assert all(len(k) % 4 == 0 for n, k in keep.items() if analysis[n].kind == "feed-forward unit")
    for name, weight in weights(out).items():
        if name in masks:
            assert not weight[~masks[name]].any(), name
    assert secateur("verify", out).code == 0
    report = (out / "run/report.html").read_text()
    assert "is the default for whole units" in report
    assert "Taken out: " in report


def test_what_a_cnn_is_not_told_by_its_plan_alone(own, secateur, tmp_path):
    given = ("--pattern", "channels", "--data", f"{own}:images", "--labelled", f"{own}:images", "--out")
    said = secateur("prune", f"{own}:normed", "--sparsity", 0.5, *given, tmp_path / "out")
    assert said.code == 0, said.err
    assert said.out.count("No --method was given") == 1
    crossing = (
        "note     Axes cross, and a weight counts on each that it lies on: at sparsity 0.5 of these weights"
    )
    assert said.out.count(crossing) == 1
    assert "--target says what is to be left, as in '0.5 parameters'" in said.out
    idle = (
        "note     Mending by biases: 1 of 2 layers that lost inputs have no bias to take their means, 3.weight first, "
        "and stay as they were; --mend least-squares refits their weights."
    )
    assert said.out.count(idle) == 1
    assert said.out.count("disk bytes") == 1
    more = ("--mend", "least-squares", *given)
    said = secateur("prune", f"{own}:normed", "--target", "0.7 parameters", *more, tmp_path / "better")
    assert "Axes cross" not in said.out
    assert "Mending by" not in said.out


@pytest.mark.thorough
def test_channels_by_taylor_learn_from_the_labels(own, secateur, tmp_path):
    given = ("--pattern", "channels", "--method", "taylor", "--sparsity", 0.4, "--labelled", f"{own}:images")
    said = secateur("prune", f"{own}:cnn", *given, "--out", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert of(said.json, "shrunk", "parameters") == of(said.json, "pruned", "nonzeros")
    assert of(said.json, "shrunk", "parameters") < of(said.json, "dense", "parameters")


def test_activation_pruning_takes_out_the_neurons_at_most_lambda(own, secateur, tmp_path):
    model, tau = load(f"{own}:mlp").model, 0.25
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    loud = torch.cat([model[:2](x) for x in batches]).abs().mean(0)
    pruned = deepcopy(model)
    masks = prune_(pruned, recipe=inactive(tau), data=batches)
    alive = masks["0.weight"].any(1)
    assert torch.equal(alive, loud > tau)
    assert 0 < int(alive.sum()) < 32
    given = ("--method", "activation", "--threshold", tau, "--data", f"{own}:rows", "--dry-run")
    said = secateur("prune", f"{own}:mlp_with_example", *given)
    assert "activation on Neurons(), Threshold(tau=0.25, relative=False): 1 axis" in said.out
    assert "as much as the threshold says" in said.out


@pytest.mark.thorough
def test_the_size_of_weights_is_no_judge_of_heads(models, secateur):
    given = ("--pattern", "heads", "--sparsity", 0.5, "--dry-run", "--offline", "--evaluate-tokens", 100)
    assert "poor judge of heads and neurons" in secateur("prune", models["gpt2"], "--method", "l2", *given).out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("mlp", "--target", "0.01 parameters"), "0.0423 to 1.0000 can be reached in whole units"),
        (("mlp", "--target", "0.5 parsecs"), "target '0.5 parsecs' is not understood"),
        (("mlp", "--sparsity", 0.5, "--minimum", 99), "minimum=99 is more than its 32 units"),
        (("shared", "--sparsity", 0.5, "--pattern", "heads"), "the model has no axis of kind head or KV group"),
    ],
)
def test_what_cannot_be_met_is_said_in_one_line(own, secateur, tmp_path, given, words):
    name, *rest = given
    pattern = () if "--pattern" in rest else ("--pattern", "neurons")
    data = ("--data", f"{own}:rows", "--out", tmp_path / "out")
    assert words in secateur.refused(2, "prune", f"{own}:{name}", *rest, *pattern, *data)
    assert not (tmp_path / "out").exists()


def test_without_an_input_nothing_can_be_followed(own, secateur, tmp_path):
    given = ("--pattern", "neurons", "--method", "l2", "--sparsity", 0.5, "--out", tmp_path / "out")
    assert "no input is known; give --data" in secateur.refused(2, "prune", f"{own}:mlp", *given)


# inspect --axes


@pytest.mark.thorough
def test_every_axis_in_words(models, secateur):
    said = secateur("inspect", models["gpt2"], "--axes", "--offline")
    assert said.code == 0
    assert "4 heads of transformer.h.0.attn: transformer.h.0.attn.c_attn.weight[1]" in said.out
    assert "approximate: mean and variance over" in said.out
    assert "frozen, rows are chosen by index (aten.embedding at transformer.wte)" in said.out
    assert "prunable axes: 1 of kind hidden with 32 units, 2 of kind head with 8 units" in said.out
    found = secateur("inspect", models["gpt2"], "--axes", "--offline", "--json").json
    head = next(axis for axis in found["axes"] if axis["kind"] == "head")
    assert (head["size"], head["exact"]) == (4, True)
    assert head["members"][0] == {
        "name": "transformer.h.0.attn.c_attn.weight",
        "dim": 1,
        "width": 24,
        "tied": [],
    }
    assert head["parameters of a unit"] == 32 * 24 + 24 + 8 * 32
    assert any("aten.embedding" in frozen["reason"] for frozen in found["frozen"])


@pytest.mark.thorough
def test_images_of_the_configs_size_serve_where_nothing_else_is_known(models, secateur):
    assert "of kind head with" in secateur("inspect", models["vit"], "--axes", "--offline").out


def test_a_model_that_cannot_be_exported_is_taken_apart(own, secateur):
    said = secateur("inspect", f"{own}:moods", "--axes")
    assert said.code == 0, said.err
    assert "not exported as a whole, so its parts were, their borders frozen" in said.out
    assert "first:\n12 feed-forward units of 0,2" in said.out
    found = secateur("inspect", f"{own}:moods", "--axes", "--json").json
    assert [member["name"] for member in found["axes"][0]["members"]] == [
        "first.0.weight", "first.0.bias", "first.2.weight",
    ]  # fmt: skip
    assert found["taken apart"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("whim", "--axes"), "Nor can its parts: Whim: none of its submodules can be analysed"),
        (("mlp", "--axes"), "nothing says what it takes; give --data file.py:function"),
        (("mlp", "--axes", "--data", "story.txt"), "axes need one input, not text"),
        (("mlp", "--axes", "--sensitivity"), "--axes and --sensitivity are two analyses"),
    ],
)
def test_what_cannot_be_inspected_is_refused(own, secateur, given, words):
    assert words in secateur.refused(2, "inspect", f"{own}:{given[0]}", *given[1:])


# the update of a recipe on whole units

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("how", ["bias", "least-squares"])
def test_a_recipe_mends_as_the_function_does_and_can_be_undone(how):
    recipe = Recipe(flap.score, Neurons(), flap.allocate, TakeOver(how))
    plain = Recipe(flap.score, Neurons(), flap.allocate)
    one, other, dense = net(), net(), net()
    masks = prune_(one, 0.4, recipe, data=[X], keep_originals=True)
    assert masks == prune_(deepcopy(dense), 0.4, plain, data=[X])
    mend_units_(other, masks, [X], how=how)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    masked = net()
    masks.apply_(masked)
    wanted = dense(X)
    assert (one(X) - wanted).square().sum() < (masked(X) - wanted).square().sum()
    undo_(one, masks)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), dense.parameters(), strict=True))


def test_nothing_asked_is_nothing_changed():
    model = net()
    prune_(model, 0.0, Recipe(flap.score, Neurons(), update=TakeOver()), data=[X])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TakeOver(damping=-1.0), "damping is -1.0; expected at least 0"),
        (
            lambda: prune_(net(), 0.5, Recipe(flap.score, update=TakeOver()), data=[X]),
            "mends what whole units leave",
        ),
        (
            lambda: prune_(net(), 0.5, Recipe(inactive(0.0).score, Neurons(), update=TakeOver()), example=X),
            "needs calibration data; pass data=",
        ),
    ],
)
def test_an_update_that_does_not_fit_is_refused(make, words):
    with pytest.raises(UsageError) as told:
        make()
    assert words in str(told.value)
