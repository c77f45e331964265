"""Counts that every place can have: laws, and the nearest total by trying everything."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.feasible import coarsest, feasible, neighbours
from secateur.core.select import Candidates


def place(units: int, cells: int = 1, least: int = 1, step: int = 1, alike: str = "") -> Candidates:
    return Candidates((1, units), cells, lambda: torch.rand(1, units), least, step, alike)


def plain(counts) -> dict[str, int]:
    return {name: int(count.sum()) for name, count in counts.items()}


def tensors(counts: dict[str, int]):
    return {name: torch.tensor([count]) for name, count in counts.items()}


@st.composite
def places(draw):
    found, wanted = {}, {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        units = draw(st.integers(1, 24))
        least, step = draw(st.integers(1, units)), draw(st.sampled_from([1, 2, 3, 8]))
        found[name] = place(units, draw(st.integers(1, 5)), least, step)
        wanted[name] = draw(st.integers(0, units))
    return found, wanted


@settings(max_examples=60)
@given(places(), st.floats(0, 1))
def test_every_count_is_one_that_its_place_can_have(drawn, share):
    layers, wanted = drawn
    keep = round(share * sum(layer.weights for layer in layers.values()))
    for goal in (None, keep):
        found = plain(feasible(layers, tensors(wanted), goal))
        for name, layer in layers.items():
            assert layer.least <= found[name] <= layer.units
            assert found[name] == layer.units or found[name] % layer.step == 0


@settings(max_examples=60)
@given(places())
def test_counts_that_can_be_had_stay_whatever_the_total(drawn):
    layers, _ = drawn
    fine = {name: layer.units for name, layer in layers.items()}
    assert plain(feasible(layers, tensors(fine), 0)) == fine


@settings(max_examples=40)
@given(places())
def test_no_single_step_comes_nearer_to_the_total(drawn):
    layers, wanted = drawn
    keep = sum(layers[name].cells * count for name, count in wanted.items())
    found = plain(feasible(layers, tensors(wanted), keep))
    if found == wanted:
        return
    total = sum(layers[name].cells * count for name, count in found.items())
    for name, layer in layers.items():
        options = [k for k in range(layer.units) if k % layer.step == 0 and k >= layer.least] + [layer.units]
        at = options.index(found[name])
        for other in options[max(0, at - 1) : at + 2]:
            assert abs(total - keep) <= abs(total + (other - found[name]) * layer.cells - keep)


def test_alike_places_keep_equally_many():
    layers = {"a": place(8, alike="x"), "b": place(8, alike="x"), "c": place(8)}
    found = plain(feasible(layers, tensors({"a": 2, "b": 5, "c": 4}), 11))
    assert found["a"] == found["b"]
    assert sum(found.values()) in (11, 12)
    best = min(abs(2 * a + c - 11) for a, c in itertools.product(range(1, 9), repeat=2))
    assert abs(sum(found.values()) - 11) == best
    assert plain(feasible(layers, tensors({"a": 3, "b": 3, "c": 1}), 0)) == {"a": 3, "b": 3, "c": 1}


def test_places_that_ask_for_nothing_are_left_alone():
    layers = {"a": Candidates((3, 4), 1, lambda: torch.rand(3, 4)), "b": place(10, step=4)}
    counts = {"a": torch.tensor([0, 4, 1]), "b": torch.tensor([5])}
    found = feasible(layers, counts, 10)
    assert torch.equal(found["a"], counts["a"])
    assert int(found["b"]) == 4
    assert feasible({"a": layers["a"]}, {"a": counts["a"]}, 3) == {"a": counts["a"]}


def test_the_coarsest_step_counts_all_places_that_move_together():
    assert coarsest({"a": place(8, 3), "b": place(8, 5)}) == 5
    assert coarsest({"a": place(8, 3, step=4), "b": place(8, 5)}) == 12
    assert coarsest({"a": place(8, 3, alike="x"), "b": place(8, 5, alike="x")}) == 8
    assert coarsest({"a": place(2, 3, step=8)}) == 6


def test_neighbours_move_one_group_by_one_step():
    layers = {"a": place(8, alike="x", least=2), "b": place(8, alike="x", least=2), "c": place(9, step=4)}
    found = [plain(counts) for counts in neighbours(layers, tensors({"a": 2, "b": 2, "c": 8}))]
    assert found == [{"a": 3, "b": 3, "c": 8}, {"a": 2, "b": 2, "c": 4}, {"a": 2, "b": 2, "c": 9}]
