"""Packing: bit-exact, as small as promised, the same on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.core import native
from secateur.deploy.grid import from_grid, to_grid
from secateur.deploy.sparse import kernels, pack
from secateur.deploy.sparse.packed import pack_integers
from secateur.errors import NumericError, UsageError

from .test_kernels import KINDS, matrix

FLOATS = ("float32", "bfloat16", "float16")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


def same(one, other):
    width = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.clone().view(width), other.clone().view(width))


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("form", ["bitmask", "index"])
def test_a_round_trip_keeps_every_bit(path, kind, form):
    """Negative zeros, NaN with its payload, Inf and subnormal numbers included."""
    weight = matrix(37, 131, 0.6).to(getattr(torch, kind))
    weight[3, :40] = -0.0
    weight[4, 5], weight[4, 6], weight[5, 0] = float("nan"), float("-inf"), torch.finfo(weight.dtype).tiny / 4
    found = pack(weight, form=form)
    assert same(found.dense(), weight)
    assert found.nonzeros == int((weight != 0).sum())
    assert found.negative is not None
    assert pack(weight.abs(), form=form).negative is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(FLOATS),
    st.sampled_from([1, 4, 16]),
)
def test_any_shape_comes_back(fast, rows, columns, sparsity, kind, block):
    weight = matrix(rows, columns, sparsity, seed=columns).to(getattr(torch, kind))
    weight[torch.rand(rows, columns) < 0.05] *= -0.0
    assert same(pack(weight, block=block).dense(), weight)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("columns", [100, 256])
def test_integers_come_back(path, kind, columns):
    weight = matrix(20, columns, 0.6)
    group = 128 if kind == "int4" and columns == 256 else None
    grid = to_grid(weight[None], 4 if kind == "int4" else 8, group)
    for form in ("bitmask", "index", *(["dense"] if kind == "int8" else [])):
        assert torch.equal(pack(weight, kind, form=form).dense(), from_grid(grid)[0])
    for block in (4, 16):
        assert torch.equal(pack(weight, kind, block=block).dense(), from_grid(grid)[0])
    again = pack_integers(grid.integers[0], grid.scale[0], kind)
    assert torch.equal(again.dense(), from_grid(grid)[0])


@pytest.mark.parametrize("kind", [*BYTES, "int4"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.85])
def test_the_size_is_density_times_bits_and_one(fast, kind, sparsity):
    """Within 2 %; scales of integers apart."""
    found = (
        pack(matrix(512, 1024, sparsity), kind, form="bitmask")
        if kind.startswith("int")
        else pack(matrix(512, 1024, sparsity).to(getattr(torch, kind)), form="bitmask")
    )
    bits = 8 * BYTES.get(kind, 0.5)
    scales = 0 if found.scale is None else found.scale.nbytes
    expected = (found.density * bits + 1) / 8 * 512 * 1024
    assert abs(found.nbytes - scales - expected) < 0.02 * expected


def test_few_non_zeros_take_an_index(fast):
    weight = matrix(256, 1024, 0.95)
    assert pack(weight).form == "index"
    assert pack(weight).nbytes < pack(weight, form="bitmask").nbytes
    assert pack(matrix(256, 1024, 0.8)).form == "bitmask"


def test_blocks_share_their_bits(fast):
    weight = matrix(64, 256, 0.5, block=4)
    assert pack(weight, block=4).mask.numel() * 4 == pack(weight).mask.numel()
    assert pack(weight, block=4).nonzeros == pack(weight).nonzeros


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack(torch.ones(2, 2), "int3"), "kind='int3'.*expected one of float32"),
        (lambda: pack(torch.ones(2, 2), form="csr"), "form='csr'"),
        (lambda: pack(torch.ones(2, 2), block=3), "block is 3; expected 1, 4, 16 rows"),
        (lambda: pack(torch.ones(2, 2, 2)), r"a matrix on the CPU is expected, got \(2, 2, 2\)"),
        (lambda: pack(torch.ones(2, 2), form="dense"), "form dense is for int8"),
        (lambda: pack(torch.ones(2, 2), form="index", block=4), "form index is for single"),
    ],
)
def test_what_cannot_be_packed_is_said(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_nan_cannot_become_an_integer():
    with pytest.raises(NumericError):
        pack(torch.tensor([[float("nan")]]), "int8")


def test_kinds_are_known():
    assert set(KINDS) == {*FLOATS, "int8", "int4"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(KINDS),
    st.sampled_from([1, 4, 16, (4, 4)]),
    st.data(),
)
def test_the_native_kernels_and_numpy_give_the_same_bits(fast, rows, columns, sparsity, kind, block, data):
    kind = "int8" if block == (4, 4) else kind
    weight = matrix(rows, columns, sparsity, seed=rows)
    if kind not in ("int8", "int4"):
        weight = weight.to(getattr(torch, kind))
        weight[torch.rand(rows, columns) < data.draw(st.sampled_from([0.0, 0.1]))] *= -0.0
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    found = pack(weight, kind, block=block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        expected = pack(weight, kind, block=block)
        part = kernels.decode(expected, first, last)
    assert found.form == expected.form
    assert found.tensors().keys() == expected.tensors().keys()
    assert all(torch.equal(bits(one), bits(expected.tensors()[name])) for name, one in found.tensors().items())
    assert torch.equal(bits(kernels.decode(found, first, last)), bits(part))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)
