"""Rewinding gives back every bit of the start but the pruned ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur import Masks, prune_, rewind_
from secateur.errors import UsageError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(16, 6)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["state", "model", "compiled"])
def test_everything_is_as_it_was_but_the_pruned(kind):
    model = network()
    state = copy.deepcopy(model.state_dict())
    start = copy.deepcopy(model) if kind == "model" else state
    train(model)
    masks = prune_(model, 0.5)
    if kind == "compiled":
        rewind_(torch.compile(model, backend="eager"), start, masks)
    else:
        assert rewind_(model, start, masks) is model
    for name, tensor in model.state_dict().items():
        expected = state[name] * masks[name] if name in masks else state[name]
        assert torch.equal(tensor, expected), name
        assert tensor.dtype == state[name].dtype
    for name, mask in masks.items():
        assert not model.state_dict()[name].view(torch.int32)[~mask].any()


def test_without_masks_it_is_the_start():
    model = network()
    start = copy.deepcopy(model.state_dict())
    train(model)
    rewind_(model, start)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in start.items())


def test_a_start_that_is_no_copy_is_refused():
    """The commonest slip: state_dict() gives the weights themselves, which training then changes."""
    model = network()
    start = model.state_dict()
    train(model)
    with pytest.raises(UsageError, match=r"0\.weight: the start is the model's own memory.*copy\.deepcopy"):
        rewind_(model, start)
    with pytest.raises(UsageError, match="own memory"):
        rewind_(model, model)


def test_starts_and_masks_of_another_model_change_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    start = copy.deepcopy(network().state_dict())
    with pytest.raises(
        UsageError, match=r"the start has no 3\.bias; it belongs to another model; nearest: 1\.bias"
    ):
        rewind_(model, {name: tensor for name, tensor in start.items() if name != "3.bias"})
    with pytest.raises(UsageError, match=r"3\.bias: the start has shape \(4,\), the model \(3,\)"):
        rewind_(model, start | {"3.bias": torch.zeros(4)})
    with pytest.raises(UsageError, match="the model has no parameter x; these masks belong to another model"):
        rewind_(model, start, Masks({"x": torch.ones(1, dtype=torch.bool)}))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
