"""Shares, Slope and OWL: totals exact, growing, and as published."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.outliers import OWL
from secateur.allocate.shares import Shares, Slope, block_of
from secateur.core.select import Candidates
from secateur.errors import NumericError, UsageError

NAMES = ["h.0.a.weight", "h.0.b.weight", "h.1.a.weight", "head.weight"]


def candidates(scores: torch.Tensor, cells: int = 1) -> Candidates:
    return Candidates(tuple(scores.shape), cells, lambda: scores)


@st.composite
def layers(draw, cells=1):
    found = {}
    for name in NAMES[: draw(st.integers(1, 4))]:
        shape = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        size = draw(st.integers(1, 5)) if cells is None else cells
        scores = torch.rand(shape, generator=generator) ** 8
        found[name] = candidates(scores, size)
    return found


fractions = st.floats(0, 1)


MAKE = {
    "shares": lambda first, second, rows: Shares({"h.0.*": first, "*": second}, rows),
    "slope": lambda first, second, rows: Slope(first - second, rows),
    "owl": lambda first, second, rows: OWL(0.5 + 5 * first, second / 2, rows),
}
choices = st.tuples(st.sampled_from(list(MAKE)), fractions, fractions, st.booleans())


def made(choice):
    return MAKE[choice[0]](*choice[1:])


@settings(max_examples=12)
@given(layers(), choices)
def test_totals_are_exact_and_shares_grow_for_every_target(found, choice):
    allocate = made(choice)
    whole = sum(layer.weights for layer in found.values())
    before = None
    for keep in range(whole + 1):
        counts = allocate(found, keep)
        assert list(counts) == list(found)
        assert sum(int(count.sum()) for count in counts.values()) == keep
        for name, layer in found.items():
            assert len(counts[name]) == (layer.shape[0] if allocate.rows else 1)
            assert bool((counts[name] >= 0).all())
            assert bool((counts[name] <= layer.units // len(counts[name])).all())
            assert int(counts[name].max() - counts[name].min()) <= 1
            if before is not None:
                assert bool((counts[name] >= before[name]).all())
        before = counts


@settings(max_examples=6)
@given(layers(cells=None), choices)
@pytest.mark.thorough
def test_totals_of_larger_units_are_within_half_a_unit_of_the_largest(found, choice):
    allocate = made(choice)
    largest = max(layer.cells for layer in found.values())
    for keep in range(sum(layer.weights for layer in found.values()) + 1):
        counts = allocate(found, keep)
        kept = sum(int(count.sum()) * found[name].cells for name, count in counts.items())
        assert 2 * abs(kept - keep) <= largest


def test_shares_that_average_to_the_target_are_met_as_given():
    found = {name: candidates(torch.rand(10, 100)) for name in NAMES}
    sparsities = dict(zip(NAMES, (0.2, 0.4, 0.6, 0.8), strict=True))
    counts = Shares(sparsities)(found, 2000)
    assert [int(counts[name]) for name in NAMES] == [800, 600, 400, 200]


def test_shares_scale_densities_and_spill_what_exceeds_one():
    found = {name: candidates(torch.rand(10, 100)) for name in NAMES[:2]}
    counts = Shares({NAMES[0]: 0.2, NAMES[1]: 0.6})(found, 1500)  # 0.8 and 0.4, times 1.25
    assert [int(counts[name]) for name in NAMES[:2]] == [1000, 500]
    counts = Shares({NAMES[0]: 0.2, NAMES[1]: 0.6})(found, 1800)
    assert [int(counts[name]) for name in NAMES[:2]] == [1000, 800]


def test_a_layer_given_sparsity_one_keeps_weights_only_where_the_others_cannot():
    found = {name: candidates(torch.rand(10, 100)) for name in NAMES[:2]}
    dead = Shares({NAMES[0]: 1.0, NAMES[1]: 0.5})
    assert [int(n) for n in dead(found, 600).values()] == [0, 600]
    assert [int(n) for n in dead(found, 1200).values()] == [200, 1000]


def test_a_name_wins_over_a_glob_and_equal_shares_are_equal():
    shares = Shares([("*", 0.5), ("head.weight", 0.1)])
    assert shares.of("head.weight") == 0.1
    assert shares.of("h.0.a.weight") == 0.5
    assert shares == Shares({"*": 0.5, "head.weight": 0.1})
    assert hash(shares) == hash(Shares({"*": 0.5, "head.weight": 0.1}))


def test_slope_is_an_arithmetic_progression_over_blocks():
    found = {f"h.{i}.{part}.weight": candidates(torch.rand(10, 100)) for i in range(5) for part in "ab"}
    counts = Slope(0.4)(found, 5000)
    assert [int(counts[f"h.{i}.a.weight"]) for i in range(5)] == [700, 600, 500, 400, 300]
    assert all(counts[f"h.{i}.a.weight"] == counts[f"h.{i}.b.weight"] for i in range(5))


def test_owl_is_the_published_arithmetic_for_blocks_of_equal_size():
    generator = torch.Generator().manual_seed(3)
    found = {
        f"h.{i}.{part}.weight": candidates(torch.randn(40, 50, generator=generator).abs() ** (1 + i))
        for i in range(4)
        for part in "ab"
    }
    outliers = []
    for i in range(4):
        whole = torch.cat([found[f"h.{i}.{part}.weight"].scores().flatten() for part in "ab"])
        outliers.append(100 * float((whole > 5 * whole.mean()).float().mean()))
    ratios = torch.tensor(outliers)
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    ratios = ratios - ratios.mean() + 0.3
    counts = OWL()(found, round(0.3 * 16000))
    for i in range(4):
        assert abs(int(counts[f"h.{i}.a.weight"]) - 2000 * float(ratios[i])) <= 1


def test_owl_prunes_equal_blocks_alike_and_leaves_out_what_is_pruned():
    scores = torch.rand(10, 100)
    pruned = scores.clone()
    pruned[5:] = -float("inf")
    owl = OWL(multiple=1.5)
    assert [int(n) for n in owl({n: candidates(scores) for n in NAMES}, 2000).values()] == [500] * 4
    alive = scores[:5]
    expected = float((alive > 1.5 * alive.mean()).float().mean())
    assert owl.outliers({"h.0.weight": candidates(pruned)}) == {"h.0": pytest.approx(expected)}


def test_blocks_are_told_from_names():
    names = ["encoder.block.2.layer.0.SelfAttention.q.weight", "layer1.0.conv1.weight", "fc.weight", "0.weight"]
    assert [block_of(name) for name in names] == ["encoder.block.2", "layer1.0", "fc", "0"]


def test_slips_are_named():
    found = {name: candidates(torch.rand(2, 4)) for name in NAMES}
    with pytest.raises(UsageError, match=r"share of 'a': sparsity 50 is not in \[0, 1\]"):
        Shares({"a": 50.0})
    with pytest.raises(UsageError, match="shares are empty"):
        Shares({})
    with pytest.raises(UsageError, match=r"h.1.a.weight: no share is given for it; add one"):
        Shares({"h.0.*": 0.5})(found, 4)
    with pytest.raises(UsageError, match=r"'hed.weight' matches none of the 4 layers; nearest: head.weight"):
        Shares({"hed.weight": 0.5, "*": 0.1})(found, 4)
    with pytest.raises(UsageError, match=r"rise 2 is not in \[-1, 1\]"):
        Slope(2.0)
    with pytest.raises(UsageError, match="multiple of OWL is 0;"):
        OWL(multiple=0.0)
    with pytest.raises(UsageError, match=r"spread of OWL is 0\.6"):
        OWL(spread=0.6)
    with pytest.raises(NumericError, match=r"h\.0\.a\.weight: OWL compares scores"):
        OWL()({NAMES[0]: candidates(-torch.rand(2, 4))}, 4)
