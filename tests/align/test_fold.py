from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import align
from secateur.align.fold import fold_layer_
from secateur.errors import UsageError

from .test_fits import cloud


def network(out: int = 4, *, bias: bool = True, tail: nn.Module | None = None) -> nn.Module:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, out, bias=bias)]
    return nn.Sequential(*layers, *([tail] if tail else [])).double()


@given(st.integers(0, 99), st.integers(1, 9), st.booleans())
def test_the_folded_model_is_the_model_and_the_map(seed, width, bias):
    torch.manual_seed(seed)
    model, x = network(bias=bias), cloud(20, 6, seed)
    map = align.ridge(model(x).detach(), cloud(20, width, seed + 1))
    wanted = map(model(x))
    assert align.fold_(model, map, x) == "2"
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    assert model[2].out_features == width
    assert model[2].weight.requires_grad
    assert model.training


def test_folding_in_single_and_half_precision_is_exact_to_its_rounding():
    for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        model, x = network().to(dtype), cloud(50, 6).to(dtype)
        map = align.ridge(model(x).detach(), cloud(50, 5, 1))
        wanted = map(model(x).detach().double())
        align.fold_(model, map, x)
        assert model[2].weight.dtype == dtype
        assert float((model(x).detach() - wanted).abs().max() / wanted.abs().max()) < close


class Pooled(nn.Module):
    """A linear layer on every token, then their mean: linear as a whole."""

    def __init__(self, norm: bool):
        super().__init__()
        self.last, self.drop = nn.Linear(6, 4), nn.Dropout(0.5)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, tokens):
        return self.norm(self.drop(self.last(tokens))).mean(1)


def test_what_commutes_with_a_linear_map_may_stand_behind_the_layer():
    x = torch.randn(10, 7, 6)
    model = Pooled(norm=False)
    map = align.ridge(model.eval()(x).detach(), cloud(10, 3))
    wanted = map(model(x))
    assert align.fold_(model, map, {"tokens": x}) == "last"
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_layer_with_something_behind_it_is_refused_and_the_model_as_it_was():
    for model in (network(tail=nn.Tanh()), network(tail=nn.LayerNorm(4)).double(), Pooled(norm=True)):
        x = torch.randn(10, 7, 6) if isinstance(model, Pooled) else cloud(10, 6)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        output = model.eval()(x)
        map = align.ridge(output.detach(), cloud(10, 4))
        with pytest.raises(UsageError, match="something that is not linear stands between") as told:
            align.fold_(model, map, x)
        assert "Store the map beside the checkpoint instead: align.save(map, path)" in str(told.value)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        torch.testing.assert_close(model(x), output)
    model = network(tail=nn.Tanh())
    wide = align.ridge(model(cloud(10, 6)).detach(), cloud(10, 5))  # the width alone would break a residual
    with pytest.raises(UsageError, match="not linear"):
        align.fold_(model, wide, cloud(10, 6))
    assert model[2].out_features == 4


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.layer.weight = self.table.weight

    def forward(self, x):
        return self.layer(x)


def test_layers_that_serve_elsewhere_too_are_refused():
    x = torch.randn(10, 6)
    with pytest.raises(
        UsageError, match=r"layer: the map cannot be folded .* the model runs it more than once"
    ):
        align.fold_(Twice(), align.procrustes(x, x + 1), x)
    model = Tied()
    map = align.ridge(model(x).detach(), torch.randn(10, 9))
    with pytest.raises(UsageError, match=r"its weight is shared by table\.weight, layer\.weight"):
        align.fold_(model, map, x)
    with pytest.raises(UsageError, match="no linear layer that computes"):
        align.fold_(nn.ReLU(), align.procrustes(x, x + 1), x)
    with pytest.raises(UsageError, match=r"gives shape \(10, 4\), and the map takes one vector of width 6"):
        align.fold_(network().float(), align.procrustes(x, x + 1), x)
    with pytest.raises(UsageError, match="the layer computes 8 numbers and the map takes 6"):
        fold_layer_(nn.Linear(6, 8), align.procrustes(x, x + 1))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network().float()

    def forward(self, x):
        return {"vector": self.inner(x)}


def test_a_model_that_gives_no_tensor_needs_to_say_where_the_vector_is():
    model, x = Named(), torch.randn(10, 6)
    map = align.ridge(model(x)["vector"].detach(), torch.randn(10, 4))
    with pytest.raises(UsageError, match="the model returned dict; pass embed="):
        align.fold_(model, map, (x,))
    wanted = map(model(x)["vector"])
    assert align.fold_(model, map, x, embed=lambda model, x: model(x)["vector"]) == "inner.2"
    torch.testing.assert_close(model(x)["vector"], wanted, rtol=1e-5, atol=1e-6)
