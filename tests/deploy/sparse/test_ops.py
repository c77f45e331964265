"""What is looked up once and kept for the next call: never stale, never shared by mistake, never kept for nothing."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from secateur.deploy.sparse import ops, sparsify_
from secateur.deploy.sparse.modules import SparseLinear
from secateur.deploy.sparse.ops import BATCHES, DENSE, STREAM, UNPACK, sparse_linear
from secateur.deploy.sparse.packed import pack


def linear(rows: int = 48, columns: int = 70, seed: int = 0) -> nn.Linear:
    """One with zeros in the same places whatever the seed."""
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows)
    layer.weight.data[torch.arange(rows * columns).view(rows, columns) % 3 != 0] = 0
    return layer


def packed_layer(kind: str = "float32", **sizes: int) -> SparseLinear:
    """The same, packed."""
    model = nn.Sequential(linear(**sizes))
    sparsify_(model, kind, measure=False)
    found = model[0]
    assert isinstance(found, SparseLinear)
    return found


@torch.no_grad()
def test_another_bias_or_other_values_count_from_the_next_call_on(fast):
    layer, other = packed_layer(), packed_layer(seed=1)
    x = torch.randn(2, 70)
    first, second = layer(x), other(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), second)
    layer.load_state_dict(packed_layer().state_dict(), assign=True)
    assert torch.equal(layer(x), first)
    layer.bias = nn.Parameter(torch.zeros(48), requires_grad=False)
    without = layer(x)
    assert torch.allclose(without, x @ layer.weight.T, atol=1e-5)
    layer.bias.data = torch.ones(48)
    assert torch.allclose(layer(x), without + 1)
    layer.bias.data = torch.full((96,), 2.0)[::2]
    assert torch.allclose(layer(x), without + 2)
    layer.values.data = other.values.data.clone()
    assert torch.allclose(layer(x), x @ other.weight.T + 2, atol=1e-5)
    layer.ways = (UNPACK,) * (len(BATCHES) + 1)
    assert torch.allclose(layer(x), x @ other.weight.T + 2, atol=1e-5)
    layer.bfloat16()
    layer(x.bfloat16())
    layer.bias.fill_(3)
    assert torch.allclose(layer(x), x @ other.weight.T + 3, atol=1e-5)


@torch.no_grad()
def test_matrices_that_share_values_are_told_apart(fast):
    one = pack(linear().weight.detach())
    rolled = torch.roll(linear().weight.detach(), 1, 1)
    two = pack(rolled)
    object.__setattr__(two, "values", one.values)
    x, bias = torch.randn(3, 70), torch.randn(48)
    for _ in range(2):
        for packed in (one, two):
            expected = x @ packed.dense().T
            assert torch.allclose(sparse_linear(packed, x), expected, atol=1e-5)
            assert torch.allclose(sparse_linear(packed, x, bias), expected + bias, atol=1e-5)
            wide = sparse_linear(packed, x, bias, ways=[UNPACK] * 9)
            assert torch.allclose(wide, expected + bias, atol=1e-5)


def test_nothing_is_kept_of_a_matrix_that_is_gone(fast):
    packed = pack(linear().weight.detach())
    identity = id(packed.values)
    sparse_linear(packed, torch.randn(1, 70))
    assert identity in ops._ready
    del packed
    gc.collect()
    assert identity not in ops._ready
    layer = packed_layer()
    layer(torch.randn(1, 70))
    held = weakref.ref(layer.values), weakref.ref(layer.__dict__["_ready"])
    del layer
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_one_matrix_with_several_biases_is_made_ready_once_for_each(fast, monkeypatch):
    made = []
    monkeypatch.setattr(ops.kernels, "Product", lambda *a, real=ops.kernels.Product: made.append(1) or real(*a))
    packed, x = pack(linear().weight.detach()), torch.randn(2, 70)
    biases = [None, *(torch.randn(packed.rows) for _ in range(ops.BIASES - 1))]
    for _ in range(3):
        for bias in biases:
            expected = x @ packed.dense().T + (0 if bias is None else bias)
            assert torch.allclose(sparse_linear(packed, x, bias), expected, atol=1e-5)
    assert len(made) == ops.BIASES
    sparse_linear(packed, x, torch.randn(packed.rows))
    assert len(ops._ready[id(packed.values)]) == ops.BIASES


def test_short_memory_is_said(fast, monkeypatch):
    product = ops.kernels.Product(pack(linear().weight.detach()), None)
    product._multiply = lambda *_: ops.kernels.SHORT
    with pytest.raises(MemoryError, match="no memory to make 3 inputs ready"):
        product(torch.randn(3, 70), STREAM)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_that_are_replaced_or_moved_count(fast, kind):
    layer, x = packed_layer(kind), torch.randn(1, 70)
    y, by_operator = layer(x), sparse_linear(layer.packed, x)
    layer.scale = layer.scale * 2
    assert torch.allclose(layer(x) - layer.bias, 2 * (y - layer.bias), atol=1e-5)
    assert torch.allclose(sparse_linear(layer.packed, x), 2 * by_operator, atol=1e-5)
    layer.scale.data = layer.scale.data * 2  # the same tensor, elsewhere
    assert torch.allclose(layer(x) - layer.bias, 4 * (y - layer.bias), atol=1e-5)
    assert torch.allclose(sparse_linear(layer.packed, x), 4 * by_operator, atol=1e-5)
    half = torch.func.functional_call(layer, {"scale": layer.scale / 2}, x)
    assert torch.allclose(half - layer.bias, 2 * (y - layer.bias), atol=1e-5)


@torch.no_grad()
def test_inputs_that_are_a_negative_view(fast):
    layer, x = packed_layer(), torch.randn(1, 70)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))


@torch.no_grad()
def test_threads_that_call_one_layer_at_once_get_their_own_results(fast):
    layer = packed_layer("int8", rows=300, columns=512)
    inputs = [torch.randn(1 + number % 3, 512) for number in range(8)]
    expected = [layer(x) for x in inputs]
    layer.__dict__.pop("_ready")
    start, wrong = threading.Barrier(4), []

    def call(number: int) -> None:
        start.wait(60)
        for turn in range(60):
            place = (number + turn) % 8
            each = layer(inputs[place]) if turn % 2 else sparse_linear(layer.packed, inputs[place], layer.bias)
            if not torch.equal(each, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@torch.no_grad()
def test_the_default_type_does_not_change_a_result(fast):
    layer, x = packed_layer(), torch.randn(2, 70)
    expected = layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layer(x), expected)
        assert torch.equal(sparse_linear(layer.packed, x, layer.bias), expected)
        assert layer(x.double()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (69,), (2, 35), (2, 3, 69), (1, 2, 35)])
def test_inputs_of_another_width_are_refused_by_layer_and_operator(path, shape):
    layer = packed_layer()
    for call in (layer, lambda x: sparse_linear(layer.packed, x, layer.bias)):
        with pytest.raises(RuntimeError):
            call(torch.randn(shape))


def test_a_matrix_elsewhere_than_its_inputs_is_refused(fast):
    layer = packed_layer().to("meta")
    with pytest.raises(RuntimeError, match="inputs on the CPU meet a matrix on meta; move one to the other"):
        layer(torch.randn(1, 70))


@torch.no_grad()
def test_a_layer_and_its_operator_agree_at_every_batch(path):
    for kind in ("float32", "int8", "int4"):
        layer = packed_layer(kind, columns=128)
        for batch in (0, 1, 4, 5, 33, 128, 129, 200):
            x = torch.randn(batch, 128)
            y = layer(x)
            assert y.shape == (batch, 48)
            assert torch.equal(y, sparse_linear(layer.packed, x, layer.bias))
            assert torch.allclose(y, x @ layer.weight.T + layer.bias, atol=0.1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_traces_or_batches_sees_the_operator(fast):
    layer, x = packed_layer(), torch.randn(2, 70)
    layer(x)
    layer.ways = (STREAM,) * 8 + (DENSE,)
    traced = torch.jit.trace(layer, x, check_trace=False)
    other = torch.randn(2, 70)
    assert torch.equal(traced(other), layer(other))
    assert torch.equal(torch.func.vmap(layer)(x[:, None])[:, 0], torch.cat([layer(row[None]) for row in x]))
