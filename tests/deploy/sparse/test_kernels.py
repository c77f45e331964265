"""Every kernel on every path equals the dense product of the masked weight, in float64."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.core import native
from secateur.deploy.sparse import kernels, pack
from secateur.deploy.sparse.ops import BATCHES, STREAM, TILES, UNPACK, sparse_linear
from secateur.deploy.sparse.packed import pack_integers
from secateur.doctor import findings
from secateur.errors import UsageError

from .conftest import EMULATED

KINDS = ("float32", "bfloat16", "float16", "int8", "int4")


def matrix(rows, columns, sparsity, block=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    cut = torch.rand(-(-rows // block), columns, generator=generator) < sparsity
    return weight.masked_fill(cut.repeat_interleave(block, 0)[:rows], 0)


def packed(weight, kind, form=None, block=1):
    source = weight if kind.startswith("int") else weight.to(getattr(torch, kind))
    return pack(source, kind, form=form, block=block)


def rounded(x):
    """Inputs as the integer kernels see them."""
    reach = x.double().abs().amax(-1, keepdim=True)
    return torch.where(reach > 0, (x.double() * 127 / reach).round() * reach / 127, 0.0)


def check(found, x, bias, way, tolerance=2e-6):
    """The product, row by row within float32's rounding of the sum of magnitudes."""
    y = sparse_linear(found, x, bias, ways=[way] * (len(BATCHES) + 1))
    assert y.shape == (*x.shape[:-1], found.rows)
    assert y.dtype == x.dtype
    dense = found.dense().double()
    whole = found.kind.startswith("int") and found.form != "index"
    inputs = rounded(x) if whole and way == STREAM and native.library() is not None else x.double()
    expected = inputs @ dense.T + bias.double()
    size = x.double().abs() @ dense.abs().T + bias.double().abs() + 1e-30
    assert float(((y.double() - expected).abs() / size).max()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_every_form_and_way_is_the_dense_product(path, kind, block):
    """Shapes around the sizes at which kernels change their ways, none of them a multiple of anything."""
    shapes = ((1, 1, 0.0), (5, 63, 0.0), (17, 64, 1.0), (33, 130, 0.5), (70, 257, 0.95), (18, 384, 0.5))
    for rows, columns, sparsity in shapes:
        weight = matrix(rows, columns, sparsity, block)
        forms = [
            "bitmask",
            *(["index"] if block == 1 else []),
            *(["dense"] if kind in ("int8", "int4") and block == 1 else []),
        ]
        for form in forms:
            found = packed(weight, kind, form, block)
            for batch in (1, 2, 3, 4, 9, 17, 40) if rows > 16 else (1, 5):
                x, bias = torch.randn(batch, columns), torch.randn(rows)
                for way in (STREAM, TILES, UNPACK) if path != "torch" else (UNPACK,):
                    check(found, x, bias, way)
                if kind == "bfloat16" and path != "torch":  # as a model in that type gives them
                    check(found, x.bfloat16().float(), bias, STREAM)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_sums_of_integers_are_exact(path, block):
    """On every path the same bits: sums of a scale are whole numbers, rounded once."""
    generator = torch.Generator().manual_seed(1)
    for kind, columns, scales in (("int8", 1000, 1), ("int8", 130, 1), *[("int4", 640, 5)] * (block > 1)):
        most = 127 if kind == "int8" else 7
        integers = torch.randint(-most, most + 1, (37, columns), generator=generator, dtype=torch.int8)
        cut = torch.rand(-(-37 // block), columns, generator=generator) < 0.6
        integers[cut.repeat_interleave(block, 0)[:37]] = 0
        scale = torch.rand(37, scales, generator=generator) + 0.5
        found = pack_integers(integers, scale, kind, form="bitmask", block=block)
        for batch in (1, 2, 3, 4, 7, 20):
            x = torch.randint(-127, 128, (batch, columns), generator=generator).float()
            x[:, 0] = 127  # rounded without a change
            parts = torch.einsum("bsc,rsc->bsr", *(y.view(len(y), scales, -1).double() for y in (x, integers)))
            expected = torch.zeros(batch, 37)
            for number in range(scales):
                expected += parts[:, number].float() * scale[:, number]
            y = sparse_linear(found, x, ways=[STREAM] * 9)
            assert torch.equal(y, expected) or path == "torch"  # which does not know integers


def test_integers_of_wide_rows(path):
    """More columns than a panel, and scales that fit it, do not divide it, or are longer than it."""
    generator = torch.Generator().manual_seed(0)
    for columns, scales in ((9000, 1), (4224, 33), (12288, 2), (17000, 1), (20480, 160)):
        integers = torch.randint(-7, 8, (6, columns), generator=generator, dtype=torch.int8)
        integers[torch.rand(6, columns, generator=generator) < 0.6] = 0
        scale = torch.rand(6, scales, generator=generator) + 0.5
        for form in ("bitmask", "index"):
            for kind in ("int8", "int4") if scales == 1 else ("int4",):
                found = pack_integers(integers, scale, kind, form=form)
                for batch in (1, 3, 7) if path != "plain" else (1, 5):
                    x = torch.randint(-127, 128, (batch, columns), generator=generator).float()
                    x[:, 0] = 127  # rounded without a change
                    for way in (STREAM, TILES):
                        check(found, x, torch.randn(6), way)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 90),
    st.integers(1, 600),
    st.floats(0, 1),
    st.sampled_from(KINDS),
    st.integers(1, 70),
    st.booleans(),
)
def test_any_shape(fast, rows, columns, sparsity, kind, batch, few):
    found = packed(matrix(rows, columns, sparsity, seed=rows), kind)
    check(found, torch.randn(batch, columns), torch.zeros(rows), STREAM if few else TILES)


def test_a_vocabulary_head_of_50257_rows(fast):
    found = packed(matrix(50257, 64, 0.7), "int8", "dense")
    check(found, torch.randn(1, 64), torch.randn(50257), STREAM)
    found = packed(matrix(50257, 64, 0.7), "float32")
    for way in (STREAM, TILES):
        check(found, torch.randn(2, 64), torch.randn(50257), way)


def test_empty_and_full_rows(path):
    weight = matrix(9, 200, 0.5)
    weight[[0, 4, 8]] = 0
    weight[[1, 5]] = torch.randn(2, 200)
    for kind in KINDS:
        for form in ("bitmask", "index"):
            for way in (STREAM, TILES, UNPACK):
                check(packed(weight, kind, form), torch.randn(3, 200), torch.zeros(9), way)


@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_and_inf_go_where_a_dense_product_carries_them(path, where):
    for value in (float("nan"), float("inf")):
        weight, x = matrix(20, 130, 0.5), torch.randn(3, 130)
        if where == "input":
            x[1, 7] = value
        else:
            weight[3, 9] = value
        for kind in ("float32", "bfloat16", "float16"):
            for form in ("bitmask", "index"):
                found = packed(weight, kind, form)
                for way in (STREAM, TILES, UNPACK):
                    y = sparse_linear(found, x, ways=[way] * 9)
                    expected = x @ found.dense().float().T
                    assert torch.equal(y.isnan(), expected.isnan())
                    assert torch.equal(y.isposinf(), expected.isposinf())
                    close = torch.allclose(y[y.isfinite()], expected[expected.isfinite()], atol=1e-4)
                    assert close


def test_inputs_of_any_layout_type_and_size(fast):
    weight = matrix(33, 70, 0.5)
    found = pack(weight)
    wide = torch.randn(70, 6)
    memory = torch.randn(6 * 70 + 1)
    for x in (
        wide.t(),
        torch.randn(2, 3, 70),
        torch.randn(70),
        memory[1:].view(6, 70),
        torch.randn(6, 140)[:, ::2],
    ):
        assert torch.allclose(sparse_linear(found, x), x @ weight.T, atol=1e-4)
    half = torch.randn(3, 70).bfloat16()
    y = sparse_linear(found, half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (half.float() @ weight.T).bfloat16())
    assert sparse_linear(found, torch.empty(0, 70)).shape == (0, 33)
    with pytest.raises(RuntimeError):
        sparse_linear(found, torch.randn(3, 69))


def test_threads_change_no_bit(fast):
    found = {kind: packed(matrix(700, 512, 0.6), kind) for kind in KINDS}
    inputs = [torch.randn(batch, 512) for batch in (1, 3, 40)]
    seen = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            seen.append([sparse_linear(each, x) for each in found.values() for x in inputs])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_callers_on_several_threads_and_after_a_fork(fast):
    found, x = pack(matrix(900, 700, 0.5)), torch.randn(2, 700)
    expected = sparse_linear(found, x)
    wrong: list[int] = []

    def call() -> None:
        wrong.extend(1 for _ in range(20) if not torch.equal(sparse_linear(found, x), expected))

    torch.set_num_threads(2)
    try:
        others = [threading.Thread(target=call) for _ in range(3)]
        for each in others:
            each.start()
        for each in others:
            each.join(60)
        assert not wrong
        y = kernels.Product(found, None)
        torch.set_num_threads(2)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(y(x, 0), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


def test_doctor_names_the_kernels_in_use(path, monkeypatch):
    wanted = {"torch": "torch (SECATEUR_NATIVE=0)"}.get(path, f"{EMULATED.get(path, path)} (")
    assert findings()["sparse kernels"].startswith(wanted)
    monkeypatch.setenv(kernels.ENVIRONMENT, "avx1024")
    assert "SECATEUR_ISA=avx1024: this machine has plain" in findings()["sparse kernels"]


def test_an_instruction_set_that_is_not_there_is_named(fast, monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, "avx1024")
    with pytest.raises(UsageError, match="SECATEUR_ISA=avx1024: this machine has plain"):
        kernels.level()
