"""best_: never worse than what it starts from, exact, deterministic; on any error the model is as before."""

import copy

import pytest
import torch
from torch import nn

from secateur import NM, best_, prune_
from secateur import best as module
from secateur.allocate import per_layer
from secateur.errors import NumericError, UsageError
from secateur.recipes import alps
from secateur.search import Judge

from .language import Tiny, ids


def sharp(blocks: int = 2) -> Tiny:
    """Predictions far from uniform, so that pruning shows."""
    model = Tiny(blocks=blocks).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def data(count: int = 24) -> list:
    return [{"input_ids": ids(count)}]


def bits(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("given", [{"sparsity": 0.5}, {"pattern": NM(2, 4)}])
@pytest.mark.thorough
def test_never_worse_than_alps_alone_on_what_judges(given):
    dense = sharp()
    fit, judged = module._dealt({"input_ids": ids()}, 0.125, 0)
    alone, model = copy.deepcopy(dense), copy.deepcopy(dense)
    recipe = module.replace(alps, pattern=given.get("pattern", alps.pattern))
    prune_(alone, given.get("sparsity"), recipe, data=[fit])
    found = best_(model, data=data(), epochs=3, **given)
    judge = Judge(dense, judged)
    assert judge(model) <= judge(alone)
    assert found.reconstructed
    assert judge(model) < 0.9 * judge(alone)
    assert judge(model) == pytest.approx(found.steps[-1].divergence, rel=1e-5)
    assert found.masks.sparsity == given.get("sparsity", 0.5)
    for name, mask in found.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    if "pattern" in given:
        assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in found.masks.values())


@pytest.mark.thorough
def test_what_was_tried_is_said():
    found = best_(sharp(), 0.7, data(12), epochs=1, only="ffn")
    names = [step.name for step in found.steps]
    assert names[-1] == "reconstruction, 1 epochs"
    for part in ("per_layer", "Slope(rise=0.1", "Slope(rise=-0.1", "OWL(", "globally"):
        assert any(part in name for name in names), names
    assert sum(step.taken for step in found.steps[:-1]) == 1
    lines = str(found).splitlines()
    assert lines[0] == f"picked {found.picked}"
    assert found.picked.startswith("wanda on Weights(), ")
    assert found.picked.endswith(", reconstructed")
    assert lines[2].startswith("  + ALPS, ")
    assert lines[2].endswith("nats a token")


@pytest.mark.thorough
def test_equal_shares_and_no_reconstruction_where_nothing_helps(monkeypatch):
    """A judge that sees no difference leaves plain ALPS, bit for bit."""
    monkeypatch.setattr(module, "Judge", lambda dense, judged: lambda model: 1.0)
    dense = sharp()
    model, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    found = best_(model, 0.6, data(), epochs=1, only="ffn")
    assert found.recipe.allocate is per_layer
    assert not found.reconstructed
    assert [step.taken for step in found.steps] == [True] + [False] * (len(found.steps) - 1)
    fit = module._dealt(data()[0], 0.125, 0)[0]
    assert prune_(alone, 0.6, alps, data=[fit], only="ffn") == found.masks
    assert same(model, bits(alone))


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bytes_and_leaves_mode_and_random_state():
    dense = sharp().train()
    state = torch.get_rng_state()
    models = [copy.deepcopy(dense) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        best_(model, data=data(12), pattern=NM(2, 4), epochs=1, seed=seed)
    assert same(models[0], bits(models[1]))
    assert not same(models[0], bits(models[2]))
    assert torch.equal(torch.get_rng_state(), state)
    assert models[0].training
    assert all(p.requires_grad and p.grad is None for p in models[0].parameters())


def test_an_exact_number_of_nonzeros():
    model = sharp()
    total = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    best_(model, nonzero=total - 1234, data=data(12), epochs=1, only="ffn")
    assert sum(int(torch.count_nonzero(p)) for p in model.parameters()) == total - 1234


@pytest.mark.thorough
def test_evolution_is_one_more_allocation():
    found = best_(sharp(), 0.5, data(12), epochs=1, evolution=True, only="ffn")
    assert sum("evolution" in step.name for step in found.steps) == 1
    assert found.masks.sparsity == pytest.approx(0.5, abs=1e-9)


def test_without_blocks_there_is_no_reconstruction():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(8, 32), nn.Linear(32, 5)

        def forward(self, x):
            return self.head(torch.relu(self.inner(x)))

    found = best_(Flat(), 0.5, [torch.randn(40, 8)])
    assert not found.reconstructed
    assert not any("reconstruction" in step.name for step in found.steps)


@pytest.mark.thorough
def test_only_what_was_chosen_is_pruned():
    model = sharp()
    before = bits(model)
    found = best_(model, 0.5, data(), epochs=1, only="ffn", skip="blocks.1.*")
    assert list(found.masks) == ["blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {f"blocks.0.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}


def test_progress_is_told():
    told = []
    best_(sharp(), 0.5, data(12), epochs=1, only="ffn", tell=lambda *step: told.append(step))
    assert ("reconstruction", 2, 2) in told
    assert all(0 <= done <= total for _, done, total in told)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 0.5}, "best needs calibration data; pass data="),
        ({"sparsity": 50, "data": data()}, r"sparsity 50 is not in \[0, 1\]"),
        ({"data": data()}, "no sparsity given"),
        (
            {"sparsity": 0.5, "data": data(1)},
            "1 sequences of calibration data with held_out=0.125 leave nothing",
        ),
        (
            {"sparsity": 0.5, "data": data(), "held_out": 1.5},
            "24 sequences of calibration data with held_out=1.5",
        ),
        ({"sparsity": 0.5, "data": []}, "data holds no batch"),
        ({"sparsity": 0.6, "data": data(), "pattern": NM(2, 4)}, "fixes the sparsity at 0.5, got 0.6"),
        ({"nonzero": 10**9, "data": data()}, "1,000,000,000 non-zero parameters cannot be reached"),
    ],
)
def test_slips_are_named(given, message):
    model = sharp()
    before = bits(model)
    with pytest.raises(UsageError, match=message):
        best_(model, **given)
    assert same(model, before)


def test_ill_weights_are_named_and_the_model_is_as_before(monkeypatch):
    model = sharp()
    with torch.no_grad():
        model.blocks[1].mlp[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"blocks\.1\.mlp\.0\.weight: NaN or Inf among its weights"):
        best_(model, 0.5, data())
    model = sharp()
    before = bits(model)

    def fail(*_, **__):
        raise NumericError("blocks.0.attn: no such luck")

    monkeypatch.setattr(module, "reconstruct_", fail)
    with pytest.raises(NumericError, match="no such luck"):
        best_(model, 0.5, data())
    assert same(model, before)
