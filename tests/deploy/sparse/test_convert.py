"""Layers replaced in a model: the same outputs, what is left out is said, compiled and exported whole."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import Blocks, magnitude, prune_
from secateur.deploy.sparse import choice, load_sparse_, save_sparse, sparsify_
from secateur.deploy.sparse import table as times
from secateur.deploy.sparse.modules import SparseConv2d, SparseEmbedding, SparseLinear
from secateur.deploy.sparse.ops import BATCHES, DENSE, STREAM, TILES, UNPACK
from secateur.deploy.sparse.packed import pack, reformed
from secateur.errors import UsageError

from ...language import Tiny

ONE, SLOW = 1.0, 9.0
LINEAR = choice.Kind("Linear", torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of one's own."""
    monkeypatch.setenv(times.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(choice, "_known", {})


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=211, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def test_gpt2_computes_the_same_with_its_conv1d_replaced(fast):
    model = gpt2()
    prune_(model, 0.6)
    ids = torch.randint(0, 211, (2, 9))
    expected = model(ids).logits
    done = sparsify_(model, measure=False)
    assert len(done.layers) == 8
    assert ("transformer.wte.weight", "outer=None leaves embeddings and what is tied to them") in done.left_out
    assert isinstance(model.transformer.h[0].mlp.c_fc, SparseLinear)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert str(done).startswith("8 weights packed as float32: ")
    again = model.generate(
        ids[:1], attention_mask=torch.ones(1, 9), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert again.shape == (1, 12)


@pytest.mark.parametrize(("outer", "bits", "off"), [("int8", 8.6, 0.05), ("int4", 4.8, 0.4)])
@torch.no_grad()
def test_a_tied_head_and_embedding_are_one_table_of_integers(fast, tmp_path, outer, bits, off):
    model = gpt2()
    prune_(model, 0.6)
    ids = torch.randint(0, 211, (2, 9))
    expected = model(ids).logits
    done = sparsify_(model, "int8", outer=outer, measure=False)
    head, embedding = model.lm_head, model.transformer.wte
    assert isinstance(embedding, SparseEmbedding)
    assert head.values.data_ptr() == embedding.values.data_ptr()
    assert torch.equal(embedding(ids), embedding.weight[ids])
    assert embedding(ids[:0]).shape == (0, 9, 64)
    size = next(layer for layer in done.layers if "wte" in layer.name)
    assert size.kind == outer
    assert size.packed_bytes * 8 < bits * 211 * 64 + 512
    close = (model(ids).logits - expected).abs().max() / expected.abs().max()
    assert float(close) < off
    save_sparse(model, tmp_path / "m.safetensors")
    again = load_sparse_(gpt2(), tmp_path / "m.safetensors")
    assert isinstance(again.transformer.wte, SparseEmbedding)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_convolutions_of_all_kinds(path):
    for options in (
        {"kernel_size": 1}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": "valid", "dilation": 2}, {"kernel_size": (3, 1), "padding": (1, 0)},
        {"kernel_size": 3, "padding": "same"},
    ):  # fmt: skip
        model = nn.Sequential(nn.Conv2d(32, 31, bias=False, **options))
        prune_(model, 0.5)
        x = torch.randn(2, 32, 12, 13)
        expected, one = model(x), model(x[0])
        sparsify_(model, measure=False)
        assert isinstance(model[0], SparseConv2d)
        assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.allclose(model(x[0]), one, atol=1e-5)
        assert model[0].weight.shape == (31, 32, *model[0].kernel_size)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(64, 64))
    prune_(grouped, 0.5)
    assert (
        "Conv2d is not one that can be packed" in dict(sparsify_(grouped, measure=False).left_out)["0.weight"]
    )


@torch.no_grad()
def test_compile_and_export_take_the_operator_whole(fast):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).eval()
    prune_(model, 0.6, only="all")
    sparsify_(model, measure=False)
    x = torch.randn(3, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    program = torch.export.export(model, (x,))
    assert sum("sparse_linear" in str(node.target) for node in program.graph.nodes) == 2
    assert torch.equal(program.module()(x), model(x))
    arguments = (x, model[0].values, model[0].offsets, model[0].mask, *[None] * 5, 30, 40, 0, 0, 1, [TILES] * 9)
    torch.library.opcheck(
        torch.ops.secateur.sparse_linear.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 7])
def test_compile_takes_bfloat16_whole(fast, rows):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).eval().bfloat16()
    prune_(model, 0.6, only="all")
    sparsify_(model, "bfloat16", measure=False)
    x = torch.randn(rows, 40).bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(torch.export.export(model, (x,), strict=True).module()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiled_by_inductor_a_model_writes_the_same(fast):
    """The default backend, whole: linear layers, Conv1D, a head of integers, a convolution, dense weights beside."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    model = gpt2()
    prune_(model, 0.6)
    sparsify_(model, "int8", outer="int4", measure=False)
    ids = torch.randint(0, 211, (2, 9))
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)
    image = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32)
    ).eval()
    prune_(image, 0.8)
    sparsify_(image, measure=False)
    image[3].ways, image[3].dense = (STREAM, *[DENSE] * 8), image[3].weight
    small = torch.compile(image, fullgraph=True)
    for rows in (1, 3):
        x = torch.randn(rows, 8, 4, 4)
        assert torch.allclose(small(x), image(x), atol=1e-5)


@torch.no_grad()
def test_a_layer_is_copied_cast_and_stored_like_any_other(fast):
    model = nn.Sequential(nn.Linear(40, 30))
    prune_(model, 0.6)
    sparsify_(model, measure=False)
    x = torch.randn(2, 40)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    model.bfloat16()
    assert model[0].values.dtype == torch.float32
    assert model[0].bias.dtype == torch.bfloat16
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert model.float()(x).allclose(expected, atol=1e-2)
    assert "40 -> 30, float32 bitmask" in repr(model)


@torch.no_grad()
def test_blocks_are_packed_as_blocks(fast):
    model = nn.Sequential(nn.Linear(64, 32))
    prune_(model, 0.5, replace(magnitude, pattern=Blocks(4, 1)))
    x = torch.randn(7, 64)
    expected = model(x)
    done = sparsify_(model, block=4, measure=False)
    assert done.layers[0].block == 4
    assert done.layers[0].sparsity == 0.5
    assert torch.allclose(model(x), expected, atol=1e-5)


def table(**fastest):
    """A measurement in which a way is fastest at every batch."""
    row = [ONE, *(fastest.get(way, SLOW) for way in ("stream", "tiles", "unpack"))]
    return [row] * (len(BATCHES) + 1)


def ways(found, **options):
    choice._known.clear()
    return choice.choose(found, LINEAR, **options).ways


def test_the_measured_way_is_taken_and_slower_layers_stay_dense(fast, monkeypatch):
    found = pack(torch.eye(64), form="bitmask")
    monkeypatch.setattr(choice, "_measure", lambda *_: table(tiles=0.5))
    assert ways(found) == (TILES,) * 9
    monkeypatch.setattr(choice, "_measure", lambda *_: table(unpack=1.2))
    assert ways(found) == (TILES,) * 9  # from the file
    times.place().unlink()
    assert choice.choose(found, LINEAR).packed is not None  # from this process
    assert ways(found) == ()
    model = nn.Sequential(nn.Linear(64, 64))
    prune_(model, 0.98)
    with pytest.raises(UsageError, match="slower without them than with them"):
        sparsify_(model)


def test_batches_that_are_slower_packed_use_the_dense_weight_or_forbid_packing(fast, monkeypatch):
    mixed = [[ONE, 0.5, SLOW, SLOW], *table(tiles=1.5)[1:]]
    monkeypatch.setattr(choice, "_measure", lambda *_: mixed)
    found = pack(torch.eye(64), form="bitmask")
    assert ways(found) == ()
    assert ways(found, keep_dense=True) == (STREAM, *[DENSE] * 8)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 64, 1))
    prune_(model, 0.9)
    x, image = torch.randn(9, 64), torch.randn(2, 64, 3, 3)
    expected = model[0](x), model[0](x[:1]), model[1](image), model[1](image[:1, :, :1, :1])
    done = sparsify_(model, keep_dense=True)
    assert [layer.keeps_dense for layer in done.layers] == [True, True]
    assert torch.equal(model[0](x), expected[0])
    assert torch.equal(model[1](image), expected[2])
    assert torch.allclose(model[0](x[:1]), expected[1], atol=1e-5)
    assert torch.allclose(model[1](image[:1, :, :1, :1]), expected[3], atol=1e-5)
    assert not any("dense" in name for name in model.state_dict())
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model[0](x))


def test_the_form_is_the_one_that_was_measured_fastest(fast, monkeypatch):
    weight = torch.randn(64, 100).masked_fill(torch.rand(64, 100) < 0.9, 0)
    weight[3, 9] = -0.0
    fast_forms = {"bitmask": table(stream=0.2, tiles=0.2), "index": table(stream=0.5, tiles=0.1)}
    monkeypatch.setattr(choice, "_measure", lambda like, *_: fast_forms[like.form])
    for kind in ("float32", "bfloat16", "int8", "int4"):
        found = pack(weight.bfloat16() if kind == "bfloat16" else weight, kind, form="bitmask")
        choice._known.clear()
        taken = choice.choose(found, LINEAR).packed
        assert taken is not None
        assert taken.form == "index"
        back = reformed(taken, "bitmask")
        assert back.form == "bitmask"
        for each in (taken, back):
            assert torch.equal(each.dense(), found.dense())
            assert torch.equal(each.dense().signbit(), found.dense().signbit())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("garbled", "JSONDecodeError"),
        ("[]", "holds no table"),
        ('{"version": 2, "times": {"a": [[1.0]]}}', "are no times"),
    ],
)
def test_a_damaged_cache_is_measured_anew_with_a_warning(fast, monkeypatch, content, words):
    monkeypatch.setattr(choice, "_measure", lambda *_: table(tiles=0.5))
    times.place().write_text(content)
    found = pack(torch.eye(64), form="bitmask")
    with pytest.warns(UserWarning, match=words):
        assert ways(found) == (TILES,) * 9
    assert ways(found) == (TILES,) * 9  # sound again: no warning


def test_a_cache_of_another_version_or_that_cannot_be_written_is_no_trouble(fast, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "_measure", lambda *_: table(tiles=0.5))
    times.place().write_text('{"version": 1, "times": {"a": 3}}')
    found = pack(torch.eye(64), form="bitmask")
    assert ways(found) == (TILES,) * 9
    monkeypatch.setenv(times.ENVIRONMENT, str(tmp_path / "sparse.json" / "under a file"))
    with pytest.warns(UserWarning, match="NotADirectory"):
        assert ways(found) == (TILES,) * 9


def test_measuring_really_measures(fast, monkeypatch):
    monkeypatch.setattr(choice, "SIZES", (32, 64))
    monkeypatch.setattr(choice, "SECONDS", 0.001)
    conv = pack(torch.eye(64, 576), form="bitmask")
    for kind in (
        LINEAR,
        choice.Kind("Conv1D", torch.bfloat16, cold=True),
        choice.Kind("Conv2d", torch.float32, (3, 3)),
    ):
        rows = choice.measured(conv, kind)
        assert len(rows) == len(BATCHES) + 1
        assert all(0 < row[0] < 10 and 0 < row[2] < 10 and 0 < row[3] < 10 for row in rows)
        assert [row[1 + STREAM] < 10 for row in rows] == [True] * 3 + [False] * 6
    assert len(times.read(len(BATCHES) + 1, 4)) == 3


def test_without_kernels_rows_are_unpacked(monkeypatch):
    monkeypatch.setattr(choice.native, "library", lambda: None)
    assert ways(pack(torch.eye(4))) == (UNPACK,) * 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "int9"}, "'int9' is not known here; nearest: int8, int4"),
        ({"outer": "float16"}, "'float16' is not known here"),
        ({"block": 2}, "block is 2; expected 1, 4, 16 rows, or \\(4, 4\\)"),
        ({"only": "embedding"}, "no layer to pack; embed.weight: outer=None leaves embeddings"),
    ],
)
def test_mistakes_are_said(options, words):
    with pytest.raises(UsageError, match=words):
        sparsify_(Tiny(), **options, measure=False)


def test_a_dense_layer_is_left_as_it_is(fast):
    with pytest.raises(UsageError, match=r"0% zeros: larger without them than with them\. Prune first"):
        sparsify_(nn.Sequential(nn.Linear(64, 64)), measure=False)
