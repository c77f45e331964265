"""Patterns: units partition the weights, masks are unions of units, and every error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secateur.errors import UsageError
from secateur.pattern import NM, Blocks, Columns, Rows, Weights


@st.composite
def pattern_and_shape(draw):
    """A pattern and the shape of a matrix that it cuts without remainder."""
    a, b = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["weights", "nm", "blocks", "rows", "columns"]))
    if kind == "nm":
        m = draw(st.integers(1, 9))
        return NM(draw(st.integers(1, m)), m), (a, b * m)
    if kind == "blocks":
        rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        return Blocks(rows, columns), (a * rows, b * columns)
    return {"weights": Weights(), "rows": Rows(), "columns": Columns()}[kind], (a, b)


def owners(pattern, shape: tuple[int, int], units: tuple[int, int]) -> torch.Tensor:
    """For every weight the unit that holds it, found by keeping one unit at a time."""
    owner = torch.full(shape, -1)
    for unit in range(units[0] * units[1]):
        kept = torch.zeros(units, dtype=torch.bool)
        kept.view(-1)[unit] = True
        mask = pattern.spread(kept, shape)
        assert bool((owner[mask] == -1).all()), "two units share a weight"
        owner[mask] = unit
    assert bool((owner >= 0).all()), "a weight belongs to no unit"
    return owner


@settings(max_examples=25)
@given(pattern_and_shape(), st.data())
def test_masks_are_unions_of_units_that_partition_the_weights(drawn, data):
    pattern, shape = drawn
    units = tuple(pattern.pool(torch.zeros(shape)).shape)
    owner = owners(pattern, shape, units)
    kept = torch.from_numpy(data.draw(hnp.arrays(bool, units)))
    mask = pattern.spread(kept, shape)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask, kept.reshape(-1)[owner])


@settings(max_examples=25)
@given(pattern_and_shape())
def test_spreading_all_is_all_and_none_is_none(drawn):
    pattern, shape = drawn
    units = tuple(pattern.pool(torch.zeros(shape)).shape)
    assert bool(pattern.spread(torch.ones(units, dtype=torch.bool), shape).all())
    assert not bool(pattern.spread(torch.zeros(units, dtype=torch.bool), shape).any())


@settings(max_examples=25)
@given(pattern_and_shape(), st.integers(0, 99))
def test_a_unit_scores_the_mean_of_the_weights_that_it_holds(drawn, seed):
    pattern, shape = drawn
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    pooled = pattern.pool(scores)
    owner = owners(pattern, shape, tuple(pooled.shape))
    expected = torch.stack([scores[owner == unit].mean() for unit in range(pooled.numel())])
    torch.testing.assert_close(pooled.reshape(-1), expected)


@settings(max_examples=25)
@given(pattern_and_shape())
def test_units_of_a_layer_hold_equally_many_weights(drawn):
    pattern, shape = drawn
    units = tuple(pattern.pool(torch.zeros(shape)).shape)
    assert len(set(owners(pattern, shape, units).flatten().bincount().tolist())) == 1


def test_competitions_are_what_the_documentation_says():
    scores = torch.zeros(6, 8)
    assert Weights().pool(scores).shape == (6, 8)  # a row
    assert NM(2, 4).pool(scores).shape == (12, 4)  # a group
    assert Blocks(3, 2).pool(scores).shape == (2, 4)  # a row of blocks
    assert Rows().pool(scores).shape == (1, 6)  # the layer
    assert Columns().pool(scores).shape == (1, 8)  # the layer


def test_groups_are_consecutive_inputs_of_one_row():
    kept = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    assert NM(1, 2).spread(kept, (2, 4)).tolist() == [[True, False, False, True], [True, True, False, False]]


def test_blocks_are_outputs_by_inputs():
    mask = Blocks(2, 1).spread(torch.tensor([[True, False]]), (2, 2))
    assert mask.tolist() == [[True, False], [True, False]]


@settings(max_examples=25)
@given(st.integers(1, 16), st.data())
def test_nm_fixes_the_sparsity_and_the_counts(m, data):
    from secateur.core.select import Candidates

    n = data.draw(st.integers(1, m))
    pattern = NM(n, m)
    assert pattern.sparsity == 1 - n / m
    layers = {"a": Candidates((5, m), 1, lambda: torch.zeros(5, m))}
    assert pattern.allocate(layers, 0)["a"].tolist() == [n] * 5


def test_patterns_are_values():
    assert NM(2, 4) == NM(2, 4) != NM(1, 4)
    assert len({Blocks(4, 1), Blocks(4, 1), Weights(), Rows()}) == 3
    with pytest.raises(AttributeError):
        NM(2, 4).n = 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NM(5, 4), "5:4 keeps 5 of every 4; expected 0 < n <= m"),
        (lambda: NM(0, 4), "0:4 keeps 0 of every 4; expected 0 < n <= m"),
        (lambda: NM(0, 0), "0:0 keeps 0 of every 0; expected 0 < n <= m"),
        (lambda: Blocks(0, 4), "a block of 0 x 4 holds no weight; expected at least 1 x 1"),
        (lambda: Blocks(4, -1), "a block of 4 x -1 holds no weight; expected at least 1 x 1"),
        (lambda: NM(2, 4).pool(torch.zeros(3, 11009)), "11009 input columns cannot be cut 2:4 (11009 % 4 = 1)"),
        (
            lambda: Blocks(4, 1).pool(torch.zeros(6, 8)),
            "6 output rows cannot be cut blocks of 4 x 1 (6 % 4 = 2)",
        ),
        (
            lambda: Blocks(2, 3).pool(torch.zeros(6, 8)),
            "8 input columns cannot be cut blocks of 2 x 3 (8 % 3 = 2)",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(UsageError) as error:
        build()
    assert str(error.value) == message
