from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secateur.errors import InputError, NumericError, UsageError
from secateur.report import CountBelow, Histogram, histogram
from secateur.report.packing import pack_counts, unpack_counts

settings.register_profile("report", deadline=None, max_examples=60)
settings.load_profile("report")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.bool]
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    elements = st.one_of(finite32, st.sampled_from([0.0, -0.0, 1.0, -0.5, 2.0**-20, 5e-324]))
    array = draw(hnp.arrays(np.float64, st.integers(0, 60), elements=elements))
    dtype = draw(st.sampled_from(DTYPES))
    values = torch.from_numpy(array)
    if not dtype.is_floating_point:
        values = values.clamp(-100, 100)
    return values.clamp(-60000, 60000).to(dtype)


def brute(values: torch.Tensor, counted: Histogram) -> tuple[list[int], list[int]]:
    """Counts by comparing every value with the edges of every bin."""
    edges = [counted.grid.edge(i) for i in range(max(len(counted.negative), len(counted.positive)) + 1)]
    numbers = values.double()
    rows = []
    for sign in (-1, 1):
        side = sign * numbers[sign * numbers > 0]
        rows.append([int(((side >= a) & (side < b)).sum()) for a, b in itertools.pairwise(edges)])
    return rows[0], rows[1]


def padded(counts: tuple[int, ...], length: int) -> list[int]:
    return list(counts) + [0] * (length - len(counts))


@given(tensors(), st.sampled_from([1, 2, 16, 64, 256]), st.integers(1, 12))
def test_counts_agree_with_comparing_every_value_with_every_edge(values, bins, octaves):
    counted = histogram(values, bins=bins, octaves=octaves)
    negative, positive = brute(values, counted)
    assert padded(counted.negative, len(negative)) == negative
    assert padded(counted.positive, len(positive)) == positive
    assert counted.zeros == int((values == 0).sum())
    assert counted.n == values.numel()
    numbers = values.double().numpy()
    if len(numbers):
        assert (counted.min, counted.max) == (numbers.min(), numbers.max())
        scale = max(abs(numbers).max(), 1e-300)
        assert counted.mean == pytest.approx(numbers.mean(), abs=1e-12 * scale)
        assert counted.std == pytest.approx(numbers.std(), abs=1e-7 * scale)


@given(tensors(), tensors())
def test_merge_is_the_histogram_of_both_together(one, two):
    both = histogram(torch.cat([one.double(), two.double()]))
    merged = histogram(one).merge(histogram(two))
    for field in ("bins", "exponent", "negative", "positive", "zeros", "n", "min", "max"):
        assert getattr(merged, field) == getattr(both, field), field
    scale = max(abs(both.min), abs(both.max), 1e-300)
    assert merged.mean == pytest.approx(both.mean, abs=1e-12 * scale)
    assert merged.std == pytest.approx(both.std, abs=1e-7 * scale)


@given(tensors(), tensors())
def test_merging_different_bins_gives_the_coarser(one, two):
    merged = histogram(one, bins=64).merge(histogram(two, bins=8))
    both = histogram(torch.cat([one.double(), two.double()]), bins=8)
    assert (merged.bins, merged.negative, merged.positive) == (8, both.negative, both.positive)


@given(tensors())
def test_json_round_trip_is_exact(values):
    counted = histogram(values)
    assert Histogram.from_dict(json.loads(json.dumps(counted.to_dict(), allow_nan=False))) == counted


@given(tensors(), st.floats(0, 1e6), st.sampled_from([4, 64]))
def test_the_count_below_a_threshold_keeps_its_bounds(values, tau, bins):
    counted = histogram(values, bins=bins)
    true = int((values.double().abs() < tau).sum())
    below = counted.count_below(tau)
    assert below.low <= true <= below.high
    assert below.low <= below.estimate <= below.high
    width = max(tau, math.ldexp(1, counted.exponent)) / bins
    near = (values.double().abs() >= tau - width) & (values.double().abs() <= tau + width) & (values != 0)
    assert below.error <= int(near.sum())


@given(tensors())
def test_the_count_below_an_edge_is_exact(values):
    counted = histogram(values)
    for index in range(0, len(counted.magnitudes) + 1, 7):
        edge = counted.grid.edge(index)
        true = int((values.double().abs() < edge).sum())
        assert counted.count_below(edge) == (true, true, true)


def test_the_zero_spike_is_apart_and_a_denormal_is_no_zero():
    counted = histogram(torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.5]))
    assert counted.zeros == 2
    assert (counted.negative, counted.positive[0], counted.n) == ((1,), 1, 5)


def test_a_permuted_and_an_expanded_tensor_of_several_chunks():
    values = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    stacked = values.expand(2, 700, 900)
    assert histogram(values.T).magnitudes == histogram(values).magnitudes
    assert histogram(stacked).magnitudes == tuple(2 * c for c in histogram(values).magnitudes)
    counted = histogram(values.t()[::3, ::2])
    assert counted.n == values.t()[::3, ::2].numel()
    assert counted.std == pytest.approx(values.t()[::3, ::2].double().std(correction=0).item(), rel=1e-12)


def test_memory_stays_small():
    import tracemalloc

    values = torch.zeros(1, dtype=torch.bfloat16).expand(6000, 1000)
    histogram(values[:1])
    tracemalloc.start()
    histogram(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000


def test_the_shape_of_a_normal_distribution():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    counted = histogram(values)
    assert counted.count_below(1.0).estimate / counted.n == pytest.approx(0.6827, abs=0.004)
    assert counted.count_below(0.67449).error / counted.n < 0.02
    assert counted.limit >= counted.max
    assert len(json.dumps(counted.to_dict())) < 2048


def test_no_values_and_only_zeros():
    empty, zeros = histogram(torch.empty(0, 3)), histogram(torch.zeros(4))
    assert (empty.n, empty.limit, empty.std, empty.min) == (0, 0.0, 0.0, 0.0)
    assert (zeros.n, zeros.zeros, zeros.limit) == (4, 4, 0.0)
    assert empty.merge(zeros) == zeros == zeros.merge(empty)
    assert empty.count_below(1.0) == CountBelow(0, 0, 0)
    assert zeros.count_below(0.0) == CountBelow(0, 0, 0)
    assert zeros.count_below(1e-9) == CountBelow(4, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused_by_name(dtype):
    values = torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0], dtype=dtype)
    with pytest.raises(NumericError, match=r"^layers\.3\.up: 1 NaN and 2 infinite among the 5 values"):
        histogram(values, name="layers.3.up")


def test_other_refusals():
    with pytest.raises(
        NumericError, match=r"^w holds a magnitude of 1e\+300; a histogram needs less than 2\^500"
    ):
        histogram(torch.tensor([1e300], dtype=torch.float64), name="w")
    with pytest.raises(UsageError, match=r"^bins is 48, expected a power of two from 1 to 256\.$"):
        histogram(torch.ones(2), bins=48)
    with pytest.raises(UsageError, match=r"^octaves is 0, expected an integer from 1 to 64\.$"):
        histogram(torch.ones(2), octaves=0)
    with pytest.raises(
        UsageError, match=r"^w is on the meta device, without values; a histogram needs a dense"
    ):
        histogram(torch.ones(2, device="meta"), name="w")
    with pytest.raises(UsageError, match=r"^tensor is torch\.complex64 in torch\.strided; a histogram needs"):
        histogram(torch.ones(2, dtype=torch.complex64))
    for tau in (-1.0, math.nan, math.inf):
        with pytest.raises(
            UsageError, match=r"^tau is .*, expected a magnitude: a finite number of at least 0\.$"
        ):
            histogram(torch.ones(2)).count_below(tau)


@given(st.lists(st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 2**53 - 1))))
def test_counts_survive_packing(counts):
    assert unpack_counts(pack_counts(counts)) == counts


@given(st.text(max_size=40))
def test_any_text_is_counts_or_an_error(text):
    try:
        counts = unpack_counts(text)
    except InputError:
        return
    assert all(0 <= count < 2**53 for count in counts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "stored counts are no base64"),
        ("gA==", "stored counts end within a number"),
        ("/////////////w==", r"stored counts hold a number above 2\^53 - 1"),
        (pack_counts([0] * 50), "stored counts hold more than 20 bins"),
        (pack_counts([1] * 50), "stored counts hold more than 20 bins"),
        (None, "stored counts are NoneType, expected text"),
    ],
)
def test_damaged_counts(text, message):
    with pytest.raises(InputError, match=f"^{message}.*Write the file again"):
        unpack_counts(text, most=20)


def test_counts_that_cannot_be_stored():
    with pytest.raises(UsageError, match=r"^bin 1: count -3 is not in \[0, 2\^53 - 1\]"):
        pack_counts([1, -3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 7}, "its counts make 4 values of which 1 are zeros, expected n = 7"),
        ({"n": "4"}, "n is '4', expected an integer"),
        ({"zeros": -1, "n": 2}, "its counts make 2 values of which -1 are zeros"),
        ({"bins": 3}, "bins 3 and exponent -8 are no grid of this format"),
        ({"exponent": 4000}, "bins 32 and exponent 4000 are no grid"),
        ({"std": math.nan}, "std is nan, expected a finite number"),
        ({"min": None}, "min is None, expected a finite number"),
    ],
)
def test_a_damaged_histogram(change, message):
    stored = histogram(torch.tensor([0.0, -0.25, 0.26, 0.75])).to_dict() | change
    with pytest.raises(InputError, match=f"^stored histogram: {message}"):
        Histogram.from_dict(stored)


@pytest.mark.shared
def test_every_layer_of_a_real_model(shared):
    from safetensors.torch import load_file

    weights = load_file(shared / "models" / "stories260K" / "model.safetensors")
    for name, weight in weights.items():
        counted = histogram(weight, name=name)
        assert counted.n == weight.numel()
        edge = counted.grid.edge(len(counted.magnitudes) // 2)
        below = counted.count_below(edge)
        assert (below.error, below.low) == (0, int((weight.abs() < edge).sum()))
        pruned = histogram(weight.masked_fill(weight.abs() < edge, 0.0), name=name)
        assert pruned.zeros == below.low
        assert sum(pruned.magnitudes) == counted.n - below.low
