"""The path of GPUs: rows unpacked by torch on any device, and the Triton kernel where there is one to run it.

Without a GPU the kernel runs in Triton's interpreter where triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os

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
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device here")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_matrix(kind):
    for rows, columns, form, block in (
        (7, 130, "bitmask", 1),
        (9, 256, "bitmask", 1),
        (7, 130, "index", 1),
        (8, 70, None, 4),
    ):
        for sparsity in (0.0, 0.5, 1.0):
            found = packed(matrix(rows, columns, sparsity, block), kind, form, block)
            some = torch.tensor([3, 0, rows - 1, 3])
            assert torch.equal(gpu.rows_of(found, some), found.dense()[some])
    whole = pack(matrix(6, 20, 0.5), "int8", form="dense")
    assert torch.equal(gpu.rows_of(whole, torch.arange(6)), whole.dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 8, 9])
def test_the_product_is_the_dense_one(kind, batch):
    """On the CPU the way of more tokens alone: unpacked by torch."""
    device = "cuda" if CUDA else "cpu"
    for rows, columns, sparsity in ((5, 63, 0.0), (17, 640, 0.5), (33, 130, 1.0)):
        found = packed(matrix(rows, columns, sparsity), kind)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        moved, expected = found.to(device), x.double() @ found.dense().double().T + bias.double()
        y = gpu.multiply(moved, x.to(device), bias.to(device)).cpu()
        size = x.double().abs() @ found.dense().double().abs().T + bias.double().abs()
        assert float(((y.double() - expected).abs() / size).max()) < (
            1e-2 if kind == "float16" and CUDA else 1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_triton_kernel_is_the_dense_product(kind):
    pytest.importorskip("triton", reason="no triton here")
    if not CUDA and not INTERPRETED:
        pytest.skip("no CUDA device here, and TRITON_INTERPRET is not 1")
    device = "cuda" if CUDA else "cpu"
    for rows, columns, sparsity, batch in (
        (5, 63, 0.0, 1),
        (6, 640, 0.5, 3),
        (3, 1300, 0.9, 8),
        (4, 70, 1.0, 2),
    ):
        found = packed(matrix(rows, columns, sparsity), kind, "bitmask")
        x = torch.randn(batch, columns)
        y = gpu.triton_product(found.to(device), x.to(device)).cpu().double()
        expected = x.double() @ found.dense().double().T
        size = x.double().abs() @ found.dense().double().abs().T + 1e-30
        assert float(((y - expected).abs() / size).max()) < 2e-6


@cuda
@torch.no_grad()
def test_a_model_moved_to_a_gpu_computes_the_same():
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    prune_(model, 0.7, only="all")
    x = torch.randn(5, 256)
    expected = model(x)
    sparsify_(model, measure=False)
    assert torch.allclose(model.cuda()(x.cuda()).cpu(), expected, atol=1e-4)


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
    monkeypatch.setattr(gpu, "_kernel", lambda: None)
    with pytest.raises(UsageError, match="needs triton, which comes with torch's CUDA builds"):
        gpu.triton_product(pack(torch.eye(4)), torch.ones(1, 4))
