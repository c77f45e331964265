"""Sharing allocators: totals exact within one unit, growing shares, and a global cut like a sort's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import globally, per_layer, per_row
from secateur.core.select import Candidates

SHARES = [per_layer, per_row, globally]


def candidates(scores: torch.Tensor, cells: int = 1) -> Candidates:
    return Candidates(tuple(scores.shape), cells, lambda: scores)


@st.composite
def layers(draw, cells=None):
    """One to four layers of units; few distinct scores, so that ties are the rule."""
    found = {}
    for name in "dbca"[: draw(st.integers(1, 4))]:
        shape = draw(st.integers(1, 4)), draw(st.integers(1, 7))
        levels = draw(st.sampled_from([2, 5, 1000]))
        size = draw(st.integers(1, 5)) if cells is None else cells
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        found[name] = candidates(torch.randint(0, levels, shape, generator=generator).float(), size)
    return found


def weights(found: dict) -> int:
    return sum(layer.weights for layer in found.values())


@pytest.mark.parametrize("share", SHARES)
@settings(max_examples=20)
@given(layers(cells=1))
def test_totals_are_exact_and_shares_grow_for_every_target(share, found):
    before = None
    for keep in range(weights(found) + 1):
        counts = share(found, keep)
        assert list(counts) == list(found)
        assert sum(int(count.sum()) for count in counts.values()) == keep
        for name, layer in found.items():
            assert len(counts[name]) in (1, layer.shape[0])
            room = layer.units // len(counts[name])
            assert bool(((counts[name] >= 0) & (counts[name] <= room)).all())
            if before is not None:
                assert bool((counts[name] >= before[name]).all())
        before = counts


@pytest.mark.parametrize("share", SHARES)
@settings(max_examples=20)
@given(layers())
def test_totals_of_larger_units_are_within_half_a_unit_of_the_largest(share, found):
    before = None
    largest = max(layer.cells for layer in found.values())
    for keep in range(weights(found) + 1):
        counts = share(found, keep)
        kept = sum(int(count.sum()) * found[name].cells for name, count in counts.items())
        assert 2 * abs(kept - keep) <= largest
        if before is not None:
            assert all(bool((counts[name] >= before[name]).all()) for name in found)
        before = counts


@settings(max_examples=20)
@given(layers(cells=1), st.data())
def test_layers_have_the_same_sparsity_within_one_weight(found, data):
    whole = weights(found)
    keep = data.draw(st.integers(0, whole))
    for name, count in per_layer(found, keep).items():
        assert abs(int(count) - found[name].units * keep / whole) < 1


@settings(max_examples=20)
@given(layers(cells=1), st.data())
def test_rows_of_a_layer_have_the_same_count_within_one(found, data):
    for count in per_row(found, data.draw(st.integers(0, weights(found)))).values():
        assert int(count.max() - count.min()) <= 1
        assert count.tolist() == sorted(count.tolist(), reverse=True)  # the first rows keep one more


@settings(max_examples=20)
@given(layers(cells=1), st.data())
def test_a_global_cut_takes_what_a_stable_sort_would(found, data):
    keep = data.draw(st.integers(0, weights(found)))
    pooled = torch.cat([layer.scores().reshape(-1) for layer in found.values()])
    pruned = pooled.argsort(stable=True)[: len(pooled) - keep]
    start = 0
    for name, count in globally(found, keep).items():
        end = start + found[name].units
        assert int(count) == found[name].units - int(((pruned >= start) & (pruned < end)).sum())
        start = end


@settings(max_examples=20)
@given(layers(), st.data())
def test_units_of_different_sizes_are_taken_by_their_mean_score(found, data):
    counts = globally(found, data.draw(st.integers(0, weights(found))))
    kept, cut = [], []
    for name, count in counts.items():
        ranked = found[name].scores().reshape(-1).sort().values.tolist()
        split = len(ranked) - int(count)
        cut, kept = cut + ranked[:split], kept + ranked[split:]
    assert not kept or not cut or min(kept) >= max(cut)


def test_ties_across_layers_go_by_order():
    """Trap 2: of equal scores exactly as many are cut as were asked for, the first ones first."""
    found = {"a": candidates(torch.ones(2, 3)), "b": candidates(torch.ones(1, 6))}
    assert {name: int(count) for name, count in globally(found, 8).items()} == {"a": 2, "b": 6}
    assert {name: int(count) for name, count in globally(found, 4).items()} == {"a": 0, "b": 4}


def test_scores_of_minus_infinity_are_cut_first():
    """What earlier masks pruned comes as -inf."""
    low = -float("inf")
    found = {"a": candidates(torch.tensor([[1.0, low, low]])), "b": candidates(torch.tensor([[low, 0.5]]))}
    assert {name: int(count) for name, count in globally(found, 2).items()} == {"a": 1, "b": 1}
    assert {name: int(count) for name, count in globally(found, 1).items()} == {"a": 1, "b": 0}


def test_a_global_cut_asks_for_the_scores_twice():
    """The cost that is promised: no layer's scores are kept, and none are computed a third time."""
    calls = []

    def scores(seed):
        calls.append(seed)
        return torch.rand(40, 50, generator=torch.Generator().manual_seed(seed))

    found = {str(seed): Candidates((40, 50), 1, lambda seed=seed: scores(seed)) for seed in range(3)}
    globally(found, 2000)
    assert calls == [0, 1, 2] * 2
