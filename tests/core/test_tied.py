"""Which parameters share memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.tied import contains, same_tensor, tied_names


def holder(*tensors: torch.Tensor) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])


def test_nothing_is_tied_in_a_plain_model() -> None:
    assert tied_names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == {}


def test_the_same_parameter_and_another_parameter_of_the_same_memory() -> None:
    memory = torch.zeros(4, 4)
    model = holder(memory, memory)
    assert model[0] is not model[1]
    assert tied_names(model) == {"0": ("1",), "1": ("0",)}
    assert same_tensor(model[0], model[1])
    once = nn.ParameterList([model[0], model[0], nn.Parameter(torch.zeros(3))])
    assert tied_names(once) == {"0": ("1",), "1": ("0",)}


def test_neighbours_in_one_buffer_are_not_tied() -> None:
    memory = torch.zeros(12, 4)
    assert tied_names(holder(memory[:4], memory[4:8], memory[8:])) == {}
    # columns of one matrix interleave in memory and share no element
    assert tied_names(holder(memory[:, :2], memory[:, 2:])) == {}


def test_a_chain_of_overlaps_ties_neighbours_only() -> None:
    memory = torch.zeros(12)
    assert tied_names(holder(memory[:5], memory[4:9], memory[8:])) == {
        "0": ("1",),
        "1": ("0", "2"),
        "2": ("1",),
    }


def test_other_views_of_the_same_elements_are_tied_but_not_the_same_tensor() -> None:
    memory = torch.zeros(4, 4)
    for view in (memory.t(), memory.view(2, 8), memory.view(torch.int32)):
        model = holder(memory, view)
        assert tied_names(model) == {"0": ("1",), "1": ("0",)}
        assert not same_tensor(model[0], model[1])
        assert contains(model[0], model[1])
        assert contains(model[1], model[0])


def test_elements_of_different_sizes_that_interleave_count_as_tied() -> None:
    memory = torch.zeros(8, 4)
    halves = memory.view(torch.float16)[:, 4:]
    assert tied_names(holder(memory[:, :2], halves)) == {"0": ("1",), "1": ("0",)}


def test_on_the_meta_device_only_identity_ties() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert tied_names(model) == {}
    model[1].weight = model[0].weight
    assert tied_names(model) == {"0.weight": ("1.weight",), "1.weight": ("0.weight",)}
    assert same_tensor(model[0].weight, model[1].weight)
    assert contains(model[0].weight, model[1].weight)
    other = nn.Parameter(torch.zeros(4, 4, device="meta"))
    assert not same_tensor(model[0].weight, other)
    assert not contains(model[0].weight, other)


def test_empty_parameters_are_not_tied() -> None:
    assert tied_names(holder(torch.zeros(0), torch.zeros(0, 4))) == {}


def test_contains() -> None:
    memory = torch.zeros(6, 4)
    assert contains(memory, memory[2:4])
    assert contains(memory, memory[:, 1:2])
    assert not contains(memory[2:4], memory)
    assert not contains(memory[:4], memory[2:])
    assert not contains(memory[:, :2], memory[:1, :1])
    assert not contains(memory, torch.zeros(6, 4))


SLICES = st.builds(slice, st.integers(0, 5), st.integers(1, 8), st.integers(1, 3))


@pytest.mark.filterwarnings("default")
@given(rows=st.tuples(SLICES, SLICES), columns=st.tuples(SLICES, SLICES))
def test_tied_means_having_an_element_in_common(
    rows: tuple[slice, slice], columns: tuple[slice, slice]
) -> None:
    memory = torch.arange(64.0).reshape(8, 8)
    one, two = (memory[row, column] for row, column in zip(rows, columns, strict=True))
    common = set(one.flatten().tolist()) & set(two.flatten().tolist())
    model = holder(one, two)
    assert bool(tied_names(model)) == bool(common)
    if contains(model[0], model[1]) and two.numel():
        assert common == set(two.flatten().tolist())
