"""The warning that method best takes long: from one block that is timed, and silent where nobody waits."""

import copy
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur import NM, alps, best_, plan, prune_
from secateur import estimate as module
from secateur.core import native
from secateur.core.where import layers
from secateur.estimate import Estimate, estimate, in_words, warning
from secateur.recover import rehearsal
from secateur.recover.rehearsal import Rehearsed, rehearse

from .language import Tiny, ids


@pytest.mark.parametrize(
    ("sparsity", "pattern", "tried", "epochs"),
    [(0.5, None, 3, 10), (0.7, None, 6, 15), (None, NM(2, 4), 1, 10)],
)
@pytest.mark.parametrize("chain", [True, False])
def test_what_best_makes_of_one_block(monkeypatch, sparsity, pattern, tried, epochs, chain):
    """Three equal blocks; the piece is a tenth of the calibration data."""
    model = Tiny(blocks=3)
    recipe = replace(alps, pattern=pattern) if pattern else alps
    given = ids(4, 10)

    def rehearsed(model, path, layers, piece, clock):
        assert path == "blocks.0"
        assert {layer.block for layer in layers} == {0}
        assert torch.equal(piece["input_ids"], given)
        return Rehearsed(forward=1.0, judged=1.6, step=5.0, submodules=2, shared=(), chain=chain)

    monkeypatch.setattr(module, "rehearse", rehearsed)
    monkeypatch.setattr(module, "_solving", lambda *_: 7.0)
    found = estimate(model, {"input_ids": given}, 400, plan(model, sparsity, recipe))
    forward, judging = 1.0 * 10 * 3, 1.0 * 10 * 3 / 8
    pruning = forward + 7 * 3

    def rebuilding(count):
        # a chain: half of the block twice for each of two sub-modules, and on to the next; five passes of the piece
        found = 7 / 8 * forward * 4 + 5 * 3 if chain else 7 / 8 * forward * 2 * 3
        return found + 7 / 8 * 10 * 3 * (5 * count + 1.6 * (count + 1) / 16)

    assert found.wanda == pytest.approx(forward)
    assert found.alps == pytest.approx(pruning)
    assert found.speed == pytest.approx(400 / forward)
    assert found.best == pytest.approx(
        tried * (pruning + rebuilding(2) + 2 * judging) + rebuilding(epochs) + 2 * judging
    )


def test_measuring_changes_nothing():
    model = Tiny(width=32).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = estimate(model, {"input_ids": ids(9)}, 1000, plan(model, 0.5, alps))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert 0 < found.wanda < found.alps < found.best


def test_long_sequences_are_timed_one_at_a_time(monkeypatch):
    seen = []

    def rehearsed(model, path, layers, piece, clock):
        seen.append(tuple(piece["input_ids"].shape))
        return Rehearsed(1.0, 1.0, 1.0, 2, (), True)

    monkeypatch.setattr(module, "rehearse", rehearsed)
    monkeypatch.setattr(module, "_solving", lambda *_: 0.0)
    for length in (100, 700, 5000):
        estimate(Tiny(), {"input_ids": ids(9, length)}, 9 * length, plan(Tiny(), 0.5, alps))
    assert seen == [(4, 100), (2, 700), (1, 5000)]


def test_layers_that_share_an_input_share_its_moment():
    model = Tiny()
    chosen = [layer for layer in layers(model) if layer.block == 1]
    found = rehearse(model, "blocks.1", chosen, {"input_ids": ids(2)})
    names = [[layer.name.removeprefix("blocks.1.") for layer in group] for group in found.shared]
    assert names == [
        ["attn.q.weight", "attn.k.weight", "attn.v.weight"], ["attn.o.weight"], ["mlp.0.weight"], ["mlp.2.weight"],
    ]  # fmt: skip
    assert found.submodules == 2
    assert found.chain


def test_a_large_matrix_is_counted_from_a_smaller_one(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 16)
    monkeypatch.setattr(module, "timed", lambda what, clock: (what(), 1.0)[1])
    small, large = (module._Probe(*size, time.process_time).measured(alps) for size in ((16, 16), (32, 64)))
    assert (small.solve, small.search, small.moment) == (1.0, 1.0, 1 / 32)
    assert (large.solve, large.search, large.moment) == (64.0, 32.0, 16 / 32)


def test_a_short_time_is_the_least_of_five():
    ticks = iter([0.0, 0.01, 1.0, 1.02, 2.0, 2.005, 3.0, 3.01, 4.0, 4.03])
    calls = []
    assert rehearsal.timed(lambda: calls.append(1), lambda: next(ticks)) == pytest.approx(0.005)
    assert len(calls) == 5
    long = iter([0.0, 1.0])
    assert rehearsal.timed(lambda: None, lambda: next(long)) == 1.0


def test_a_model_without_blocks_is_timed_as_a_whole():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    found = estimate(model, torch.zeros(8, 16), 128, plan(model, None, replace(alps, pattern=NM(2, 4))))
    assert 0 < found.wanda < found.alps <= found.best


class Work(TorchDispatchMode):
    """A clock that tells the work done, not time, so that no load of the machine moves it.

    An operator counts a fixed cost, the elements that it reads and writes, and its products at a sixteenth.
    """

    def __init__(self):
        super().__init__()
        self.done = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = list(tensors_of((*args, *kwargs.values(), out)))
        self.done += 4000 + (0 if func.is_view else sum(tensor.numel() for tensor in tensors))
        if func.overloadpacket in flop_registry:
            self.done += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) / 16
        elif is_solver(func):
            self.done += max(tensor.shape[-1] for tensor in tensors if tensor.ndim) ** 3
        return out


def tensors_of(values):
    """Those among the arguments of an operator; torch's trees would take half of the test."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


@cache
def is_solver(func):
    return "linalg" in str(func) or "cholesky" in str(func)


@pytest.mark.thorough
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_as_much_work_as_a_whole_run(monkeypatch, pattern):
    """Work of the torch path against a whole run's; docs/results.md has the times of real models."""
    monkeypatch.setattr(native, "_opened", lambda: (None, "torch"))
    monkeypatch.setattr(rehearsal, "SHORT", 0.0)
    torch.manual_seed(0)
    model = Tiny().eval()
    data = [{"input_ids": ids(32, 32)}]
    recipe, sparsity = (replace(alps, pattern=pattern), None) if pattern else (alps, 0.5)
    todo = plan(model, sparsity, recipe)
    with Work() as work:
        told = estimate(model, data[0], 32 * 32, todo, clock=lambda: work.done)
        taken = []
        for run in (
            lambda copied: prune_(copied, sparsity, recipe, data=data),
            lambda copied: best_(copied, sparsity, data, pattern=recipe.pattern),
        ):
            copied = copy.deepcopy(model)
            start = work.done
            run(copied)
            taken.append(work.done - start)
    assert 0.5 < told.alps / taken[0] < 2
    assert 0.5 < told.best / taken[1] < 4  # told is the most that it takes: it stops early


def test_the_words():
    assert warning(Estimate(59.0, 3.0, 1.0, 1000, 10)) is None
    assert warning(Estimate(1800.0, 40.0, 1.0, 1234.5, 32768)) == (
        "Method best may take about 30 minutes here, judged by one block that was timed (1,234 tokens a second "
        "forward) and 32,768 tokens of calibration. Faster: --method alps, about 40 seconds, or --method wanda, about "
        "1 second; fewer --samples save in proportion."
    )
    assert [in_words(x) for x in (3, 89, 95, 5401)] == ["3 seconds", "90 seconds", "2 minutes", "1.5 hours"]
