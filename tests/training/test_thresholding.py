"""Every step zeroes |w| <= tau, exactly; what may come back does, what may not never does."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import Thresholding
from secateur.errors import NumericError, UsageError

from .support import loss_of, network, train


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


@given(tau=st.floats(0, 0.3), regrow=st.booleans(), with_optimizer=st.booleans())
@settings(max_examples=8)
def test_every_step_zeroes_just_what_is_small(tau, regrow, with_optimizer):
    model = network()
    optimizer = sgd(model)
    held = optimizer if with_optimizer and not regrow else None
    pruner = Thresholding(model, tau, regrow=regrow, optimizer=held)
    ever = {}
    for seed in range(5):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        before = weights(model)
        pruner.step()
        for name, weight in weights(model).items():
            small = before[name].abs() <= tau
            ever[name] = small if regrow else small | ever.get(name, torch.zeros_like(small))
            assert torch.equal(weight, torch.where(ever[name], 0.0, before[name]))
            assert not weight.view(torch.int32)[ever[name]].any()
            assert torch.equal(pruner.masks[name], ~ever[name])


def test_what_may_come_back_comes_back_and_what_may_not_does_not():
    for regrow in (True, False):
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.01, 1.0]]))
        pruner = Thresholding(model, 0.05, regrow=regrow)
        pruner.step()
        assert model.weight[0, 0] == 0
        with torch.no_grad():
            model.weight[0, 0] = 0.5
        pruner.step()
        assert model.weight[0, 0] == (0.5 if regrow else 0.0)
        assert pruner.masks["weight"].tolist() == [[regrow, True]]


def test_zeros_are_held_right_after_the_optimizer():
    model = network()
    optimizer = sgd(model)
    pruner = Thresholding(model, 0.1, optimizer=optimizer)
    pruner.step()
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        assert all(not weight[~pruner.masks[name]].any() for name, weight in weights(model).items())


@given(q=st.floats(0, 100), regrow=st.booleans())
@settings(max_examples=8)
def test_a_percentile_is_counted_exactly(q, regrow):
    model = network()
    pruner = Thresholding(model, percentile=q, regrow=regrow)
    optimizer = sgd(model)
    for step in range(3):
        train(model, optimizer, pruner, 1, step)
        for name, weight in weights(model).items():
            assert (~pruner.masks[name]).sum() == round(weight.numel() * q / 100)
            assert not weight[~pruner.masks[name]].any()


def test_ties_at_a_percentile_are_broken_by_position():
    model = nn.Linear(4, 2, bias=False)
    nn.init.constant_(model.weight, 0.5)
    Thresholding(model, percentile=50).step()
    assert model.weight.tolist() == [[0, 0, 0, 0], [0.5] * 4]


def test_a_threshold_of_each_layer_and_in_units_of_the_layer():
    model = network()
    before = weights(model)
    Thresholding(model, {"0.*": 0.1, "*": 0.02}).step()
    after = weights(model)
    assert torch.equal(after["0.weight"] == 0, before["0.weight"].abs() <= 0.1)
    assert torch.equal(after["3.weight"] == 0, before["3.weight"].abs() <= 0.02)
    model = network()
    before = weights(model)
    Thresholding(model, 0.5, relative=True, only="3").step()
    limit = 0.5 * before["3.weight"].square().mean().sqrt()
    assert torch.equal(weights(model)["3.weight"] == 0, before["3.weight"].abs() <= limit)
    assert torch.equal(weights(model)["0.weight"], before["0.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_ill_are_named_and_nothing_changes(bad):
    model = network()
    pruner = Thresholding(model, 0.1)
    pruner.step()
    masks = pruner.masks
    with torch.no_grad():
        model[3].weight[2, 1] = bad
    before = weights(model)
    with pytest.raises(NumericError, match=r"3\.weight: NaN or Inf among its weights after step 2; go back"):
        pruner.step()
    assert pruner.steps == 1
    assert pruner.masks is masks
    assert all(torch.equal(a, b) for a, b in zip(weights(model)["0.weight"], before["0.weight"], strict=True))


@pytest.mark.parametrize("regrow", [True, False])
def test_resumed_it_is_as_if_it_had_never_stopped(regrow):
    models = [network()]
    models += [copy.deepcopy(models[0]), network()]
    optimizers = [sgd(model) for model in models]
    whole, first, second = (Thresholding(model, 0.08, regrow=regrow) for model in models)
    train(models[0], optimizers[0], whole, 8)
    train(models[1], optimizers[1], first, 3)
    models[2].load_state_dict(models[1].state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    second.load_state_dict(first.state_dict())
    train(models[2], optimizers[2], second, 5, 3)
    assert second.steps == whole.steps
    assert second.masks == whole.masks
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True))
    with pytest.raises(UsageError, match=r"taken with rule Threshold\(tau=0.08.*now it is Threshold\(tau=0.1"):
        Thresholding(models[2], 0.1, regrow=regrow).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either tau, a threshold on |w|, or percentile="),
        ({"tau": 0.1, "percentile": 3}, "give either tau"),
        ({"tau": -1.0}, "threshold tau is -1.0; expected a finite number"),
        ({"percentile": 101}, r"percentile 101.0 is not in \[0, 100\]"),
        ({"tau": {"x": 0.1}}, r"0\.weight: no threshold is given for it"),
    ],
)
def test_thresholds_that_make_no_sense(given, message):
    with pytest.raises(UsageError, match=message):
        Thresholding(network(), **given)


def test_an_optimizer_has_nothing_to_do_where_everything_may_come_back():
    model = network()
    with pytest.raises(UsageError, match="no zero is held, so there is nothing to do for an optimizer"):
        Thresholding(model, 0.1, regrow=True, optimizer=sgd(model))


def test_leaving_the_block_lets_go_and_it_prints():
    model = network()
    optimizer = sgd(model)
    with Thresholding(model, 0.0, optimizer=optimizer) as pruner:
        pruner.step()
    assert repr(pruner).startswith(
        "Thresholding(Threshold(tau=0.0, relative=False); step 1, Masks(2 parameters"
    )
    assert "may grow back" in repr(Thresholding(model, 0.0, regrow=True))
    assert not optimizer._optimizer_step_post_hooks
