"""The four losses against torch's own, what is chosen by shape, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import UsageError
from secateur.recover.losses import (
    LOSSES,
    inputs_and_labels,
    language_model,
    loss_named,
    loss_of,
    multi_label,
    regression,
    single_label,
)


def close(a, b):
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), (a, b)


def test_a_language_model_is_judged_on_the_next_token():
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))
    close(language_model(logits, ids), expected)


def test_padding_is_no_token_to_predict():
    model = lambda input_ids, attention_mask: SimpleNamespace(logits=table[input_ids])  # noqa: E731
    table = torch.randn(9, 9)
    ids, mask = torch.randint(0, 9, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    whole = nn.Module()
    whole.forward = model
    found = loss_of(whole, {"input_ids": ids, "attention_mask": mask}, None)
    rows = torch.cat([table[ids[0, :-1]], table[ids[1, :2]]])
    close(found, F.cross_entropy(rows, torch.cat([ids[0, 1:], ids[1, 1:3]])))


def test_single_label_is_cross_entropy_over_the_labels_that_count():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 2, -100])
    close(single_label(logits, labels), F.cross_entropy(logits, labels))
    assert single_label(logits, torch.full((6,), -100)) == 0  # torch's own is NaN


def test_single_label_with_maps_of_labels_and_with_one_logit():
    logits, labels = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    close(single_label(logits, labels), F.cross_entropy(logits, labels))
    one, yes = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    close(single_label(one, yes), F.binary_cross_entropy_with_logits(one[:, 0], yes.float()))


def test_multi_label_leaves_out_what_is_unknown():
    logits, labels = torch.randn(3, 4), torch.randint(0, 2, (3, 4))
    close(multi_label(logits, labels), F.binary_cross_entropy_with_logits(logits, labels.float()))
    labels[0] = -100
    close(multi_label(logits, labels), F.binary_cross_entropy_with_logits(logits[1:], labels[1:].float()))


def test_regression():
    outputs, labels = torch.randn(5, 1), torch.randn(5)
    close(regression(outputs, labels), F.mse_loss(outputs[:, 0], labels))


CHOSEN = [
    (torch.randn(4, 3), torch.randint(0, 3, (4,)), single_label),
    (torch.randn(4, 3), torch.randint(0, 2, (4, 3)), multi_label),
    (torch.randn(4, 1), torch.randn(4), regression),
    (torch.randn(4), torch.randn(4), regression),
    (torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)), single_label),
]


@pytest.mark.parametrize(("logits", "labels", "expected"), CHOSEN)
def test_shapes_choose_the_loss(logits, labels, expected):
    close(loss_of(nn.Identity(), (logits, labels), None), expected(logits, labels))


@pytest.mark.parametrize("labels", [torch.rand(4, 3), torch.randint(0, 3, (4, 2)), torch.randint(0, 3, (5,))])
def test_shapes_that_leave_a_doubt_are_refused(labels):
    with pytest.raises(
        UsageError, match="do not say which loss is meant; give loss= one of language-model, single"
    ):
        loss_of(nn.Identity(), (torch.randn(4, 3), labels), None)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_belong_together_are_told(name):
    with pytest.raises(
        UsageError, match=f"loss {name}: outputs of shape .* do not belong to each other; expected"
    ):
        LOSSES[name](torch.randn(4, 3), torch.zeros(7, 2))


def test_names():
    assert loss_named("single_label") is loss_named("single-label") is single_label
    assert loss_named(None) is None
    assert loss_named(F.mse_loss) is F.mse_loss
    with pytest.raises(UsageError, match="loss 'multilabel' is not known; nearest: multi-label"):
        loss_named("multilabel")


def test_batches_of_other_forms():
    with pytest.raises(UsageError, match=r"a batch to train on is a pair .*; got tuple of 3"):
        inputs_and_labels((1, 2, 3))
    with pytest.raises(UsageError, match="got str"):
        inputs_and_labels("text")
    with pytest.raises(UsageError, match="no labels, and no token ids to predict"):
        loss_of(nn.Identity(), torch.randn(4, 3), None)


def test_ones_own_loss_gets_what_the_model_returns():
    model = nn.Module()
    model.forward = lambda x: SimpleNamespace(logits=x, extra=x.sum())
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = loss_of(model, (x, y), lambda output, labels: output.extra + labels.sum())
    assert found == x.sum() + 3
    assert loss_of(nn.Identity(), x, lambda output, batch: (output - batch).sum()) == 0  # no labels: the batch
    close(loss_of(nn.Identity(), (x, y), F.cross_entropy), F.cross_entropy(x, y))
