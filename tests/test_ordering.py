"""The order of channels for N:M: never worse, the best that brute force finds on small cases, errors in words."""

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import NumericError, UsageError
from secateur.ordering import channel_order, kept_score

seeds = st.integers(0, 2**16)


def drawn(rows: int, channels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(channels, generator=generator).exp()
    return torch.rand(rows, channels, generator=generator) * loud


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 4)]), seeds)
def test_an_order_of_all_channels_that_never_keeps_less(rows, groups, shape, seed):
    n, m = shape
    scores = drawn(rows, groups * m, seed)
    order = channel_order(scores, n, m)
    assert sorted(order.tolist()) == list(range(groups * m))
    assert kept_score(scores[:, order], n, m) >= kept_score(scores, n, m)


def test_of_two_places_the_assignment_is_the_best_there_is_for_one_of_them():
    """With the first places of 1:2 fixed, no other order of the second places keeps more."""
    scores = drawn(6, 10, 3)
    order = channel_order(scores, 1, 2).reshape(-1, 2)
    found = kept_score(scores[:, order.flatten()], 1, 2)
    for second in itertools.permutations(order[:, 1].tolist()):
        other = torch.stack([order[:, 0], torch.tensor(second)], 1).flatten()
        assert kept_score(scores[:, other], 1, 2) <= found + 1e-6


def test_near_the_best_of_all_orders():
    """2:4 of 8 channels: 35 ways to make two groups."""
    shares = []
    for seed in range(20):
        scores = drawn(4, 8, seed)
        orders = [
            [*four, *(c for c in range(8) if c not in four)]
            for four in itertools.combinations(range(8), 4)
            if 0 in four
        ]
        best = max(kept_score(scores[:, order], 2, 4) for order in orders)
        shares.append(kept_score(scores[:, channel_order(scores, 2, 4)], 2, 4) / best)
    assert min(shares) > 0.97
    assert sum(shares) / len(shares) > 0.99


def test_loud_channels_that_sit_together_are_parted():
    scores = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]]).expand(3, 8)
    order = channel_order(scores, 2, 4)
    assert kept_score(scores, 2, 4) == 3 * 20.0
    assert kept_score(scores[:, order], 2, 4) == 3 * 36.0


def test_blocks_bound_the_search_and_still_never_keep_less():
    scores = drawn(8, 64, 1)
    kept = [kept_score(scores[:, channel_order(scores, 2, 4, block=block)], 2, 4) for block in (1, 4, 512)]
    assert kept_score(scores, 2, 4) < min(kept)
    assert max(kept) == kept[-1]


@pytest.mark.parametrize("scores", [torch.ones(3, 8), torch.zeros(2, 8)])
def test_where_nothing_is_gained_the_order_stays(scores):
    assert channel_order(scores, 2, 4).tolist() == list(range(8))
    assert channel_order(drawn(3, 8, 0), 4, 4).tolist() == list(range(8))


def test_refusals(monkeypatch):
    with pytest.raises(NumericError, match="NaN or Inf among the scores of the channels"):
        channel_order(torch.tensor([[1.0, float("nan"), 0, 0]]), 2, 4)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[align\]'"):
        channel_order(drawn(2, 8, 0), 2, 4)
