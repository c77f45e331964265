"""Rounding to few integers: zeros exact, never worse than plain rounding, and bytes that come back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core import native
from secateur.deploy.grid import Grid, divided, from_grid, to_grid
from secateur.deploy.packing import pack, size_packed, unpack
from secateur.errors import InputError, NumericError, UsageError


def plain(rows, bits):
    """What everybody does: the scale that reaches the largest weight."""
    largest = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(-1, keepdim=True) / largest
    return (rows / scale.clamp(min=1e-30)).round().clamp(-largest, largest) * scale


@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.sampled_from([None, 3, 6]), st.floats(1e-3, 1e3))
def test_zeros_stay_and_the_error_is_no_larger_than_plain_roundings(seed, bits, group, size):
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 5, 12, generator=draw) * size
    w[torch.rand(2, 5, 12, generator=draw) < 0.4] = 0
    grid = to_grid(w, bits, group)
    found = from_grid(grid)
    assert not found[w == 0].any()
    assert grid.integers.abs().max() <= 2 ** (bits - 1) - 1
    assert grid.scale.shape == (2, 5, 12 // (group or 12))
    expected = plain(w.reshape(-1, group or 12), bits).reshape(w.shape)
    # a scale rounded to float16 errs by 2^-11 of itself where plain rounding may hit the largest weight exactly
    rounding = 3e-7 * w.square().sum()
    assert (found - w).square().sum() <= 1.1 * (expected - w).square().sum() + rounding


def test_clipping_pays_with_few_levels():
    w = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    found = (from_grid(to_grid(w, 4)) - w).square().sum()
    assert found < 0.9 * (plain(w, 4) - w).square().sum()


def test_by_hand():
    grid = to_grid(torch.tensor([[[7.0, -3.0, 0.0, 1.4], [0.0, 0.0, 0.0, 0.0]]]), 4)
    assert grid.integers[0, 1].tolist() == [0, 0, 0, 0]
    assert grid.scale[0, 1].item() == 1
    assert from_grid(grid)[0, 0].tolist() == [7.0, -3.0, 0.0, 1.0]
    groups = to_grid(torch.tensor([[[100.0, 50.0, 1.0, 0.5]]]), 8, 2)
    assert torch.allclose(from_grid(groups), torch.tensor([[[100.0, 50.0, 1.0, 0.5]]]), rtol=0.01)


def test_scales_fit_float16_where_they_can():
    scale = to_grid(torch.randn(1, 40, 8), 8).scale
    assert torch.equal(scale.half().float(), scale)
    tiny = to_grid(torch.randn(1, 4, 8) * 1e-9, 8)
    assert torch.allclose(from_grid(tiny), from_grid(tiny), rtol=0)
    assert (tiny.scale < 1e-9).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_number(bad):
    with pytest.raises(NumericError, match="NaN or Inf among the weights"):
        to_grid(torch.tensor([[[1.0, bad]]]), 8)


def test_a_group_divides_the_columns():
    for columns in range(1, 200):
        for group in (1, 2, 16, 32, 128):
            found = divided(columns, group)
            assert found is None or (columns % found == 0 and found <= group)
            if columns % group == 0:
                assert found == group
    with pytest.raises(UsageError, match="group is 0; expected at least 1, or None"):
        divided(8, 0)


@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.integers(1, 70), st.floats(0, 1))
def test_packed_integers_come_back(seed, bits, count, sparsity):
    draw = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    q = torch.randint(low, -low, (count,), generator=draw).to(torch.int8)
    q[torch.rand(count, generator=draw) < sparsity] = 0
    packed = pack(q, bits)
    assert torch.equal(unpack(packed, bits, (count,), "w"), q)
    whole, sparse = size_packed(count, int((q != 0).sum()), bits)
    assert sum(part.numel() for part in packed.values()) == min(whole, sparse)


def test_half_of_the_zeros_are_worth_their_marks():
    q = torch.arange(1, 65, dtype=torch.int8).repeat(16)
    assert set(pack(q, 8)) == {"values"}
    q[::2] = 0
    assert set(pack(q, 8)) == {"values", "kept"}
    assert sum(part.numel() for part in pack(q, 8).values()) == 128 + 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(values=p["values"][:-1]), "3 bytes of values, 8 integers of 4 bits need 4"),
        (
            lambda p: p.update(values=p["values"].float()),
            "packed as 1-dimensional torch.float32; expected bytes",
        ),
        (lambda p: p.update(values=p["values"][None]), "packed as 2-dimensional torch.uint8"),
    ],
)
def test_bytes_that_were_altered(change, message):
    packed = pack(torch.tensor([1, 2, 3, -4, 5, 6, 7, 1], dtype=torch.int8), 4)
    change(packed)
    with pytest.raises(InputError, match=message):
        unpack(packed, 4, (8,), "w")


def test_marks_that_were_altered():
    q = torch.zeros(20, dtype=torch.int8)
    q[3] = 5
    packed = pack(q, 4)
    with pytest.raises(InputError, match="w: 2 bytes of marks, its shape"):
        unpack({**packed, "kept": packed["kept"][:2]}, 4, (20,), "w")
    behind = packed["kept"].clone()
    behind[2] |= 1
    with pytest.raises(InputError, match="marks are set behind its last weight"):
        unpack({**packed, "kept": behind}, 4, (20,), "w")
    more = packed["kept"].clone()
    more[0] |= 0b11100000
    with pytest.raises(InputError, match="1 bytes of values, 4 integers of 4 bits need 2"):
        unpack({**packed, "kept": more}, 4, (20,), "w")
    odd = packed["values"].clone()
    odd[0] |= 0x30
    with pytest.raises(InputError, match="a value stands behind its last one"):
        unpack({**packed, "values": odd}, 4, (20,), "w")


def test_the_grid_is_a_fixed_point():
    """Weights that are on the grid already are found again exactly, at eight bits."""
    grid = to_grid(torch.randn(1, 6, 32), 8)
    again = Grid(*to_grid(from_grid(grid), 8))
    assert torch.allclose(from_grid(again), from_grid(grid), atol=float(grid.scale.max()) * 0.51)


@given(
    st.integers(0, 10**6), st.sampled_from([4, 8]), st.integers(1, 70), st.integers(1, 4), st.floats(1e-6, 1e6)
)
def test_the_native_kernel_and_torch_give_the_same_bits(seed, bits, width, groups, size):
    if native.library() is None:
        pytest.skip("the native kernels are not built")
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(1, 5, width * groups, generator=draw) * size
    w[torch.rand(w.shape, generator=draw) < 0.4] = 0
    w[0, 1, :width] = 0
    w[0, 2] = w[0, 2].sign() * size  # all equal: clips compete
    found = to_grid(w, bits, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "serves", lambda _: False)
        expected = to_grid(w, bits, width)
    assert torch.equal(found.integers, expected.integers)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_wherever_it_stands(value):
    for place in (0, 17, 69):
        w = torch.randn(1, 2, 70)
        w[0, 1, place] = value
        with pytest.raises(NumericError, match="NaN or Inf among the weights"):
            to_grid(w, 8)
