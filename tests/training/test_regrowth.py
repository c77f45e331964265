"""RigL: counts exact, the right weights go and come, what comes starts at zero and trains."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import Masks, RigL, prune_, random
from secateur.errors import NumericError, UsageError

from .support import check_zeros, loss_of, network, train


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01)


def by_brute_force(weight, gradient, mask, count):
    """The paper's two lines on lists; ties by position."""
    size, slope = weight.abs().reshape(-1).tolist(), gradient.abs().reshape(-1).tolist()
    kept = mask.reshape(-1).tolist()
    order = sorted((i for i, keep in enumerate(kept) if keep), key=lambda i: size[i])
    left = set(order[count:])
    free = sorted((i for i in range(len(kept)) if i not in left), key=lambda i: -slope[i])
    chosen = left | set(free[:count])
    return torch.tensor([i in chosen for i in range(len(kept))]).reshape(mask.shape)


@given(
    sparsity=st.floats(0.05, 0.95),
    fraction=st.floats(0.01, 1.0),
    begin=st.integers(1, 3),
    updates=st.integers(1, 4),
    every=st.integers(1, 3),
)
@settings(max_examples=10)
def test_each_update_moves_what_the_paper_says(sparsity, fraction, begin, updates, every):
    model = network()
    masks = prune_(model, sparsity, random)
    optimizer = adam(model)
    end = begin + updates * every
    pruner = RigL(model, masks, optimizer, begin, end, every, fraction=fraction)
    for step in range(1, end + 3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
        optimizer.zero_grad()
        old = pruner.masks
        moved = pruner.step()
        assert moved == (begin <= step <= end and (step - begin) % every == 0)
        share = fraction * (1 + math.cos(math.pi * ((step - begin) // every) / updates)) / 2
        for name, mask in pruner.masks.items():
            assert mask.sum() == masks[name].sum()
            count = round(share * int(mask.sum())) if moved else 0
            assert torch.equal(mask, by_brute_force(*before[name], old[name], count))
            weight = dict(model.named_parameters())[name]
            new = mask & ~old[name]
            assert not weight.detach().view(torch.int32)[new | ~mask].any()
            assert torch.equal(weight[mask & ~new], before[name][0][mask & ~new])
            assert not optimizer.state[weight]["exp_avg"][new].any()
    assert pruner.done


def test_what_has_grown_trains_on_and_is_counted():
    model = network()
    masks = prune_(model, 0.8, random)
    optimizer = adam(model)
    pruner = RigL(model, masks, optimizer, 1, 100, 99, fraction=0.5)
    train(model, optimizer, pruner, 1)
    new = {name: mask & ~masks[name] for name, mask in pruner.masks.items()}
    assert pruner.grown == sum(int(mask.sum()) for mask in new.values()) > 0
    train(model, optimizer, pruner, 3, 1)
    check_zeros(model, pruner.masks)
    for name, mask in new.items():
        weight = dict(model.named_parameters())[name]
        assert weight[mask].ne(0).all()
        assert weight[mask].abs().max() <= 3.1 * 0.01  # three steps, none longer than the learning rate


def test_an_update_waits_for_a_step_that_is_taken():
    """A GradScaler that skips the step leaves no gradients to grow by."""
    model = network()
    masks = prune_(model, 0.8, random)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu")
    pruner = RigL(model, masks, optimizer, 2, 8, 6)
    moved = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(pruner.step())
    assert moved == [False, False, True, False]


@pytest.mark.parametrize("ill", ["weights", "gradients"])
def test_ill_numbers_are_named_and_the_masks_stay(ill):
    model = network()
    masks = prune_(model, 0.5, random)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = RigL(model, masks, optimizer, 1, 3, 1)
    loss_of(model, 0).backward()
    with torch.no_grad():
        if ill == "weights":
            model[3].weight[masks["3.weight"]] = float("nan")
        else:  # of pruned weights, so that no weight becomes ill
            model[3].weight.grad[~masks["3.weight"]] = float("nan")
    model[0].weight.grad.zero_()
    optimizer.step()
    with pytest.raises(
        NumericError, match=rf"3\.weight: NaN or Inf among its {ill} after step 1; its masks stay"
    ):
        pruner.step()
    assert pruner.masks == masks
    assert pruner.steps == 0


@pytest.mark.parametrize("stop", [0, 3, 5, 9])
def test_resumed_it_is_as_if_it_had_never_stopped(stop):
    models = [network()]
    masks = prune_(models[0], 0.7, random)
    models += [copy.deepcopy(models[0]), network()]
    optimizers = [adam(model) for model in models]
    whole, first, second = (
        RigL(model, masks, optimizer, 2, 8, 2) for model, optimizer in zip(models, optimizers, strict=True)
    )
    train(models[0], optimizers[0], whole, 10)
    train(models[1], optimizers[1], first, stop)
    models[2].load_state_dict(models[1].state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    second.load_state_dict(first.state_dict())
    train(models[2], optimizers[2], second, 10 - stop, stop)
    assert second.masks == whole.masks
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True))
    with pytest.raises(UsageError, match=r"taken with fraction 0.3, now it is 0.2"):
        RigL(models[2], masks, optimizers[2], 2, 8, 2, fraction=0.2).load_state_dict(first.state_dict())
    other = Masks({name: torch.rand(mask.shape) > 0.5 for name, mask in masks.items()})
    with pytest.raises(UsageError, match="taken with kept"):
        RigL(models[2], other, optimizers[2], 2, 8, 2).load_state_dict(first.state_dict())


def test_requests_that_make_no_sense():
    model = network()
    masks = prune_(model, 0.5, random)
    optimizer = adam(model)
    with pytest.raises(UsageError, match=r"fraction 1.5 is not in \(0, 1\]"):
        RigL(model, masks, optimizer, 1, 3, 1, fraction=1.5)
    with pytest.raises(UsageError, match="the masks prune nothing, so nothing can grow"):
        RigL(model, Masks({}), optimizer, 1, 3, 1)
    with pytest.raises(UsageError, match="growing looks at the gradients of the optimizer's steps"):
        RigL(model, masks, None, 1, 3, 1)
    with pytest.raises(UsageError, match="these masks belong to another model"):
        RigL(nn.Linear(2, 2), masks, optimizer, 1, 3, 1)
    with pytest.raises(UsageError, match="the schedule never reaches its end"):
        RigL(model, masks, optimizer, 1, 4, 2)


def test_leaving_the_block_lets_go_and_it_prints():
    model = network()
    masks = prune_(model, 0.5, random)
    optimizer = adam(model)
    with RigL(model, masks, optimizer, 1, 3, 1) as pruner:
        assert repr(pruner) == f"RigL({masks!r}; fraction 0.3 from step 1 to 3 every 1; step 0)"
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
