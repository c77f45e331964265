"""Laws of axis atoms, against a brute-force model of which positions of a dimension stay."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.axes.atoms import Atom, Axes, Label, Reason, size_of
from secateur.core.axes.layout import coordinates, extent, index_map, positions

WHY = Reason("cannot be aligned")


def some_units(axes: Axes, labels: list[Label], seed: int) -> dict[Atom, torch.Tensor]:
    """A random kept set for every free leaf of some labels."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {leaf: None for label in labels for leaf in axes.leaves(label) if leaf.reason is None}
    kept = {}
    for leaf in leaves:
        count = int(torch.randint(1, leaf.size + 1, (), generator=generator))
        kept[leaf] = torch.randperm(leaf.size, generator=generator)[:count].sort().values
    return kept


def alive(axes: Axes, label: Label, kept: dict[Atom, torch.Tensor]) -> list[bool]:
    """For every position of the dimension whether it stays, straight from the definition of the forms."""

    def of(atom: Atom) -> list[bool]:
        top = axes.root(atom)
        if top.form == "product":
            return [all(combination) for combination in itertools.product(*map(of, top.parts))]
        if top.form == "sum":
            return [flag for part in top.parts for flag in of(part)]
        return [top not in kept or unit in kept[top].tolist() for unit in range(top.size)]

    return [all(combination) for combination in itertools.product(*map(of, label))]


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


def refined(data: st.DataObject, axes: Axes, size: int) -> Label:
    """A label of the given size after random views and cuts."""
    draw, label = data.draw, axes.label(size)
    for _ in range(draw(st.integers(0, 3))):
        if size > 1 and draw(st.booleans()):
            bounds = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3)))
            axes.cut(label, bounds)
        elif divisors(size):
            outer = draw(st.sampled_from(divisors(size)))
            axes.regroup(label, (outer, size // outer), WHY)
    return label


SIZES = st.sampled_from([2, 3, 4, 6, 8, 12, 16, 24])


@given(st.data(), SIZES, st.integers(0, 2**16))
def test_unified_labels_keep_the_same_positions(data: st.DataObject, size: int, seed: int) -> None:
    axes = Axes()
    left, right = refined(data, axes, size), refined(data, axes, size)
    axes.unify(left, right, WHY)
    kept = some_units(axes, [left, right], seed)
    assert alive(axes, left, kept) == alive(axes, right, kept)


@given(st.data(), SIZES, SIZES, st.integers(0, 2**16))
def test_unification_is_transitive_and_later_refinements_reach_all(
    data: st.DataObject, size: int, other: int, seed: int
) -> None:
    axes = Axes()
    labels = [refined(data, axes, size) for _ in range(3)]
    axes.unify(labels[0], labels[1], WHY)
    axes.unify(labels[1], labels[2], WHY)
    if divisors(size):
        outer = data.draw(st.sampled_from(divisors(size)))
        axes.regroup(data.draw(st.sampled_from(labels)), (outer, size // outer), WHY)
    axes.cut(data.draw(st.sampled_from(labels)), [data.draw(st.integers(1, size - 1))])
    kept = some_units(axes, labels, seed)
    assert len({tuple(alive(axes, label, kept)) for label in labels}) == 1


@given(st.data(), SIZES, st.integers(0, 2**16))
def test_a_view_keeps_the_same_numbers(data: st.DataObject, size: int, seed: int) -> None:
    axes = Axes()
    label = refined(data, axes, size)
    outer = data.draw(st.sampled_from([1, *divisors(size), size]))
    rows, columns = axes.regroup(label, (outer, size // outer), WHY)
    kept = some_units(axes, [label, rows, columns], seed)
    both = [a and b for a in alive(axes, rows, kept) for b in alive(axes, columns, kept)]
    assert both == alive(axes, label, kept)


@given(st.data(), SIZES, st.integers(0, 2**16))
def test_a_cut_and_a_join_are_inverse(data: st.DataObject, size: int, seed: int) -> None:
    axes = Axes()
    label = refined(data, axes, size)
    bounds = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=3)))
    pieces = axes.cut(label, bounds)
    if pieces is None:
        return
    kept = some_units(axes, [label, *pieces], seed)
    whole = [flag for piece in pieces for flag in alive(axes, piece, kept)]
    assert whole == alive(axes, label, kept) == alive(axes, axes.join(pieces), kept)


@given(st.data(), SIZES, st.integers(0, 2**16))
def test_positions_and_extent_follow_the_definition(data: st.DataObject, size: int, seed: int) -> None:
    axes = Axes()
    label = refined(data, axes, size)
    kept = some_units(axes, [label], seed)
    expected = [i for i, flag in enumerate(alive(axes, label, kept)) if flag]
    found = positions(axes, label, kept)
    assert (list(range(size)) if found is None else found.tolist()) == expected
    assert extent(axes, label, kept) == len(expected)
    assert size_of(label) == size == extent(axes, label, {})


@given(st.data(), SIZES)
def test_index_maps_say_what_goes_with_a_unit(data: st.DataObject, size: int) -> None:
    axes = Axes()
    label = refined(data, axes, size)
    for leaf in coordinates(axes, label):
        table = index_map(axes, label, leaf)
        for unit in range(leaf.size):
            others = torch.tensor([u for u in range(leaf.size) if u != unit], dtype=torch.long)
            gone = [i for i, flag in enumerate(alive(axes, label, {leaf: others})) if not flag]
            assert table[unit].tolist() == gone


@given(st.lists(SIZES, min_size=1, max_size=3), st.data())
def test_what_cannot_be_aligned_is_frozen_and_keeps_its_size(sizes: list[int], data: st.DataObject) -> None:
    axes = Axes()
    label = tuple(atom for size in sizes for atom in axes.label(size))
    total = prod(sizes)
    first = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
    views = axes.regroup(label, (first, total // first), WHY)
    assert [size_of(view) for view in views] == [first, total // first]


def test_a_frozen_axis_freezes_what_it_meets_and_passes_its_reason_on() -> None:
    axes = Axes()
    softmax = Reason("softmax over it", "aten.softmax", "attn")
    one, other = axes.label(6, softmax), axes.label(6)
    axes.unify(other, one, WHY)
    assert axes.why(other) is softmax
    assert str(softmax) == "softmax over it (aten.softmax at attn)"
    assert str(Reason("x", "", "m")) == "x at m"


def test_fused_query_key_value_split_into_equal_heads() -> None:
    axes = Axes()
    fused = axes.label(48)
    q, k, v = axes.cut(fused, [16, 32])
    for part in (q, k, v):
        axes.unify(axes.regroup(part, (4, 4), WHY)[0], axes.regroup(q, (4, 4), WHY)[0], WHY)
    heads = axes.regroup(k, (4, 4), WHY)[0]
    (leaf,) = axes.leaves(heads)
    assert index_map(axes, fused, leaf)[1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]


def test_rotary_halves_couple_positions_half_a_head_apart() -> None:
    axes = Axes()
    head = axes.label(8)
    low, high = axes.cut(head, [4])
    axes.unify(axes.join([high, low]), head, WHY)
    (leaf,) = set(axes.leaves(head))
    assert index_map(axes, head, leaf).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_sum_viewed_as_heads_becomes_a_product_of_a_sum() -> None:
    axes = Axes()
    fused = axes.label(20)
    axes.cut(fused, [12, 16])
    runs, inner = axes.regroup(fused, (5, 4), WHY)
    assert [leaf.size for leaf in axes.leaves(inner)] == [4]
    assert [leaf.size for leaf in axes.leaves(runs)] == [3, 1, 1]


def test_an_axis_that_is_both_rows_and_columns_of_a_product_loses_both() -> None:
    axes = Axes()
    (leaf,) = axes.label(3)
    assert positions(axes, (leaf, leaf), {leaf: torch.tensor([0, 2])}).tolist() == [0, 2, 6, 8]
    assert index_map(axes, (leaf, leaf), leaf)[1].tolist() == [1, 3, 4, 5, 7]


def test_labels_of_different_sizes_are_frozen_not_guessed() -> None:
    axes = Axes()
    left, right = axes.label(6), axes.label(8)
    axes.unify(left, right, WHY)
    assert axes.why(left) is axes.why(right) is WHY


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6)])
def test_views_that_mix_units_are_frozen(sizes: tuple[int, int]) -> None:
    axes = Axes()
    rows, columns = axes.label(3), axes.label(8)
    views = axes.regroup((*rows, *columns), sizes, WHY)
    kept = some_units(axes, [rows, columns, *views], 0)
    inside = [a and b for a in alive(axes, rows, kept) for b in alive(axes, columns, kept)]
    outside = [a and b for a in alive(axes, views[0], kept) for b in alive(axes, views[1], kept)]
    assert inside == outside
