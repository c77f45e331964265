"""N of every M weights: the dense product on every path, where its parts lie, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import magnitude, prune_
from secateur.deploy.sparse import choice, gpu, load_sparse_, pack, save_sparse, sparsify_
from secateur.deploy.sparse.kernels import mask_of
from secateur.deploy.sparse.modules import SparseEmbedding, SparseLinear
from secateur.deploy.sparse.ops import BATCHES, STREAM, TILES, UNPACK, sparse_linear
from secateur.deploy.sparse.packed import CODEBOOK, pack_integers, reformed
from secateur.deploy.sparse.semi import PATTERNS, fits, fitting, lanes_of
from secateur.deploy.sparse.store import named
from secateur.errors import UsageError
from secateur.pattern import NM

from .test_kernels import KINDS, check

SHAPES = ((1, 1), (5, 63), (17, 64), (33, 130), (9, 257), (18, 384), (7, 1030), (3, 4224))


def chosen(rows, columns, form, seed=0):
    """A matrix that keeps N of every M at random, the last M cut off where columns are no multiple."""
    kept, among = map(int, form.split(":"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, -(-columns // among), among, generator=generator).argsort(2).argsort(2)
    cut = (order >= kept).flatten(1)[:, :columns]
    return torch.randn(rows, columns, generator=generator).masked_fill(cut, 0)


def held(weight, kind, form):
    """Packed; int4 with one scale a row where those of 128 columns would not fall into vectors."""
    if kind == "int4":
        groups = weight.shape[1] // 128 if weight.shape[1] % 128 == 0 else 1
        if not lanes_of(form, kind, weight.shape[1]).scales_fit(groups):
            integers = (weight * 3).round().clamp(-7, 7).to(torch.int8)
            return pack_integers(integers, torch.rand(len(weight), 1) + 0.5, kind, form=form)
    return pack(weight if kind.startswith("int") else weight.to(getattr(torch, kind)), kind, form=form)


@pytest.mark.parametrize("form", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_the_dense_product(path, kind, form):
    for rows, columns in SHAPES:
        found = held(chosen(rows, columns, form), kind, form)
        assert (found.form, found.kind, found.block) == (form, kind, 1)
        for batch in (1, 2, 3, 5, 17) if columns < 1000 else (1, 5):
            x, bias = torch.randn(batch, columns), torch.randn(rows)
            for way in (STREAM, TILES, UNPACK) if path != "torch" else (UNPACK,):
                check(found, x, bias, way)


@pytest.mark.parametrize("form", PATTERNS)
def test_sums_of_bytes_are_exact(path, form):
    generator = torch.Generator().manual_seed(1)
    for columns in (1000, 130, 3):
        integers = torch.randint(-127, 128, (37, columns), generator=generator, dtype=torch.int8)
        integers[chosen(37, columns, form) == 0] = 0
        scale = torch.rand(37, 1, generator=generator) + 0.5
        found = pack_integers(integers, scale, form=form)
        for batch in (1, 2, 7):
            x = torch.randint(-127, 128, (batch, columns), generator=generator).float()
            x[:, 0] = 127  # rounded without a change
            expected = (x.double() @ integers.double().T).float() * scale[:, 0]
            y = sparse_linear(found, x, ways=[STREAM] * 9)
            assert torch.equal(y, expected) or path == "torch"  # which multiplies rows with their scales


def test_scales_narrower_and_wider_than_a_vector(path):
    """A vector of 4-bit codes meets 64, 128 or 256 columns."""
    generator = torch.Generator().manual_seed(0)
    for form in PATTERNS:
        for columns, groups in ((768, 12), (768, 6), (768, 3), (512, 2), (1024, 1)):
            if not lanes_of(form, "int4", columns).scales_fit(groups):
                continue
            integers = torch.randint(-7, 8, (6, columns), generator=generator, dtype=torch.int8)
            integers[chosen(6, columns, form) == 0] = 0
            scale = torch.rand(6, groups, generator=generator) + 0.5
            found = pack_integers(integers, scale, "int4", form=form)
            wide = integers.view(6, groups, -1) * scale[..., None]
            assert torch.equal(found.dense(), wide.view(6, columns))
            for batch in (1, 2, 3):
                check(found, torch.randn(batch, columns), torch.randn(6), STREAM if path != "torch" else UNPACK)


def test_dense_codes_are_the_case_with_nothing_left_out(path):
    """Scales of the whole row, of 64 and of 128 columns; an odd number of vectors; rows looked up."""
    for columns, groups in ((63, 1), (130, 1), (192, 3), (192, 1), (768, 6), (4224, 33)):
        generator = torch.Generator().manual_seed(columns)
        integers = torch.randint(-7, 8, (9, columns), generator=generator, dtype=torch.int8)
        scale = torch.rand(9, groups, generator=generator) + 0.5
        found = pack_integers(integers, scale, "int4", form="dense")
        assert found.values.numel() == 9 * 32 * -(-columns // 64) + 64
        wide = (integers.view(9, groups, -1) * scale[..., None]).view(9, columns)
        assert torch.equal(found.dense(), wide)
        assert torch.equal(reformed(found, "bitmask").dense(), wide)
        some = torch.tensor([7, 0, 7])
        assert torch.equal(gpu.rows_of(found, some), wide[some])
        for batch in (1, 2, 5):
            x = torch.randint(-127, 128, (batch, columns), generator=generator).float()
            x[:, 0] = 127  # rounded without a change
            check(found, x, torch.randn(9), STREAM if path != "torch" else UNPACK)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 60),
    st.integers(1, 600),
    st.sampled_from(list(PATTERNS)),
    st.sampled_from(KINDS),
    st.integers(1, 9),
)
def test_any_shape(fast, rows, columns, form, kind, batch):
    weight = chosen(rows, columns, form, seed=rows)
    found = held(weight, kind, form)
    if not kind.startswith("int"):
        assert torch.equal(found.dense(), weight.to(getattr(torch, kind)))
    bits = reformed(found, "bitmask")
    assert torch.equal(found.dense(), bits.dense())
    assert torch.equal(mask_of(found), bits.mask)
    assert fits(bits.mask, form)
    assert torch.equal(gpu.rows_of(found, torch.arange(rows)), found.dense())
    check(found, torch.randn(batch, columns), torch.zeros(rows), STREAM)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 200), st.sampled_from(list(PATTERNS)), st.floats(0, 1))
def test_fewer_than_may_be_kept_and_zeros_with_a_sign(path, rows, columns, form, more):
    """Whatever is zero of what might be kept, and on every path the same bytes."""
    generator = torch.Generator().manual_seed(rows)
    weight = chosen(rows, columns, form, seed=columns)
    weight[torch.rand(rows, columns, generator=generator) < more] = -0.0
    for kind in ("float32", "bfloat16"):
        source = weight.to(getattr(torch, kind))
        found = pack(source, form=form)
        assert torch.equal(found.dense(), source)
        assert torch.equal(found.dense().signbit(), source.signbit())
    lanes = found.lanes
    # the oracle: unit by unit, the places that `first` gives it
    values, index = np.zeros((rows, lanes.stored), np.float32), np.zeros((rows, lanes.stored), int)
    for row in range(rows):
        for start in range(0, columns, lanes.wide):
            free = iter((lanes.first == start).nonzero()[:, 0].tolist())
            for column in range(start, min(columns, start + lanes.wide)):
                if source[row, column] != 0:
                    place = next(free)
                    values[row, place], index[row, place] = source[row, column].item(), column - start
    assert np.array_equal(found.values[: rows * lanes.stored].float().numpy().reshape(rows, -1), values)
    words = found.index.numpy().view(np.uint32)
    for place in range(min(lanes.stored, lanes.met * lanes.lanes)):
        vector, lane = divmod(place, lanes.lanes)
        word = words[:, vector // lanes.filled * 8 + lane]
        assert np.array_equal(word >> (vector % lanes.filled * lanes.bits) & (lanes.wide - 1), index[:, place])


@given(st.integers(1, 8), st.integers(1, 100), st.floats(0, 1), st.integers(0, 5))
def test_what_fits_is_counted(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    mask = pack(kept.float(), form="bitmask").mask
    for form in PATTERNS:
        number, among = map(int, form.split(":"))
        units = torch.nn.functional.pad(kept, (0, -columns % among)).view(rows, -1, among).sum(2)
        assert fits(mask, form) == (int(units.max()) <= number)
    assert set(fitting(mask)) == {form for form in PATTERNS if fits(mask, form)}


@pytest.mark.parametrize(("form", "bits"), [("2:4", 5), ("1:4", 2.5), ("8:16", 6), ("4:16", 3), ("2:16", 1.5)])
def test_the_size_is_what_is_kept_with_its_indices(form, bits):
    found = pack(chosen(64, 2048, form), "int8", form=form)
    assert found.nbytes - found.scale.nbytes - 64 == bits / 8 * 64 * 2048
    assert found.density == PATTERNS[form][0] / 16
    assert fitting(mask_of(found))[0] == form


def test_inputs_that_are_no_numbers_and_empty_batches(path):
    for kind in ("int8", "float32"):
        found, x = pack(chosen(20, 130, "2:4"), kind, form="2:4"), torch.randn(6, 130)
        x[1, 7], x[4, 9] = float("nan"), float("inf")
        for rows in (slice(0, 3), slice(0, 6)):
            y, expected = sparse_linear(found, x[rows], ways=[STREAM] * 9), x[rows] @ found.dense().T
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
        assert sparse_linear(found, torch.empty(0, 130)).shape == (0, 20)


def test_rows_whose_sums_32_bits_do_not_hold_are_unpacked(fast):
    columns = (1 << 17) + 4
    weight = torch.full((4, columns), 127, dtype=torch.int8)
    weight[:, 1::2] = 0
    found = pack_integers(weight, torch.ones(4, 1), form="2:4")
    for batch in (1, 7):
        y = sparse_linear(found, torch.ones(batch, columns))
        assert torch.allclose(y, torch.full_like(y, 127.0 * columns / 2), rtol=1e-5)


def test_threads_change_no_bit(fast):
    inputs = [torch.randn(b, 512) for b in (1, 3, 40)]
    for kind in ("int8", "bfloat16"):
        found, seen = held(chosen(700, 512, "4:16"), kind, "4:16"), []
        try:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                seen.append([sparse_linear(found, x) for x in inputs])
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@torch.no_grad()
def test_a_pruned_model_runs_in_it_and_is_stored_as_bits(fast, tmp_path, monkeypatch):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    blank, x = copy.deepcopy(made), torch.randn(7, 256)
    prune_(made, 0.75, replace(magnitude, pattern=NM(4, 16)), only="0")
    expected = made(x)
    times = {"bitmask": [1.0, 0.5, 1e9, 1e9], "4:16": [1.0, 0.2, 1e9, 1e9]}
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_measure", lambda like, *_: [times[like.form]] * (len(BATCHES) + 1))
    done = sparsify_(made, "int8", only="0")
    assert [(layer.form, layer.sparsity) for layer in done.layers] == [("4:16", 0.75)]
    assert "int8 4:16" in repr(made[0])
    assert float((made(x) - expected).norm() / expected.norm()) < 0.02
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), made(x))
    assert torch.equal(torch.export.export(made, (x,)).module()(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    save_sparse(made, tmp_path / "m.safetensors")
    again = load_sparse_(copy.deepcopy(blank), tmp_path / "m.safetensors")
    assert again[0].packed.form == "bitmask"
    assert torch.equal(again[0].weight, made[0].weight)
    fast_again = load_sparse_(copy.deepcopy(blank), tmp_path / "m.safetensors", prefer="speed")
    assert fast_again[0].packed.form == "4:16"
    assert torch.equal(fast_again(x), made(x))


def test_memory_takes_it_where_it_is_no_larger(fast, monkeypatch):
    monkeypatch.setattr(choice, "_known", {})
    times = {"bitmask": [1.0, 2.0, 1e9, 3.0], "8:16": [1.0, 1.5, 1e9, 3.0], "2:4": [1.0, 1.5, 1e9, 3.0]}
    monkeypatch.setattr(choice, "_measure", lambda like, *_: [times[like.form]] * (len(BATCHES) + 1))
    kind = choice.kind_of(nn.Linear(512, 64), torch.float32)
    for form, taken in (("2:4", "2:4"), ("8:16", "bitmask")):  # 5 and 6 bits a weight, a bitmask 5
        found = pack(chosen(64, 512, form), "int8", form="bitmask")
        how = choice.choose(found, kind, always=True)
        assert how.packed.form == taken
        assert how.ways == (STREAM,) * (len(BATCHES) + 1)
        assert torch.equal(how.packed.dense(), found.dense())
    times["2:4"] = [1.0, 2.5, 1e9, 3.0]  # measured anew for another size
    assert choice.choose(pack(chosen(64, 1024, "2:4"), "int8"), kind, always=True).packed.form == "bitmask"


@pytest.mark.parametrize(("form", "kind"), [("2:4", "int8"), ("4:16", "float32"), ("dense", "int4")])
def test_layers_compile_with_the_usual_ways(fast, form, kind):
    weight = torch.randn(64, 128) if form == "dense" else chosen(64, 128, form)
    layer = SparseLinear(pack(weight, kind, form=form), torch.randn(64), torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (1, 7):
        x = torch.randn(batch, 128)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_it_is_measured_with_its_own_zeros(fast, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "ROUNDS", 2)
    monkeypatch.setattr(choice, "_known", {})
    found = pack(chosen(256, 250, "2:16"), "int8", form="bitmask")
    times = choice.measured(found, choice.kind_of(nn.Linear(250, 256), torch.float32), "2:16")
    assert len(times) == len(BATCHES) + 1
    assert all(0 < each[1 + STREAM] < 1e9 for each in times)
    assert "int8 2:16 1 0.9" in next(iter(choice._known))


def test_forms_that_are_looked_at(fast):
    chance = torch.rand(64, 256, generator=torch.Generator().manual_seed(9))
    cases = (
        (chosen(64, 256, "2:4"), ("bitmask", "2:4")),
        (chosen(64, 256, "8:16"), ("bitmask", "8:16")),
        (chosen(64, 256, "2:16"), ("bitmask", "index", "2:16")),
        (chosen(64, 256, "2:4").masked_fill(chance < 0.4, 0), ("bitmask", "2:4")),  # 1.5 times as large
        (chosen(64, 256, "2:4").masked_fill(chance < 0.6, 0), ("bitmask", "index")),  # twice
    )
    for weight, expected in cases:
        assert choice._forms(pack(weight, "int8", form="bitmask")) == expected
    ones = (chosen(8, 1152, "2:16") != 0).to(torch.int8)
    wide = pack_integers(
        ones, torch.ones(8, 9), "int4", form="bitmask"
    )  # nine scales, which 2:16 does not take
    assert choice._forms(wide) == ("bitmask", "index", "4:16")
    narrow = pack(chosen(8, 16, "2:16"), form="bitmask")  # a vector takes four times as much
    assert choice._forms(narrow) == ("bitmask", "index")
    own = replace(pack(chosen(64, 256, "2:4"), "int4", form="bitmask"), codebook=CODEBOOK * 2)
    assert choice._forms(own) == ("bitmask",)
    assert reformed(own, "2:4") is own


@torch.no_grad()
def test_convolutions_whose_scales_do_not_go_with_it(fast, tmp_path, monkeypatch):
    """Timed are powers of two of channels, whose scales differ from the layer's own."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "ROUNDS", 1)
    monkeypatch.setattr(choice, "_known", {})
    for form, channels in (("4:16", 16), ("4:16", 32), ("2:16", 96), ("2:4", 48)):
        kept, among = map(int, form.split(":"))
        model = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1)).eval()
        x = torch.randn(1, channels, 6, 6)
        prune_(model, 1 - kept / among, replace(magnitude, pattern=NM(kept, among)))
        expected, found = model(x), pack(model[0].weight.flatten(1), "int4", form="bitmask")
        kind = choice.kind_of(model[0], torch.float32)
        assert all(seconds > 0 for row in choice.measured(found, kind, form) for seconds in row)
        sparsify_(model, "int4", measure=False)
        assert float((model(x) - expected).norm() / expected.norm()) < 0.4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@torch.no_grad()
def test_heads_of_4_bits_compile_and_export(fast, backend):
    """With two scales a row, and an odd number of vectors."""
    for columns in (128, 192):
        embedding = nn.Embedding(50, columns)
        found = SparseEmbedding(pack(embedding.weight.data, "int4", form="dense"), embedding)
        model, ids = nn.Sequential(found), torch.tensor([[3, 49, 3]])
        expected = found.weight[ids]
        assert torch.equal(model(ids), expected)
        assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(ids), expected)
        assert torch.equal(torch.export.export(model, (ids,)).module()(ids), expected)


def test_what_is_stored_is_the_smaller_of_the_other_forms(fast):
    found = pack(chosen(64, 512, "2:16").masked_fill(torch.rand(64, 512) < 0.4, 0), "int8", form="2:16")
    assert named("w", found)["w:packed"][1] == 1  # indices
    own = replace(pack(chosen(4, 256, "2:4"), "int4", form="2:4"), codebook=CODEBOOK.roll(1))
    with pytest.raises(UsageError, match="w: N:M of a codebook of its own cannot be stored"):
        named("w", own)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: pack_integers(torch.zeros(4, 256, dtype=torch.int8), torch.ones(4, 2), form="2:4"),
            "form 2:4: 2 scales for 256 columns do not fall into its vectors of int8",
        ),
        (
            lambda: pack(torch.ones(4, 8), form="2:4"),
            "form 2:4: some 4 columns of a row keep more than 2 weights",
        ),
        (lambda: pack(torch.ones(4, 16), form="8:16"), "form 8:16: some 16 columns .* more than 8"),
        (lambda: pack(torch.ones(4, 8), form="3:4"), "form='3:4'; expected one of .*2:4, 1:4, 8:16"),
        (lambda: pack(torch.ones(4, 8), form="2:4", block=4), "form 2:4 is for single weights alone"),
        (
            lambda: pack(chosen(4, 384, "2:16"), "int4", form="2:16"),
            "form 2:16: 3 scales for 384 columns do not fall into its vectors",
        ),
        (lambda: reformed(pack(torch.ones(4, 8)), "2:4"), "some 4 columns"),
    ],
)
def test_what_cannot_be_packed_in_it_is_said(path, call, words):
    with pytest.raises(UsageError, match=words):
        call()
