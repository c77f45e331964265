"""Data walked through once an epoch: dealt anew, nothing lost, told apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from secateur.errors import UsageError
from secateur.recover.batches import Shuffled, identity, trainable


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_every_row_comes_once_with_its_own_label(sizes, seed):
    rows = torch.arange(sum(sizes))
    data = Shuffled([(part, {"twice": 2 * part}) for part in rows.split(sizes)])
    torch.manual_seed(seed)
    dealt = list(data)
    assert len(dealt) == len(data)
    assert [len(x) for x, _ in dealt[:-1]] == [sizes[0]] * (len(dealt) - 1)
    assert sorted(torch.cat([x for x, _ in dealt]).tolist()) == rows.tolist()
    assert all(torch.equal(2 * x, y["twice"]) for x, y in dealt)


def test_the_order_is_new_each_time_and_the_seed_decides_it():
    data = Shuffled(list(torch.arange(40).split(4)))
    torch.manual_seed(3)
    first, second = torch.cat(list(data)), torch.cat(list(data))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(torch.cat(list(data)), first)


@pytest.mark.parametrize(
    "batches",
    [
        [torch.zeros(2, 3), torch.zeros(2, 4)],  # windows of different lengths
        [(torch.zeros(2, 3), ["a", "b"]), (torch.zeros(2, 3), ["c", "d"])],
        [(torch.zeros(2, 3), torch.tensor(1.0)), (torch.zeros(2, 3), torch.tensor(2.0))],
    ],
)
def test_batches_whose_rows_cannot_be_mixed_take_turns_whole(batches):
    data = Shuffled(batches)
    assert not data.mixed
    assert {id(batch) for batch in data} == {id(batch) for batch in batches}


def test_a_loader_decides_for_itself():
    loader = DataLoader(torch.arange(8), batch_size=2)
    assert trainable(loader) is loader


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": torch.zeros(2)}, "data is dict; expected a list of batches"),
        (torch.zeros(2, 3), "data is Tensor; expected a list"),
        (7, "data is int"),
        ("text", "data is str"),
        (iter([torch.zeros(2)]), "can be walked through only once"),
        ([], "data hold no batch"),
    ],
)
def test_data_that_will_not_do(data, message):
    with pytest.raises(UsageError, match=message):
        trainable(data)


def test_data_without_a_length():
    class Endless:
        def __iter__(self):
            return iter([torch.zeros(1)])

    with pytest.raises(UsageError, match="do not know their length"):
        trainable(Endless())


def test_identity_sees_every_number_and_leaves_the_generator_alone():
    a, b = torch.zeros(4, 2), torch.zeros(4, 2)
    b[3, 1] = 1e-30
    assert identity(trainable([a]), 0) == identity(trainable([a.clone()]), 0) != identity(trainable([b]), 0)
    loader = DataLoader(torch.arange(8.0), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    assert identity(loader, 0) == identity(loader, 0)
    assert torch.equal(before, torch.get_rng_state())
