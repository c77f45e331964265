"""Scores on one scale: what does not change a layer's own order, and what then goes first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import Normalised, PerCost, globally
from secateur.core.select import Candidates
from secateur.errors import UsageError

WAYS = ("mean", "standard", "rank")


def layer(scores: torch.Tensor, cells: int = 1, cost: float | None = None) -> Candidates:
    return Candidates(tuple(scores.shape), cells, lambda: scores, cost=None if cost is None else lambda: cost)


@pytest.mark.parametrize("by", WAYS)
@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(0, 99))
def test_totals_are_exact_and_the_scale_of_a_layer_does_not_matter(by, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(1, 20, generator=generator), torch.rand(2, 10, generator=generator)
    found = Normalised(by)({"a": layer(a), "b": layer(b)}, keep)
    assert sum(int(count.sum()) for count in found.values()) == keep
    again = Normalised(by)({"a": layer(a * 64), "b": layer(b / 32)}, keep)  # powers of two: nothing is rounded
    assert found == again


def test_by_mean_and_by_standard_against_the_definition():
    a, b = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[100.0, 110.0, 120.0]])
    for by in ("mean", "standard"):
        scaled = []
        for scores in (a, b):
            x = scores[0].double()
            scaled.append(x / x.mean() if by == "mean" else (x - x.mean()) / x.std(correction=0))
        for keep in range(7):
            cut = torch.cat(scaled).sort().values[6 - keep] if keep else float("inf")
            expected = {name: int((x >= cut).sum()) for name, x in zip("ab", scaled, strict=True)}
            found = Normalised(by)({"a": layer(a), "b": layer(b)}, keep)
            assert {name: int(count) for name, count in found.items()} == expected


def test_by_rank_prunes_alike_everywhere():
    a, b = torch.rand(1, 30), torch.rand(1, 60).square()
    found = Normalised("rank")({"a": layer(a), "b": layer(b)}, 30)
    assert abs(int(found["a"]) - 10) <= 1
    tied = Normalised("rank")({"a": layer(torch.ones(1, 4)), "b": layer(torch.arange(4.0)[None])}, 3)
    assert {name: int(count) for name, count in tied.items()} == {"a": 0, "b": 3}


def test_what_is_pruned_or_has_to_stay_is_no_part_of_the_scale():
    infinity = float("inf")
    a = torch.tensor([[-infinity, 1.0, 3.0, infinity]])
    b = torch.tensor([[10.0, 30.0]])
    for by in WAYS:
        found = Normalised(by)({"a": layer(a), "b": layer(b)}, 1)
        assert {name: int(count) for name, count in found.items()} == {"a": 1, "b": 0}
        found = Normalised(by)({"a": layer(a), "b": layer(b)}, 5)
        assert {name: int(count) for name, count in found.items()} == {"a": 3, "b": 2}
    gone = layer(torch.full((1, 2), -infinity))
    assert int(Normalised()({"a": gone, "b": layer(b)}, 2)["b"]) == 2


def test_equal_scores_have_no_spread():
    found = Normalised("standard")(
        {"a": layer(torch.ones(1, 3)), "b": layer(torch.tensor([[1.0, 2.0, 3.0]]))}, 3
    )
    assert sum(int(count) for count in found.values()) == 3


def test_units_of_unequal_sizes_are_ranked_as_globally_does():
    a, b = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.5, 0.5, 1.0]])
    layers = {"a": layer(a / a.mean(), 10), "b": layer(b / b.mean(), 2)}
    raw = {"a": layer(a, 10), "b": layer(b, 2)}
    for keep in range(0, 27, 2):
        assert Normalised()(raw, keep) == globally(layers, keep)


def test_an_unknown_scale_is_refused():
    with pytest.raises(UsageError, match="normalised by 'mean', 'standard' or 'rank', got 'max'"):
        Normalised("max")


@settings(max_examples=50)
@given(st.integers(0, 2**12 - 1), st.integers(0, 12), st.integers(0, 99))
def test_no_choice_frees_more_for_a_smaller_loss(other, keep, seed):
    """Against every other choice: one that loses less, by scores that can be compared, frees less."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(1, 6, generator=generator), torch.rand(1, 6, generator=generator)
    counts = PerCost("none", 1.0)({"a": layer(a, cost=5.0), "b": layer(b, cost=2.0)}, keep)
    worth, cost = torch.cat([a, b], 1)[0].double(), torch.tensor([5.0] * 6 + [2.0] * 6)
    gone = torch.zeros(12, dtype=torch.bool)
    for start, (scores, name) in enumerate(((a, "a"), (b, "b"))):
        gone[6 * start + scores[0].argsort()[: 6 - int(counts[name])]] = True
    mine = torch.tensor([other >> bit & 1 for bit in range(12)], dtype=torch.bool)
    if worth[mine].sum() < worth[gone].sum() - 1e-6:
        assert cost[mine].sum() < cost[gone].sum()


def test_the_power_of_the_cost():
    a, b = torch.tensor([[1.0, 4.0]]), torch.tensor([[1.0, 4.0]])
    for power, kept in ((0.0, {"a": 1, "b": 1}), (0.5, {"a": 2, "b": 0}), (1.0, {"a": 2, "b": 0})):
        found = PerCost("mean", power)({"a": layer(a, cost=1.0), "b": layer(b, cost=25.0)}, 2)
        assert {name: int(count) for name, count in found.items()} == kept
    for power, kept in ((0.0, {"a": 1, "b": 1}), (0.5, {"a": 1, "b": 1}), (1.0, {"a": 2, "b": 0})):
        found = PerCost("mean", power)({"a": layer(a, cost=1.0), "b": layer(b, cost=9.0)}, 2)
        assert {name: int(count) for name, count in found.items()} == kept


def test_without_a_cost_a_unit_costs_its_weights_and_infinite_scores_stay():
    infinity = float("inf")
    wide = layer(torch.tensor([[2.0, 2.0, infinity]]), cells=8)
    thin = layer(torch.tensor([[1.0, 1.0, -infinity]]), cells=2)
    found = PerCost("none", 1.0)({"wide": wide, "thin": thin}, 12)
    assert {name: int(count) for name, count in found.items()} == {"wide": 1, "thin": 2}


def test_scales_and_powers_that_mean_nothing_are_refused():
    with pytest.raises(UsageError, match="compared by 'mean', 'rank' or 'none', got 'standard'"):
        PerCost("standard")
    with pytest.raises(UsageError, match="power is -1; expected a number of at least 0"):
        PerCost(power=-1.0)
