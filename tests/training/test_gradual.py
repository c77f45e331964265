"""Counts exact at every step, masks nested, zeros held in between, resumed with the same result."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import (
    NM,
    Gradual,
    Masks,
    Recipe,
    Rows,
    constant,
    cubic,
    exponential,
    global_magnitude,
    globally,
    linear,
    magnitude,
    movement,
    prune_,
    random,
    sparsegpt,
    taylor,
    threshold,
    wanda,
)
from secateur.errors import NumericError, UsageError

from .support import check_zeros, loss_of, network, train

SIZE = 4 * 9 + 3 * 64


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


@given(
    recipe=st.sampled_from([magnitude, global_magnitude, random]),
    schedule=st.sampled_from([linear, cubic, exponential]),
    ends=st.tuples(st.floats(0, 0.95), st.floats(0, 0.95)).map(sorted),
    begin=st.integers(0, 3),
    updates=st.integers(1, 5),
    every=st.integers(1, 3),
    with_optimizer=st.booleans(),
)
@settings(max_examples=12)
@pytest.mark.thorough
def test_counts_are_exact_and_masks_nested(recipe, schedule, ends, begin, updates, every, with_optimizer):
    model = network()
    optimizer = sgd(model)
    end = begin + updates * every
    pruner = Gradual(
        model, recipe, schedule(*ends), begin, end, every, optimizer=optimizer if with_optimizer else None
    )
    before = Masks({})
    for step in range(1, end + 3):
        train(model, optimizer, pruner, 1, step)
        if step < begin:
            assert not pruner.masks
            continue
        target = schedule(*ends)(min(1.0, (step - begin) // every / updates))
        assert pruner.masks.zeros == round(SIZE * target)
        check_zeros(model, pruner.masks)
        assert all(not (mask & ~before[name]).any() for name, mask in pruner.masks.items() if name in before)
        removed, left = pruner.masks.zeros - before.zeros, SIZE - before.zeros
        if before and left:  # trap 7: what goes is (b - a) / (1 - a) of what remains
            a, b = before.zeros / SIZE, pruner.sparsity
            assert removed == pytest.approx((b - a) / (1 - a) * left)
        before = pruner.masks
    assert pruner.done
    assert pruner.sparsity == pytest.approx(ends[1], abs=0.5 / SIZE)


def size(weight):
    """Magnitude under another name, for which no pass over the scores is ever spared."""
    return weight.abs()


@given(
    first=st.floats(0, 0.6),
    more=st.floats(0, 1),
    zeros=st.integers(0, 40),
    released=st.booleans(),
    allocate=st.sampled_from([magnitude.allocate, globally]),
    seed=st.integers(0, 1000),
)
@pytest.mark.thorough
def test_magnitudes_of_held_zeros_need_no_marks(first, more, zeros, released, allocate, seed):
    """Where pruned is the same as zero the scores are not written out; the masks are those of the long way."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    masks = prune_(model, first, Recipe(size, allocate=allocate))
    with torch.no_grad():
        model[0].weight.view(-1)[:zeros] = 0.0  # some kept weights happen to be zero
        if released:
            model[1].weight[~masks["1.weight"]] = 0.1  # and some pruned ones are not
    second = first + (1 - first) * more
    models = [copy.deepcopy(model) for _ in range(2)]
    short = prune_(models[0], second, Recipe(magnitude.score, allocate=allocate), masks=masks)
    long = prune_(models[1], second, Recipe(size, allocate=allocate), masks=masks)
    assert short == long
    assert not any((short[name] & ~mask).any() for name, mask in masks.items())


def test_the_updates_happen_when_due_and_say_so():
    model = network()
    pruner = Gradual(model, magnitude, linear(0.1, 0.5), begin=2, end=6, every=2)
    said, zeros = [], []
    for _ in range(8):
        said.append(pruner.step())
        zeros.append(pruner.masks.zeros)
    assert said == [False, True, False, True, False, True, False, False]
    assert zeros == [round(SIZE * s) for s in (0, 0.1, 0.1, 0.3, 0.3, 0.5, 0.5, 0.5)]


def test_with_begin_zero_the_first_step_prunes():
    pruner = Gradual(network(), magnitude, constant(0.5), begin=0, end=10, every=10)
    assert pruner.masks.zeros == 0
    assert pruner.step()
    assert pruner.masks.zeros == SIZE // 2


def test_between_updates_and_after_the_end_zeros_are_held():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    pruner = Gradual(model, magnitude, cubic(0.0, 0.8), 2, 10, 4, optimizer=optimizer)
    for seed in range(15):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        check_zeros(model, pruner.masks)  # before our own step
        pruner.step()
        check_zeros(model, pruner.masks)
    pruner.remove()
    loss_of(model, 20).backward()
    optimizer.step()
    assert any(p[~pruner.masks[n]].any() for n, p in model.named_parameters() if n in pruner.masks)


def test_other_patterns_and_places():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    pruner = Gradual(model, replace(magnitude, pattern=Rows()), linear(0.0, 0.5), 1, 5, 2, only="0")
    for _ in range(5):
        pruner.step()
    assert set(pruner.masks) == {"0.weight"}
    assert sorted(pruner.masks["0.weight"].any(1).tolist()) == [False] * 4 + [True] * 4


def test_scores_that_need_data():
    model = network()
    data = [torch.randn(4, 1, 4, 4)]
    pruner = Gradual(model, replace(wanda, allocate=globally), linear(0, 0.5), 1, 3, 1, data=data)
    for _ in range(3):
        pruner.step()
    assert pruner.masks.zeros == SIZE // 2
    with pytest.raises(UsageError, match="data can be gone through only once"):
        Gradual(model, wanda, linear(0, 0.5), 1, 3, 1, data=iter(data))


def test_gradients_of_training_need_no_data():
    """The mean gradient since the last update is what Taylor sees; checked against a loop of one's own."""
    model = network()
    peer = copy.deepcopy(model)
    optimizer = sgd(model)
    pruner = Gradual(model, taylor, constant(0.5), 3, 6, 3, optimizer=optimizer)
    train(model, optimizer, pruner, 3)
    ours, theirs = sgd(peer), {}
    for seed in range(3):
        ours.zero_grad()
        loss_of(peer, seed).backward()
        for name, weight in peer.named_parameters():
            theirs[name] = theirs.get(name, 0) + weight.grad / 3
        ours.step()
    for name, mask in pruner.masks.items():
        score = (dict(peer.named_parameters())[name] * theirs[name]).abs()
        assert score[mask].min() >= score[~mask].max()


SEEN: list[float] = []


def seen_mean(weight, grad):
    SEEN.append(float(grad[0, 0]))
    return weight.abs()


def seen_squares(weight, grad_squared):
    SEEN.append(float(grad_squared[0, 0]))
    return weight.abs()


def seen_movement(weight, movement):
    SEEN.append(float(movement[0, 0]))
    return weight.abs()


@pytest.mark.parametrize(
    ("score", "expected"), [(seen_mean, [1, 7]), (seen_squares, [1, 53]), (seen_movement, [1, 15])]
)
def test_means_start_anew_after_an_update_and_sums_go_on(score, expected):
    """Gradients 1, 5, 9 of a weight of -1; updates after the first and the third step."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, -1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = Gradual(model, Recipe(score), linear(0.0, 0.5), 1, 3, 2, optimizer=optimizer)
    SEEN.clear()
    for gradient in (1.0, 5.0, 9.0):
        model.weight.grad = torch.full((1, 2), gradient)
        optimizer.step()
        pruner.step()
    assert sorted(set(SEEN)) == expected


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_taken_unscaled_and_skipped_steps_do_not_count(fused):
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, -1.0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-30, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    pruner = Gradual(model, Recipe(seen_mean), linear(0.0, 0.5), 3, 4, 1, optimizer=optimizer)
    SEEN.clear()
    for factor in (1.0, float("inf"), 3.0, 4.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((2,), factor)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    assert sorted(set(SEEN)) == [2.0, 4.0]


def test_movement_keeps_what_grows():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = Gradual(model, movement, constant(0.5), 5, 6, 1, optimizer=optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        (model.weight * torch.tensor([[-1.0, 1.0]])).sum().backward()
        optimizer.step()
        pruner.step()
    assert pruner.masks["weight"].tolist() == [[True, False]]


def test_scores_from_training_need_an_optimizer_and_gradients():
    model = network()
    with pytest.raises(UsageError, match="movement needs movement from the steps of training; pass optimizer="):
        Gradual(model, movement, linear(0, 0.5), 1, 3, 1)
    with pytest.raises(UsageError, match="movement needs movement, which is gathered while a model trains"):
        prune_(model, 0.5, movement)
    pruner = Gradual(model, taylor, linear(0, 0.5), 1, 3, 1, optimizer=sgd(model))
    with pytest.raises(UsageError, match=r"0\.weight: no step of the optimizer has given it a gradient yet"):
        pruner.step()


def test_a_wrapped_model_has_the_masks_of_the_bare_one():
    model = network()
    peer = copy.deepcopy(model)
    pruners = [Gradual(m, magnitude, linear(0.2, 0.6), 1, 4, 1) for m in (torch.nn.DataParallel(model), peer)]
    for _ in range(5):
        for pruner in pruners:
            pruner.step()
    assert pruners[0].masks == pruners[1].masks


def test_going_on_from_earlier_masks():
    model = network()
    masks = prune_(model, 0.4)
    pruner = Gradual(model, magnitude, linear(0.4, 0.8), 1, 5, 2, masks=masks)
    assert pruner.sparsity == masks.sparsity
    pruner.step()
    assert pruner.masks == masks
    for _ in range(4):
        pruner.step()
    assert pruner.masks.zeros == round(0.8 * SIZE)
    assert not any((pruner.masks[name] & ~mask).any() for name, mask in masks.items())


def make(model, optimizer, recipe=magnitude):
    return Gradual(model, recipe, cubic(0.0, 0.9), begin=2, end=10, every=2, optimizer=optimizer)


@pytest.mark.parametrize("recipe", [magnitude, movement, taylor])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7, 12])
def test_resumed_it_is_as_if_it_had_never_stopped(stop, recipe):
    """The state goes through torch.save and a load that runs no code."""
    model = network()
    start = copy.deepcopy(model)
    optimizer = sgd(model)
    pruner = make(model, optimizer, recipe)
    train(model, optimizer, pruner, 14)

    first = start
    optimizer = sgd(first)
    half = make(first, optimizer, recipe)
    train(first, optimizer, half, stop)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), half.state_dict()], file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    second = network()
    second.load_state_dict(weights)
    optimizer = sgd(second)
    optimizer.load_state_dict(moments)
    rest = make(second, optimizer, recipe)
    rest.load_state_dict(state)
    train(second, optimizer, rest, 14 - stop, stop)
    assert rest.masks == pruner.masks
    assert (rest.steps, rest.updates, rest.done) == (pruner.steps, pruner.updates, True)
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_does_not_belong_is_refused_and_named():
    model = network()
    state = Gradual(model, magnitude, cubic(0.0, 0.9), 2, 10, 2).state_dict()

    def load(into, message):
        with pytest.raises(UsageError, match=message):
            into.load_state_dict(state)

    load(
        Gradual(model, global_magnitude, cubic(0.0, 0.9), 2, 10, 2),
        "taken with recipe {'allocate': 'per_layer'}, now",
    )
    load(Gradual(model, magnitude, linear(0.0, 0.9), 2, 10, 2), r"taken with targets \[0.0, 0.52")
    load(
        Gradual(model, magnitude, cubic(0.0, 0.9), 3, 11, 2),
        r"taken with due \[2, 10, 2\], now it is \[3, 11, 2\]",
    )
    load(Gradual(model, magnitude, cubic(0.0, 0.9), 2, 10, 2, seed=1), "taken with seed 0, now it is 1")
    load(
        Gradual(nn.Linear(3, 3), magnitude, cubic(0.0, 0.9), 2, 10, 2),
        r"taken with layers \{'0.weight': \[4, 1, 3, 3\]",
    )
    load(Gradual(model, magnitude, cubic(0.0, 0.9), 2, 10, 2, only="0"), r"taken with layers \{'3.weight'")
    with pytest.raises(UsageError, match="this is no state of Gradual; give what state_dict"):
        Gradual(model, magnitude, cubic(0.0, 0.9), 2, 10, 2).load_state_dict({})
    with pytest.raises(UsageError, match="no state of Gradual, but of RigL"):
        Gradual(model, magnitude, cubic(0.0, 0.9), 2, 10, 2).load_state_dict({"kind": "RigL"})
    with pytest.raises(UsageError, match="the state holds no masks"):
        Gradual(model, magnitude, cubic(0.0, 0.9), 2, 10, 2).load_state_dict(state | {"masks": 3})


def test_weights_that_are_ill_stop_it_before_anything_changes():
    model = network()
    pruner = Gradual(model, magnitude, linear(0.2, 0.6), 1, 3, 1)
    pruner.step()
    masks = pruner.masks
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(NumericError, match=r"3\.weight: NaN or Inf among its weights"):
            pruner.step()
    assert (pruner.steps, pruner.masks) == (1, masks)
    model.load_state_dict(good)
    assert pruner.step()
    assert pruner.masks.zeros == round(0.4 * SIZE)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(magnitude, pattern=NM(2, 4)), r"NM\(n=2, m=4\) fixes the sparsity, so it cannot grow"),
        (threshold(0.1), r"Threshold\(tau=0.1.*decides how much is cut, so no schedule can; take Thresholding"),
        (sparsegpt, "finds its own masks in one shot"),
        ("magnitude", "recipe is 'magnitude'; expected a Recipe"),
    ],
)
def test_recipes_that_cannot_follow_a_schedule(recipe, message):
    with pytest.raises(UsageError, match=message):
        Gradual(network(), recipe, linear(0.0, 0.5), 1, 3, 1)


def test_masks_that_do_not_fit():
    model = network()
    masks = prune_(model, 0.5)
    with pytest.raises(
        UsageError, match=r"schedule starts at sparsity 0.2, but the masks given already prune 0.5"
    ):
        Gradual(model, magnitude, linear(0.2, 0.9), 1, 3, 1, masks=masks)
    with pytest.raises(UsageError, match=r"the masks given prune 0\.weight, which is not chosen"):
        Gradual(model, magnitude, linear(0.9, 0.9), 1, 3, 1, masks=masks, only="3")
    with pytest.raises(UsageError, match="these masks belong to another model"):
        Gradual(nn.Linear(3, 3), magnitude, linear(0.5, 0.9), 1, 3, 1, masks=masks)


def test_leaving_the_block_lets_go_and_it_prints():
    model = network()
    optimizer = sgd(model)
    with Gradual(model, movement, cubic(0.0, 0.9), 1, 3, 1, optimizer=optimizer) as pruner:
        train(model, optimizer, pruner, 1)
        assert repr(pruner) == (
            "Gradual(movement on Weights(), per_layer; cubic(0, 0.9) from step 1 to 3 every 1; step 1, sparsity 0.0000)"
        )
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
