"""Cuts through 16-bit magnitudes: by counting they are what sorting finds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core import halves
from secateur.core.select import Magnitudes, cut_by_part, smallest

KINDS = (torch.bfloat16, torch.float16)
BITS = st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=1, max_size=40)


def weights_of(bits, kind):
    """Any bit pattern but NaN, with many ties, both zeros and subnormal numbers."""
    values = torch.tensor(bits, dtype=torch.int16).view(kind)
    return torch.where(values.float().isnan(), torch.zeros_like(values), values)


@given(st.lists(BITS, min_size=1, max_size=4), st.sampled_from(KINDS), st.data())
def test_the_cut_through_all_parts_is_the_one_that_sorting_finds(bits, kind, data):
    parts = [weights_of(part, kind) for part in bits]
    ranked = np.sort(torch.cat(parts).abs().float().numpy())
    k = data.draw(st.integers(1, len(ranked)))
    value, below, equal = cut_by_part([lambda part=part: Magnitudes(part[None]) for part in parts], k)
    assert value == ranked[k - 1]
    assert below == [int((part.abs().float() < value).sum()) for part in parts]
    assert equal == [int((part.abs().float() == value).sum()) for part in parts]


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.data(),
)
def test_the_smallest_are_those_of_a_stable_sort(rows, kind, data):
    weights = torch.tensor(rows).to(kind)
    counts = torch.tensor([data.draw(st.integers(0, 6)) for _ in rows])
    order = torch.sort(weights.abs().float(), dim=1, stable=True).indices
    wanted = torch.zeros_like(weights, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        wanted[row, order[row, :count]] = True
    assert torch.equal(smallest(Magnitudes(weights), counts), wanted)


def test_a_row_of_many_chunks_with_ties_in_all_of_them(monkeypatch):
    monkeypatch.setattr(halves, "CHUNK", 7)
    weights = (torch.arange(100) % 3).to(torch.bfloat16)
    marked = halves.smallest_in_row(weights, 50)
    order = torch.sort(weights.float(), stable=True).indices[:50]
    assert torch.equal(marked.nonzero()[:, 0], order.sort().values)


def test_parts_of_two_types_are_chosen_from_all_the_same():
    parts = [torch.tensor([[1.0, -3.0]]).to(kind) for kind in (*KINDS, torch.float32)]
    assert cut_by_part([lambda part=part: Magnitudes(part) for part in parts], 4) == (3.0, [1, 1, 1], [1, 1, 1])


def test_a_rank_outside_is_refused():
    weights = torch.ones(1, 3, dtype=torch.bfloat16)
    for k in (0, 4):
        with pytest.raises(IndexError, match=f"k = {k} is not in 1..3"):
            cut_by_part([lambda: Magnitudes(weights)], k)


@pytest.mark.parametrize("kind", [*KINDS, torch.float32, torch.float64, torch.bool])
def test_zeros_of_either_sign_are_no_numbers(kind):
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, 6e-8]).to(kind)
    assert halves.count_nonzero(values) == 3
