"""The path of GPUs: rows unpacked by torch on any device, and the Triton kernels where there is something to run them.

Without a GPU the kernels run in Triton's interpreter where triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import prune_
from secateur.deploy.sparse import gpu, pack, sparsify_
from secateur.errors import UsageError
from secateur.pattern import NM

from .test_kernels import matrix, packed

KINDS = ("float32", "bfloat16", "float16", "int8", "int4")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device here")


@pytest.fixture
def kernels():
    """What a test needs that runs them."""
    pytest.importorskip("triton", reason="no triton here")
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device here, and TRITON_INTERPRET is not 1")


def close(y, x, found, bias, limit=2e-6):
    """The dense product, within a share of the sum of magnitudes."""
    dense, x = found.dense().double(), x.double()
    expected, size = x @ dense.T + bias.double(), x.abs() @ dense.abs().T + bias.double().abs() + 1e-30
    return float(((y.cpu().double() - expected).abs() / size).max()) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_matrix(kind):
    """Those that torch unpacks, of every form and block, where the matrix lies."""
    for rows, columns, form, block in (
        (7, 130, "bitmask", 1),
        (9, 256, "bitmask", 1),
        (7, 130, "index", 1),
        (5, 600, "index", 1),
        (8, 70, None, 4),
        (10, 128, None, 4),
        (37, 130, None, 16),
    ):
        for sparsity in (0.0, 0.5, 1.0):
            found = packed(matrix(rows, columns, sparsity, block), kind, form, block)
            some = torch.tensor([3, 0, rows - 1, 3])
            seen = gpu.rows_of(found.to(DEVICE), some.to(DEVICE))
            assert torch.equal(seen.cpu(), found.dense()[some])
            assert seen.dtype == found.dense().dtype
            assert seen.device.type == DEVICE
    whole = pack(matrix(6, 20, 0.5), "int8", form="dense")
    assert torch.equal(gpu.rows_of(whole, torch.arange(6)), whole.dense())


def test_a_codebook_of_its_own_counts():
    found = packed(matrix(3, 130, 0.5), "int4")
    book = torch.tensor([0, *range(100, 115)], dtype=torch.int8)
    own = replace(found, codebook=book)
    assert torch.equal(gpu.rows_of(own, torch.arange(3)), own.dense())
    assert not torch.equal(own.dense(), found.dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_the_product_is_the_dense_one(kind, batch):
    """On the CPU without an interpreter: unpacked by torch."""
    for rows, columns, sparsity, block in ((5, 63, 0.0, 1), (17, 640, 0.5, 1), (9, 70, 0.5, 4)):
        found = packed(matrix(rows, columns, sparsity, block), kind, block=block)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        y = gpu.multiply(found.to(DEVICE), x.to(DEVICE), bias.to(DEVICE))
        assert y.shape == (batch, rows)
        assert close(y, x, found, bias, 1e-2 if kind == "float16" and CUDA else 1e-5)


def test_panels_are_the_whole(kernels, monkeypatch):
    """A matrix that is made dense a panel at a time, and no tokens at all."""
    found, bias = packed(matrix(37, 63, 0.5), "int4"), torch.randn(37)
    x = torch.randn(3, 63)
    monkeypatch.setattr(gpu, "PANEL", 1100)
    assert close(gpu.multiply(found.to(DEVICE), x.to(DEVICE), bias.to(DEVICE)), x, found, bias, 1e-5)
    assert gpu.multiply(found.to(DEVICE), x[:0].to(DEVICE), None).shape == (0, 37)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_the_dense_product_and_the_rows(kernels, kind):
    """Sizes around a byte, a word, a step and a round of steps, none of them a multiple of anything."""
    for rows, columns, sparsity in ((5, 63, 0.0), (2, 63, 1.0), (3, 640, 0.5), (2, 2100, 0.9)):
        found = packed(matrix(rows, columns, sparsity), kind, "bitmask")
        x, bias = torch.randn(1, columns), torch.randn(rows)
        moved = found.to(DEVICE)
        assert torch.equal(gpu.triton_rows(moved, torch.float32).cpu(), found.dense().float())
        assert close(gpu.triton_product(moved, x.to(DEVICE), bias.to(DEVICE)), x, found, bias)
        half = x.bfloat16()
        y = gpu.triton_product(moved, half.to(DEVICE))
        assert y.dtype == torch.bfloat16
        assert close(y, half, found, torch.zeros(rows), 1e-2)


def test_the_kernels_look_codes_up(kernels):
    """A codebook of its own, and one whose second zero is in use."""
    found = packed(matrix(3, 63, 0.5), "int4")
    book = torch.tensor([0, *range(100, 115)], dtype=torch.int8)
    eights = found.values.clone()
    eights[:-64] = eights[:-64] | 0x88
    x = torch.randn(1, 63)
    for own in (replace(found, codebook=book), replace(found, values=eights)):
        moved = own.to(DEVICE)
        assert torch.equal(gpu.triton_rows(moved, torch.float32).cpu(), own.dense())
        assert close(gpu.triton_product(moved, x.to(DEVICE)), x, own, torch.zeros(3))
    moved.values[:] = 0  # the same stream, written over: what was looked up holds no more
    assert not gpu.triton_rows(moved, torch.float32).any()


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter computes in numpy
def test_inputs_that_are_no_numbers_reach_every_row(kernels):
    for kind in ("bfloat16", "int4"):
        found = packed(matrix(4, 300, 1.0 if kind == "int4" else 0.9), kind, "bitmask")
        x = torch.randn(1, 300)
        x[0, 123] = torch.nan
        assert gpu.triton_product(found.to(DEVICE), x.to(DEVICE)).isnan().all()
        x[0, 123] = torch.inf
        expected = x @ found.dense().float().T
        y = gpu.triton_product(found.to(DEVICE), x.to(DEVICE)).cpu()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@cuda
@torch.no_grad()
def test_a_model_moved_to_a_gpu_computes_the_same():
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    prune_(model, 0.7, only="all")
    x = torch.randn(5, 256)
    expected = model(x)
    sparsify_(model, measure=False)
    model.cuda()
    assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-4)
    assert torch.allclose(model(x[:1].cuda()).cpu(), expected[:1], atol=1e-4)


@cuda
@torch.no_grad()
def test_two_of_four_become_torch_s_semi_structured_tensors():
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).half().cuda()
    from secateur import Recipe, magnitude

    prune_(model, recipe=Recipe(magnitude.score, pattern=NM(2, 4)), only="0")
    x = torch.randn(64, 256).half().cuda()
    expected = model(x)
    assert gpu.semi_structured_(model) == ["0.weight"]
    assert torch.allclose(model(x), expected, atol=1e-2)


def test_what_needs_a_gpu_says_so(monkeypatch):
    with pytest.raises(UsageError, match=r"the model lies on cpu; semi-structured tensors need a GPU"):
        gpu.semi_structured_(nn.Linear(64, 32))
    monkeypatch.setattr(gpu, "_kernels", lambda: None)
    for kernel in (
        lambda: gpu.triton_product(pack(torch.eye(4)), torch.ones(1, 4)),
        lambda: gpu.triton_rows(pack(torch.eye(4)), torch.float32),
    ):
        with pytest.raises(UsageError, match=r"need triton, which comes with torch's CUDA builds"):
            kernel()


def test_whether_codes_are_integers_is_asked_again_of_another_codebook():
    found = packed(matrix(4, 70, 0.5), "int4", "bitmask")
    assert gpu._is_plain(found, found.codebook)
    other = found.codebook + 1
    assert not gpu._is_plain(found, other)
    assert gpu._is_plain(found, found.codebook)
    with torch.inference_mode():
        made = packed(matrix(4, 70, 0.5), "int4", "bitmask")
        assert gpu._is_plain(made, made.codebook)
