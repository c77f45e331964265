"""Exact selection: against sorting, for any data, with ties by index."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secateur.core import cut as cutting
from secateur.core import select
from secateur.core.select import Cut, Magnitudes, apportion, kth_smallest, smallest

pytestmark = pytest.mark.usefixtures("path")  # natively and in torch

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, 1.0, float("inf"), -float("inf"), 1e-45]),
)


def by_sorting(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    order = scores.argsort(dim=1, stable=True)
    marked = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        marked[row, order[row, :count]] = True
    return marked


@given(st.lists(hnp.arrays(np.float32, st.integers(1, 30), elements=FLOATS), min_size=1, max_size=4), st.data())
def test_kth_smallest_is_the_one_that_sorting_finds(arrays, data):
    tensors = [torch.from_numpy(array) for array in arrays]
    joined = torch.cat(tensors)
    k = data.draw(st.integers(1, joined.numel()))
    cut = kth_smallest([lambda t=t: t for t in tensors], k)
    expected = joined.kthvalue(k).values
    assert cut.value == float(expected)
    assert cut.below == int((joined < expected).sum())


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "two scales", "sorted", "few large"])
def test_kth_smallest_on_many_elements(kind, monkeypatch):
    # small limits, so that every branch (bracket missed, too many ties, narrowing) is taken
    for module in (select, cutting):
        monkeypatch.setattr(module, "CHUNK", 1 << 10)
    monkeypatch.setattr(cutting, "SAMPLE", 1 << 8)
    n = 60_000
    made = {
        "normal": torch.randn(n),
        "ties": torch.randint(0, 5, (n,)).float(),
        "constant": torch.full((n,), 0.25),
        "two scales": torch.cat([torch.randn(n // 2) * 1e-20, torch.randn(n // 2) * 1e20]),
        "sorted": torch.arange(n).float(),
        "few large": torch.cat([torch.zeros(n - 7), torch.arange(7).float()]),
    }[kind]
    for k in (1, 2, n // 3, n // 2, n - 5, n):
        cut = kth_smallest([lambda: made[:1000], lambda: made[1000:]], k)
        expected = made.kthvalue(k).values
        assert cut == Cut(float(expected), int((made < expected).sum()))


def test_kth_smallest_refuses_ranks_outside():
    with pytest.raises(IndexError, match=r"k = 4 is not in 1\.\.3"):
        kth_smallest([lambda: torch.zeros(3)], 4)


@given(st.integers(1, 12), st.integers(1, 40), st.booleans(), st.data())
def test_smallest_is_a_stable_sort(rows, columns, tied, data):
    elements = st.integers(0, 3).map(float) if tied else FLOATS
    scores = torch.from_numpy(data.draw(hnp.arrays(np.float32, (rows, columns), elements=elements)))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    assert torch.equal(smallest(scores, counts), by_sorting(scores, counts))


@pytest.mark.parametrize("shape", [(1, 5000), (3, 5000), (500, 20), (500, 4)])
def test_smallest_across_chunks(shape, monkeypatch):
    for module in (select, cutting):
        monkeypatch.setattr(module, "CHUNK", 1 << 10)
    for scores in (torch.randn(shape), torch.randint(0, 3, shape).float(), torch.zeros(shape)):
        counts = torch.randint(0, shape[1] + 1, (shape[0],))
        assert torch.equal(smallest(scores, counts), by_sorting(scores, counts))


@given(st.integers(1, 6), st.integers(1, 40), st.data())
def test_magnitudes_are_chosen_from_as_scores_are(rows, columns, data):
    weights = torch.from_numpy(data.draw(hnp.arrays(np.float32, (rows, columns), elements=FLOATS)))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    assert torch.equal(smallest(Magnitudes(weights), counts), by_sorting(weights.abs(), counts))
    assert torch.equal(
        smallest(Magnitudes(weights.t()).reshape(1, -1), counts[:1]),
        by_sorting(weights.t().abs().reshape(1, -1), counts[:1]),
    )
    k = data.draw(st.integers(1, weights.numel()))
    parts = [lambda r=r: Magnitudes(weights[r : r + 1]) for r in range(rows)]
    assert kth_smallest(parts, k) == kth_smallest([lambda: weights.abs()], k)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
@example([0, 0])
def test_apportion_is_exact_and_never_takes_a_share_back(sizes):
    before = [0] * len(sizes)
    for total in range(sum(sizes) + 1):
        shares = apportion(sizes, total)
        assert sum(shares) == total
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        assert all(now >= then for now, then in zip(shares, before, strict=True))
        before = shares


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_apportion_of_equal_sizes_is_within_one(size, parts, data):
    total = data.draw(st.integers(0, size * parts))
    assert max(s := apportion([size] * parts, total)) - min(s) <= 1


def test_apportion_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="cannot split 5 over 4"):
        apportion([2, 2], 5)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("past", [-3, 0, 1, 1000])
def test_many_ties_at_the_cut_cost_few_passes(share, past, monkeypatch):
    """What is asked for ends where a mass of equal scores ends: a model that is pruned already."""
    size = 500_000
    for module in (select, cutting):  # several chunks of several samples, as of a larger model
        monkeypatch.setattr(module, "CHUNK", 1 << 18)
    monkeypatch.setattr(cutting, "SAMPLE", 1 << 14)
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.1
    ties = int(share * size)
    scores[:ties] = 0.0
    asked = []

    def part():
        asked.append(1)
        return scores

    cut = kth_smallest([part], ties + past)
    expected = 0.0 if past <= 0 else float(scores[ties:].kthvalue(past).values)
    assert (cut.value, cut.below) == (pytest.approx(expected, abs=0), ties + past - 1 if past > 0 else 0)
    assert len(asked) <= 8
