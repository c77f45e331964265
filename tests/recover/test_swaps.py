"""Swaps: the loss falls with every swap, the best pair is found, counts of rows and groups stay."""

from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import NM, Blocks
from secateur.errors import UsageError
from secateur.recover import LeastSquares, SparseGPT, Swaps, loss
from secateur.recover.quadratic import pose

from .problems import choice, correlated


def masked_losses(weight, moment, mask, limits, group=8):
    """The loss after each number of swaps, as `refine` sees it."""
    return [
        loss(weight * Swaps(limit=limit).refine(weight, mask, moment, group), weight, moment)
        for limit in limits
    ]


def neighbours(mask: torch.Tensor, group: int) -> list[torch.Tensor]:
    """Every mask of one row that is one swap away."""
    found = []
    for leave, enter in product(mask.nonzero()[:, 0].tolist(), (~mask).nonzero()[:, 0].tolist()):
        if leave // group == enter // group:
            other = mask.clone()
            other[leave], other[enter] = False, True
            found.append(other)
    return found


@given(st.integers(0, 8), st.integers(0, 999), st.sampled_from([4, 8]))
def test_every_swap_is_the_best_one(keep, seed, group):
    """Rows of 8 weights: against all swaps there are."""
    weight, moment = correlated(1, 8, 20, seed)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:keep]] = True
    for _ in range(12):
        after = Swaps(limit=1).refine(weight, mask, moment, group)
        tried = [loss(weight * m, weight, moment) for m in neighbours(mask[0], group)]
        before = loss(weight * mask, weight, moment)
        best = min(tried, default=before)
        expected = min(best, before)
        assert loss(weight * after, weight, moment) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert torch.equal(after, mask) == (best >= before * (1 - 1e-12))
        mask = after


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
def test_the_loss_never_rises(out, keep, seed):
    weight, moment = correlated(out, 8, 20, seed)
    mask = choice(weight, None, torch.tensor([out * keep]))()
    losses = masked_losses(weight, moment, mask, range(6))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))


def test_the_end_is_no_worse_than_any_neighbour_and_near_the_best_mask():
    near = 0
    for seed in range(20):
        weight, moment = correlated(1, 8, 20, seed)
        found = Swaps().refine(weight, choice(weight, moment, torch.tensor([4]))(), moment, 8)
        reached = loss(weight * found, weight, moment)
        assert all(reached <= loss(weight * m, weight, moment) * (1 + 1e-9) for m in neighbours(found[0], 8))
        every = [
            loss(weight * torch.tensor([j in kept for j in range(8)]), weight, moment)
            for kept in combinations(range(8), 4)
        ]
        near += reached <= 1.1 * min(every)
    assert near >= 15


@pytest.mark.parametrize(
    ("counts", "parts"), [(torch.tensor([200]), {}), (torch.tensor([2]), {"pattern": NM(2, 4)})]
)
def test_counts_of_rows_and_groups_stay(counts, parts):
    weight, moment = correlated(12, 32, 100, dtype=torch.float32)
    choose = choice(weight, moment, counts, **parts)
    before = choose()
    found = Swaps(then=None)(weight, choose, moment)
    assert not torch.equal(found.mask, before)
    assert torch.equal(found.mask.sum(1), before.sum(1))
    assert torch.equal(found.weight, weight * found.mask)
    problem = pose(weight, moment)
    assert loss(problem.target * found.mask, problem.target, problem.moment) < loss(
        problem.target * before, problem.target, problem.moment
    )
    if parts:
        assert (found.mask.reshape(-1, 4).sum(1) == 2).all()


def test_few_candidates_still_lower_the_loss():
    weight, moment = correlated(12, 64, 200)
    mask = choice(weight, moment, torch.tensor([384]))()
    dense = loss(weight * mask, weight, moment)
    few = loss(weight * Swaps(candidates=4).refine(weight, mask, moment, 64), weight, moment)
    all_ = loss(weight * Swaps(candidates=64).refine(weight, mask, moment, 64), weight, moment)
    assert few < 0.9 * dense
    assert all_ < 0.9 * dense


@pytest.mark.parametrize("then", [LeastSquares(), SparseGPT()])
def test_another_update_takes_the_refined_mask(then):
    weight, moment = correlated(12, 32, 100, dtype=torch.float32)
    choose = choice(weight, moment, torch.tensor([150]))
    alone, mended = Swaps(then=None)(weight, choose, moment), Swaps(then=then)(weight, choose, moment)
    assert torch.equal(alone.mask, mended.mask)
    assert loss(mended.weight, weight, moment) < loss(alone.weight, weight, moment)
    assert loss(mended.weight, weight, moment) < loss(weight * choose(), weight, moment)


def test_units_that_are_no_single_weights_are_refused():
    weight, moment = correlated(4, 8, 30)
    with pytest.raises(UsageError, match="swaps trade single weights"):
        Swaps()(weight, choice(weight, moment, torch.tensor([4]), pattern=Blocks(2, 2)), moment)
