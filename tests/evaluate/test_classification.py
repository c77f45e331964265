import builtins

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import NumericError, UsageError
from secateur.evaluate import accuracy, f1, predict


def split(logits, labels, size=4):
    return list(zip(logits.split(size), labels.split(size), strict=True))


@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 10**6), st.integers(1, 31))
def test_many_classes_as_scikit_learn_counts_them(examples, classes, seed, size):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(examples, classes, generator=generator)
    labels = torch.randint(classes, (examples,), generator=generator)
    found = predict(nn.Identity(), split(logits, labels, size), dataset="noise")
    chosen = logits.argmax(1)
    assert accuracy(found).value == pytest.approx(sklearn.metrics.accuracy_score(labels, chosen))
    for average in ("macro", "micro", "weighted"):
        expected = sklearn.metrics.f1_score(labels, chosen, average=average, zero_division=0)
        assert f1(found, average=average).value == pytest.approx(expected)
    assert found.conditions["examples"] == examples
    assert found.conditions["batch"] == min(size, examples)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("kind", [torch.long, torch.float])
def test_two_classes_from_one_score(shape, kind):
    logits = torch.tensor([0.3, -0.2, 2.0, -3.0, 0.1])
    labels = torch.tensor([1, 1, 1, 0, 0]).to(kind)
    batches = split(logits.reshape(shape), labels, 2)
    # Positive above 0: 1 0 1 0 1, so two of three found, one of three wrong.
    assert accuracy(nn.Identity(), batches).value == pytest.approx(3 / 5)
    assert f1(nn.Identity(), batches, average="binary").value == pytest.approx(2 / 3)
    at_half = accuracy(nn.Identity(), batches, threshold=0.5)
    assert at_half.value == pytest.approx(3 / 5)
    assert (at_half.conditions["threshold"], at_half.conditions["task"]) == (0.5, "binary")
    assert f1(nn.Identity(), batches, average="binary", threshold=0.5).value == pytest.approx(1 / 2)


def test_several_labels_at_once():
    labels = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0]])
    logits = torch.tensor([[1.0, -1, 1], [1, -1, 1], [1, 1, -1]])
    found = predict(nn.Identity(), [(logits, labels.float())])
    assert found.task == "multilabel"
    assert accuracy(found).value == pytest.approx(2 / 3)
    for average in ("macro", "micro", "weighted"):
        expected = sklearn.metrics.f1_score(labels, (logits > 0).long(), average=average)
        assert f1(found, average=average).value == pytest.approx(expected)


def test_one_label_per_token_with_some_left_out():
    logits = torch.eye(3)[torch.tensor([[0, 1, 2], [2, 1, 0]])]
    labels = torch.tensor([[0, 1, -100], [0, -100, -100]])
    found = accuracy(nn.Identity(), [(logits, labels)])
    assert (found.value, found.conditions["examples"]) == (pytest.approx(2 / 3), 3)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.drop = nn.Dropout(0.9)

    def forward(self, values, scale=1.0):
        return {"logits": self.drop(values @ self.weight) * scale}


def test_batches_may_be_mappings_pairs_or_tuples_of_arguments():
    model = Named().train()
    values, labels = torch.eye(3), torch.tensor([0, 1, 1])
    before = torch.get_rng_state()
    for batch in (
        {"values": values, "labels": labels},
        (values, labels),
        [values, labels.tolist()],
        ((values, 2.0), labels),
        ({"values": values, "scale": 0.5}, labels),
    ):
        assert accuracy(model, [batch]).value == pytest.approx(2 / 3)
    assert model.drop.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_text_says_what_was_judged():
    text = str(accuracy(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))], dataset="digits"))
    assert text == "accuracy 1 (multiclass, digits, 2 examples, batch 2)"
    text = str(f1(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))]))
    assert text == "f1 1 (macro, multiclass, 2 examples, batch 2)"


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"there is no labelled example to judge; expected batches of \(inputs, labels\)"),
        ([(EYE, torch.tensor([-100] * 3))], "there is no labelled example to judge"),
        ([EYE], "batch 0 must be a pair (inputs, labels) or a mapping with labels, got Tensor"),
        ([(EYE, EYE, EYE)], "batch 0 must be a pair (inputs, labels) or a mapping with labels, got tuple of 3"),
        ([{"values": EYE}], "batch 0 has no labels; it holds ['values']"),
        (
            [(EYE, torch.tensor([0, 1]))],
            "batch 0: logits (3, 3) and labels (2,) fit no task; expected (N, C) with",
        ),
        (
            [(EYE, torch.tensor([0, 1, 3]))],
            "batch 0: labels must be whole numbers from 0 to 2, or -100 to skip",
        ),
        ([(EYE, torch.tensor([0, 1, 0.5]))], "batch 0: labels must be whole numbers from 0 to 2"),
        ([(EYE[0], torch.tensor([0, 1, 2]))], "batch 0: labels must be whole numbers from 0 to 1"),
        ([(EYE, EYE * 2)], "batch 0: several labels at once must be 0 or 1 each"),
        (
            [(EYE, torch.tensor([0, 1, 2])), (EYE[0], torch.tensor([0, 1, 1]))],
            "the batches are of different tasks (binary, multiclass); give one kind",
        ),
    ],
)
def test_mistakes(batches, message):
    plain = message.replace("\\", "")
    with pytest.raises(UsageError) as caught:
        accuracy(nn.Identity(), batches)
    assert str(caught.value).startswith(plain)


def test_nan_is_an_error():
    with pytest.raises(NumericError, match="batch 1: the logits hold NaN"):
        accuracy(nn.Identity(), [(EYE, torch.tensor([0, 1, 2])), (EYE * np.nan, torch.tensor([0, 1, 2]))])


def test_mistakes_with_averages_and_predictions():
    found = predict(nn.Identity(), [(EYE, torch.tensor([0, 1, 2]))])
    with pytest.raises(UsageError, match="unknown average 'marco'; nearest: macro"):
        f1(found, average="marco")
    with pytest.raises(UsageError, match='average="binary" needs two classes, got a multiclass task'):
        f1(found, average="binary")
    with pytest.raises(UsageError, match="these predictions are made already"):
        accuracy(found, [(EYE, torch.tensor([0, 1, 2]))])
    with pytest.raises(UsageError, match="a model needs batches of"):
        accuracy(nn.Identity())


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    found = predict(nn.Identity(), [(EYE, torch.tensor([0, 1, 2]))])
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"F1 needs scikit-learn: pip install 'secateur\[metrics\]'"):
        f1(found)
