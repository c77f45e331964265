"""Columns eliminated natively: the very bytes of the loop in torch, for any shape and number of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core import native


@pytest.fixture(autouse=True)
def library(kernels, monkeypatch):
    monkeypatch.setattr(native, "FILE", kernels)
    native._opened.cache_clear()
    yield
    native._opened.cache_clear()


def in_torch(target, keep, factor, gained, lost):
    own = factor.diagonal()[:, None]
    for j in range(len(target)):
        torch.sub(target[j], (target[j] + gained[j] / own[j]) * keep[j], out=lost[j])
        gained[j + 1 :] += factor[j, j + 1 :, None] * lost[j]


@given(
    st.integers(1, 20),
    st.sampled_from([1, 63, 64, 65, 130]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_native_elimination_gives_the_bytes_of_the_loop(columns, out, threads, transposed, seed):
    random = torch.Generator().manual_seed(seed)
    target, gained = torch.randn(2, columns, out, generator=random)
    keep = (torch.rand(columns, out, generator=random) < 0.5).float()
    factor = torch.randn(columns, columns, generator=random).triu(1) + torch.eye(columns)
    factor = factor.t().contiguous().t() if transposed else factor
    found, wanted = ((gained.clone(), torch.full_like(target, torch.nan)) for _ in range(2))
    in_torch(target, keep, factor, *wanted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.eliminate(target, keep, factor, *found)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
