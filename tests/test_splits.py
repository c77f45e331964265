"""Folds and class weights."""

from __future__ import annotations

import sys

import pytest
import torch

from secateur.errors import UsageError
from secateur.splits import class_weights, folds

pytest.importorskip("sklearn")


def test_every_example_is_held_out_once_and_classes_keep_their_share():
    labels = torch.tensor([0] * 20 + [1] * 10)
    found = folds(labels, 5)
    assert sorted(torch.cat([held for _, held in found]).tolist()) == list(range(30))
    for train, held in found:
        assert not set(train.tolist()) & set(held.tolist())
        assert labels[held].tolist().count(1) == 2
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, folds(labels, 5), strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(found, folds(labels, 5, seed=1), strict=True))


def test_folds_without_classes():
    for labels in (10, torch.rand(10), torch.randint(0, 2, (10, 3))):
        assert sorted(torch.cat([held for _, held in folds(labels, 3)]).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("labels", "k", "message"),
    [
        (5, 1, "1 folds of 5 examples: expected at least 2"),
        (5, 6, "6 folds of 5 examples"),
        (torch.tensor([0, 0, 0, 1]), 2, "the smallest class has 1 examples"),
    ],
)
def test_too_few_examples(labels, k, message):
    with pytest.raises(UsageError, match=message):
        folds(labels, k)


def test_rare_classes_weigh_more():
    weights = class_weights(torch.tensor([0, 0, 0, 1, -100]))
    assert torch.allclose(weights, torch.tensor([4 / 6, 4 / 2]))


@pytest.mark.parametrize("labels", [torch.tensor([-100]), torch.rand(3), torch.tensor([0, -1])])
def test_no_labels(labels):
    with pytest.raises(UsageError, match="need labels: whole numbers from 0"):
        class_weights(labels)


def test_a_class_that_never_occurs():
    with pytest.raises(UsageError, match=r"classes \[1\] of 3 have no example"):
        class_weights(torch.tensor([0, 2]))


def test_a_missing_extra_names_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[metrics\]'"):
        folds(5, 2)
