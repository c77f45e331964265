"""Squares of 4 x 4 bytes: the dense product on every path, the file, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from secateur import Blocks, magnitude, prune_
from secateur.deploy.grid import from_grid, to_grid
from secateur.deploy.sparse import choice, gpu, load_sparse_, pack, save_sparse, sparsify_
from secateur.deploy.sparse.ops import BATCHES, STREAM, TILES, UNPACK, sparse_linear
from secateur.deploy.sparse.packed import pack_integers, reformed, shape_of
from secateur.deploy.sparse.store import named, read_sparse
from secateur.errors import InputError, UsageError

from .test_kernels import check

SQUARE = (4, 4)


def squares(rows, columns, sparsity, seed=0):
    """A matrix whose zeros are whole squares, cut off at its edges."""
    generator = torch.Generator().manual_seed(seed)
    cut = torch.rand(-(-rows // 4), -(-columns // 4), generator=generator) < sparsity
    cut = cut.repeat_interleave(4, 0)[:rows].repeat_interleave(4, 1)[:, :columns]
    return torch.randn(rows, columns, generator=generator).masked_fill(cut, 0)


def test_every_way_is_the_dense_product(path):
    shapes = (
        (1, 1, 0.0),
        (5, 63, 0.0),
        (8, 64, 1.0),
        (33, 130, 0.5),
        (70, 257, 0.95),
        (18, 1030, 0.5),
        (3, 9001, 0.3),
    )
    for rows, columns, sparsity in shapes:
        found = pack(squares(rows, columns, sparsity), "int8", block=SQUARE)
        assert (found.form, found.block, found.across) == ("squares", 4, 4)
        for batch in (1, 2, 3, 4, 5, 8, 9, 17, 40) if columns < 9000 else (1, 5):
            x, bias = torch.randn(batch, columns), torch.randn(rows)
            for way in (STREAM, TILES, UNPACK) if path != "torch" else (UNPACK,):
                check(found, x, bias, way)


def test_sums_are_exact(path):
    generator = torch.Generator().manual_seed(1)
    for columns in (1000, 130, 3):
        integers = torch.randint(-127, 128, (37, columns), generator=generator, dtype=torch.int8)
        integers[squares(37, columns, 0.6) == 0] = 0
        scale = torch.rand(37, 1, generator=generator) + 0.5
        found = pack_integers(integers, scale, block=SQUARE)
        for batch in (1, 2, 3, 4, 7, 8, 20, 33):
            x = torch.randint(-127, 128, (batch, columns), generator=generator).float()
            x[:, 0] = 127  # rounded without a change
            expected = (x.double() @ integers.double().T).float() * scale[:, 0]
            y = sparse_linear(found, x, ways=[STREAM] * 9)
            assert torch.equal(y, expected) or path == "torch"  # which multiplies rows with their scales


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 90), st.integers(1, 600), st.floats(0, 1), st.integers(1, 70))
def test_any_shape(fast, rows, columns, sparsity, batch):
    weight = squares(rows, columns, sparsity, seed=rows)
    found = pack(weight, "int8", block=SQUARE)
    assert torch.equal(found.dense(), from_grid(to_grid(weight[None], 8, None))[0])
    assert torch.equal(gpu.rows_of(found, torch.arange(rows)), found.dense())
    check(found, torch.randn(batch, columns), torch.zeros(rows), STREAM)


def test_inputs_that_are_no_numbers_and_empty_batches(path):
    found, x = pack(squares(20, 130, 0.5), "int8", block=SQUARE), torch.randn(6, 130)
    x[1, 7], x[4, 9] = float("nan"), float("inf")
    for rows in (slice(0, 3), slice(0, 6)):
        y, expected = sparse_linear(found, x[rows], ways=[STREAM] * 9), x[rows] @ found.dense().T
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
    assert sparse_linear(found, torch.empty(0, 130)).shape == (0, 20)


def test_rows_whose_sums_32_bits_do_not_hold_are_unpacked(fast):
    columns = (1 << 17) + 4
    found = pack_integers(torch.full((4, columns), 127, dtype=torch.int8), torch.ones(4, 1), block=SQUARE)
    for batch in (1, 7):
        y = sparse_linear(found, torch.ones(batch, columns))
        assert torch.allclose(y, torch.full_like(y, 127.0 * columns), rtol=1e-5)


def test_threads_change_no_bit(fast):
    found, inputs = (
        pack(squares(700, 512, 0.6), "int8", block=SQUARE),
        [torch.randn(b, 512) for b in (1, 3, 40)],
    )
    seen = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            seen.append([sparse_linear(found, x) for x in inputs])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_the_size_is_density_times_bits_and_a_bit_a_square():
    found = pack(squares(512, 1024, 0.5), "int8", block=SQUARE)
    expected = (found.density * 8 + 1 / 16) / 8 * 512 * 1024
    assert abs(found.nbytes - found.scale.nbytes - expected) < 0.001 * expected
    assert found.nonzeros == int((found.dense() != 0).sum()) + int((found.values[: found.nonzeros] == 0).sum())


def test_a_bitmask_of_blocks_holds_the_same():
    found = pack(squares(37, 130, 0.5), "int8", block=SQUARE)
    again = reformed(found, "bitmask")
    assert (again.form, again.block) == ("bitmask", 4)
    assert torch.equal(again.dense(), found.dense())
    assert reformed(found, "squares") is found


@torch.no_grad()
def test_a_model_is_stored_and_runs_in_them(fast, tmp_path):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(92, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    blank, x = copy.deepcopy(made), torch.randn(7, 92)
    prune_(made, 0.5, replace(magnitude, pattern=Blocks(4, 4)), only="0")
    expected = made(x)
    done = sparsify_(made, "int8", only="0", block=SQUARE, measure=False)
    assert [(layer.form, layer.block) for layer in done.layers] == [("squares", 4)]
    assert "int8 squares" in repr(made[0])
    assert float((made(x) - expected).norm() / expected.norm()) < 0.02
    save_sparse(made, tmp_path / "m.safetensors")
    again = load_sparse_(copy.deepcopy(blank), tmp_path / "m.safetensors")
    assert again[0].packed.form == "squares"
    assert torch.equal(again(x), made(x))
    dense = load_sparse_(copy.deepcopy(blank), tmp_path / "m.safetensors", dense=True)
    assert torch.equal(dense[0].weight, made[0].weight)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), again(x))
    assert torch.equal(torch.export.export(again, (x,)).module()(x), again(x))


def test_ways_are_measured_for_squares_of_their_own(fast, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "ROUNDS", 2)
    monkeypatch.setattr(choice, "_known", {})
    layer = nn.Linear(256, 256)
    found = pack(squares(256, 256, 0.5), "int8", block=SQUARE)
    times = choice.measured(found, choice.kind_of(layer, torch.float32, False))
    assert len(times) == len(BATCHES) + 1
    assert all(0 < each[1 + STREAM] < 1e9 for each in times)
    assert "int8 squares 4" in next(iter(choice._known))


def content(**changes):
    return {**named("w", pack(squares(6, 100, 0.5), "int8", block=SQUARE)), **changes}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w:packed": torch.tensor([1, 3, 3, 4, 6, 100])}, "name no matrix"),
        ({"w:packed": torch.tensor([2, 0, 3, 4, 6, 100])}, "name no matrix"),
        ({"w:packed": torch.tensor([4, 3, 3, 4, 6, 100])}, "version 4 .* reads up to 3"),
        ({"w:packed": torch.tensor([3, 3, 3, 4, 6, 100])}, "name no matrix"),
        ({"w:packed": torch.tensor([2, 3, 3, 1, 6, 100])}, "make no squares of int8"),
        ({"w:packed": torch.tensor([2, 3, 0, 4, 6, 100])}, "make no squares of float32"),
        ({"w:packed": torch.tensor([2, 3, 3, 4, 9, 100])}, "the mask has another shape"),
        ({"w:mask": torch.tensor([[1 << 25], [0]])}, "bits are set behind the last column"),
        ({"w:mask": torch.tensor([[1], [0]])}, "16 weights are kept, and the stream"),
        ({"w:scale": torch.ones(6, 2)}, "8-bit integers have one scale a row|the scales have another shape"),
    ],
)
def test_altered_parts_are_refused_by_name(tmp_path, tensors, words):
    path = tmp_path / "m.safetensors"
    save_file(
        content(**tensors),
        path,
        metadata={"secateur": json.dumps({"format": "secateur.sparse.v1", "tied": {}})},
    )
    with pytest.raises(InputError, match=words):
        read_sparse(path)


def test_a_file_of_them_has_a_version_of_its_own():
    assert content()["w:packed"].tolist() == [2, 3, 3, 4, 6, 100]
    assert named("w", pack(torch.ones(6, 100), "int8"))["w:packed"].tolist() == [1, 0, 3, 1, 6, 100]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: pack(torch.ones(4, 4), block=SQUARE),
            "kind='float32', form='squares': squares of 4 x 4 are a form of int8",
        ),
        (
            lambda: pack(torch.ones(4, 4), "int8", form="bitmask", block=SQUARE),
            "form='bitmask': squares of 4 x 4",
        ),
        (lambda: pack(torch.ones(4, 4), "int4", form="squares"), "kind='int4'.* with block=4"),
        (lambda: shape_of((4, 2)), r"block is \(4, 2\); expected 1, 4, 16 rows, or \(4, 4\)"),
        (lambda: sparsify_(nn.Linear(8, 8), block=(16, 16)), r"block is \(16, 16\)"),
    ],
)
def test_what_cannot_be_packed_in_them_is_said(call, words):
    with pytest.raises(UsageError, match=words):
        call()
