"""Training on rounded weights: what is computed is what the integers will compute, and zeros stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import finetune_, prune_
from secateur.core.where import layers
from secateur.deploy.aware import fake_quantize_
from secateur.deploy.grid import from_grid, to_grid
from secateur.errors import NumericError, UsageError

from .mixed import Mixed, Tied


def rounded_by_hand(model, bits=8, group=None):
    """A copy with every weight on the grid that `to_grid` chooses."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(other):
            grid = to_grid(layer.layout.to_matrices(layer.weight).float(), bits, group)
            layer.weight.copy_(layer.layout.from_matrices(from_grid(grid)))
    return other


@pytest.mark.parametrize("make", [Mixed, Tied])
def test_it_computes_what_the_rounded_weights_compute_and_goes_without_a_trace(make):
    model, ids = make().eval(), torch.randint(0, 20, (2, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = rounded_by_hand(model)
    with fake_quantize_(model) as rounded:
        assert torch.equal(model(ids), other(ids))
        assert set(rounded.names) == {name for layer in layers(other) for name in (layer.name, *layer.tied)}
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    if make is Tied:
        assert model.head.weight is model.table.weight
    rounded.remove()


def test_the_gradient_passes_straight_through():
    model = nn.Linear(6, 3)
    inputs = torch.randn(4, 6)
    with fake_quantize_(model, "int4") as rounded:
        model(inputs).square().sum().backward()
        weight = dict(model.named_parameters())["parametrizations.weight.original"]
        found = weight.grad.clone()
        used = model.weight.detach().clone().requires_grad_()
    F.linear(inputs, used, model.bias).square().sum().backward()
    assert rounded.names == ("weight",)
    assert torch.allclose(found, used.grad)


def test_training_helps_the_rounded_model_and_keeps_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    data = [(x := torch.randn(16, 8), (x[:, :3] ** 2).argmax(1)) for _ in range(20)]
    finetune_(model, data, epochs=6, lr=1e-2)
    masks = prune_(model, 0.5)

    def loss():
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) for x, y in data)

    with fake_quantize_(model, "int4", outer="int4") as rounded:
        first = loss()
        finetune_(model, data, rounded.masks(masks), epochs=4, lr=3e-3)
        assert loss() < first
        for name, mask in masks.items():
            assert not model.get_submodule(name.rpartition(".")[0]).weight[~mask].any()
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].view(torch.int32).any()


def test_what_is_refused():
    model = nn.Sequential(nn.Linear(8, 4))
    with fake_quantize_(model), pytest.raises(UsageError, match="rounded already"):
        fake_quantize_(model)
    with pytest.raises(UsageError, match="scheme 'int5' is not known"):
        fake_quantize_(model, "int5")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"0\.weight: NaN or Inf"):
        fake_quantize_(model)
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
