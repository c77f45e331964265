"""Zeros stay bit-exactly zero through every kind of step; a weight that happens to be zero is free."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Masks, hold_
from secateur.core.hold import MOMENTA
from secateur.errors import UsageError

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1),
    "sgd-momentum": partial(SGD, lr=0.1, momentum=0.9),
    "sgd-nesterov-decay": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-foreach": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": partial(Adam, lr=0.1),
    "adam-l2": partial(Adam, lr=0.1, weight_decay=0.1),
    "adam-amsgrad-foreach": partial(Adam, lr=0.1, amsgrad=True, foreach=True),
    "adam-fused": partial(Adam, lr=0.1, fused=True),
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.1),
    "adamw-foreach": partial(AdamW, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw-fused": partial(AdamW, lr=0.1, weight_decay=0.1, fused=True),
    "nadam": partial(torch.optim.NAdam, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.001, momentum=0.9, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "adamax": partial(torch.optim.Adamax, lr=0.1),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks(
        {
            name: torch.rand(p.shape, generator=generator) > 0.5
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    images, labels = batch(seed)
    return F.cross_entropy(model(images), labels)


def bits(weight: Tensor) -> Tensor:
    return weight.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


def check_zeros(model: nn.Module, masks: Masks) -> None:
    """Every pruned weight has the bits of positive zero; (almost) no other weight is zero."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert not bits(parameters[name])[~mask].any(), name
        assert parameters[name][mask].ne(0).all(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_hold_through_every_optimizer(name):
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    hold = hold_(model, masks, optimizer)
    check_zeros(model, masks)
    for seed in range(6):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        check_zeros(model, masks)
    for weight, mask in ((dict(model.named_parameters())[n], m) for n, m in masks.items()):
        for key in MOMENTA:
            if key in optimizer.state[weight]:
                assert not optimizer.state[weight][key][~mask].any()
    hold.remove()
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    optimizer.step()
    assert any((p[~masks[n]] != 0).any() for n, p in model.named_parameters() if n in masks)


@pytest.mark.parametrize("name", ["sgd-nesterov-decay", "adamw-fused"])
def test_without_an_optimizer_the_user_calls_step(name):
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    with hold_(model, masks) as hold:
        for seed in range(4):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
            hold.step()
            check_zeros(model, masks)


@pytest.mark.parametrize("name", ["sgd-nesterov-decay", "adamw"])
def test_kept_weights_train_as_under_torchs_own_masks(name):
    """torch.nn.utils.prune computes with weight * mask; with gradients=True clipping sees the same norm."""
    from torch.nn.utils import prune

    model = network()
    masks = half(model)
    peer = copy.deepcopy(model)
    for path in ("0", "4"):
        prune.custom_from_mask(peer.get_submodule(path), "weight", masks[f"{path}.weight"].float())
    ours, theirs = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](peer.parameters())
    with hold_(model, masks, ours, gradients=True):
        for seed in range(6):
            for each, optimizer in ((model, ours), (peer, theirs)):
                optimizer.zero_grad()
                loss_of(each, seed).backward()
                nn.utils.clip_grad_norm_(each.parameters(), 0.5)
                optimizer.step()
    for path in ("0", "4"):
        expected = peer.get_submodule(path).weight_orig * masks[f"{path}.weight"]
        torch.testing.assert_close(model.get_submodule(path).weight, expected)


def test_gradients_of_pruned_weights_are_left_alone_unless_asked():
    model = network()
    masks = half(model)
    hold = hold_(model, masks)
    loss_of(model, 0).backward()
    assert all(dict(model.named_parameters())[n].grad[~m].any() for n, m in masks.items())
    hold.remove()
    model.zero_grad()
    hold = hold_(model, masks, gradients=True)
    loss_of(model, 0).backward()
    for n, m in masks.items():
        gradient = dict(model.named_parameters())[n].grad
        assert not gradient[~m].any()
        assert gradient[m].any()
    hold.remove()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert all(dict(model.named_parameters())[n].grad[~m].any() for n, m in masks.items())


def test_a_weight_that_happens_to_be_zero_is_free():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    optimizer = SGD(model.parameters(), 0.1)
    hold_(model, Masks({"weight": torch.tensor([[True, False, True, False]])}), optimizer)
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[-0.1, 0.0, 0.9, 0.0]]))


def test_accumulated_gradients_and_clipping():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    hold_(model, masks, optimizer)
    for seed in range(8):
        (loss_of(model, seed) / 4).backward()
        if seed % 4 == 3:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        check_zeros(model, masks)


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_precision_with_a_scaled_loss(fused):
    """The step that a GradScaler skips, because gradients are Inf, changes nothing either."""
    model = network()
    masks = half(model)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    hold_(model, masks, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, seed)
        scaler.scale(loss * (float("inf") if seed == 2 else 1.0)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        check_zeros(model, masks)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == (seed == 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_type(dtype):
    model = nn.Linear(16, 8).to(dtype)
    masks = half(model)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    hold_(model, masks, optimizer)
    for _ in range(3):
        model(torch.randn(2, 16, dtype=dtype)).square().sum().backward()
        optimizer.step()
        assert not bits(model.weight)[~masks["weight"]].any()


@pytest.mark.parametrize("wrapped", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_wrapped_models(wrapped):
    model = network()
    masks = half(model)
    outer = wrapped(model)
    optimizer = OPTIMIZERS["adamw"](outer.parameters())
    hold_(outer, masks, optimizer)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(outer, seed).backward()
        optimizer.step()
        check_zeros(model, masks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_model_and_compiled_step():
    model = network()
    masks = half(model)
    outer = torch.compile(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    hold_(outer, masks, optimizer)
    step = torch.compile(optimizer.step)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(outer, seed).backward()
        step()
        check_zeros(model, masks)


def test_memory_order_of_the_weights():
    model = network().to(memory_format=torch.channels_last)
    masks = half(model)
    optimizer = OPTIMIZERS["sgd-momentum"](model.parameters())
    hold_(model, masks, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    check_zeros(model, masks)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_several_optimizers_and_a_learning_rate_schedule():
    model = network()
    masks = half(model)
    each = [SGD(model[0].parameters(), 0.1, momentum=0.9), AdamW(model[4].parameters(), 0.1)]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in each]
    hold_(model, masks, each)
    for seed in range(3):
        loss_of(model, seed).backward()
        for optimizer, schedule in zip(each, schedules, strict=True):
            optimizer.step()
            schedule.step()
        check_zeros(model, masks)


def test_a_poisoned_weight_is_zero_again():
    model = nn.Linear(4, 4)
    masks = half(model)
    hold = hold_(model, masks)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    hold.step()
    assert not bits(model.weight)[~masks["weight"]].any()


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "rmsprop"])
def test_what_is_released_starts_at_zero_without_momentum(name):
    """After a long training under the mask, a step without gradients leaves a released weight at zero."""
    model = nn.Linear(8, 8, bias=False)
    masks = half(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    hold = hold_(model, masks, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).add(1).square().mean().backward()
        optimizer.step()
    hold.masks = Masks({"weight": torch.ones(8, 8, dtype=torch.bool)})
    assert torch.equal(model.weight == 0, ~masks["weight"])
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight == 0, ~masks["weight"])


def test_released_under_adam_the_first_step_is_no_jump():
    """The second moment followed the gradients meanwhile, so a released weight moves by about the learning rate."""
    model = nn.Linear(8, 8, bias=False)
    masks = half(model)
    optimizer = Adam(model.parameters(), lr=0.01)
    hold = hold_(model, masks, optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        (model(torch.randn(4, 8)).sum() * 3).backward()
        optimizer.step()
    hold.masks = Masks({"weight": torch.ones(8, 8, dtype=torch.bool)})
    optimizer.zero_grad()
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert model.weight[~masks["weight"]].abs().max() < 0.01


def test_masks_can_be_replaced_and_hold_at_once():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["sgd-momentum"](model.parameters())
    hold = hold_(model, masks, optimizer)
    fewer = Masks({"4.weight": torch.rand(3, 64) > 0.9})
    hold.masks = fewer
    assert hold.masks == fewer
    check_zeros(model, Masks({"4.weight": masks["4.weight"] & fewer["4.weight"]}))
    loss_of(model, 0).backward()
    optimizer.step()
    assert not model[4].weight[~fewer["4.weight"]].any()
    assert model[0].weight.ne(0).all()


def test_removing_twice_and_leaving_the_block():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with hold_(model, masks, optimizer, gradients=True) as hold:
        assert repr(hold) == f"Hold({masks!r})"
    hold.remove()
    loss_of(model, 0).backward()
    optimizer.step()
    hold.step()
    assert model[4].weight.ne(0).any(dim=1).all()
    assert not optimizer._optimizer_step_post_hooks


def test_the_hold_adds_no_state_to_an_optimizer_that_has_none():
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    hold_(model, half(model), optimizer)
    assert not optimizer.state_dict()["state"]


def test_a_mask_for_another_model():
    model = network()
    with pytest.raises(
        UsageError, match=r"the model has no parameter 4\.wieght; these masks belong to another"
    ):
        hold_(model, Masks({"4.wieght": torch.ones(3, 64, dtype=torch.bool)}))
    with pytest.raises(UsageError, match=r"mask of 4\.weight: expected shape \(3, 64\), got \(3, 63\)"):
        hold_(model, Masks({"4.weight": torch.ones(3, 63, dtype=torch.bool)}))
    hold = hold_(model, half(model))
    with pytest.raises(UsageError, match="another model"):
        hold.masks = Masks({"x": torch.ones(1, dtype=torch.bool)})
    assert hold.masks == half(model)


def test_an_optimizer_of_another_model_or_none_at_all():
    model = network()
    with pytest.raises(UsageError, match=r"trains none of the 2 masked parameters \(0\.weight, \.\.\.\)"):
        hold_(model, half(model), SGD(network().parameters(), 0.1))
    with pytest.raises(UsageError, match=r"optimizer is 'adam'; expected a torch\.optim\.Optimizer"):
        hold_(model, half(model), "adam")
    with pytest.raises(UsageError, match="optimizer is 3; expected"):
        hold_(model, half(model), [SGD(model.parameters(), 0.1), 3])


def test_a_wrapped_optimizer_is_found():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    masks = half(model)
    inner = OPTIMIZERS["sgd-momentum"](model.parameters())
    hold_(model, masks, Wrapper(inner))
    loss_of(model, 0).backward()
    inner.step()
    check_zeros(model, masks)
