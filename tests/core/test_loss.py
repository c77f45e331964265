"""The loss of a batch: the user's, the model's own, or what the batch implies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.core.loss import loss_of
from secateur.errors import NumericError, UsageError


class Words(nn.Module):
    """Logits for every token, as a mapping."""

    def __init__(self, own: bool = False):
        super().__init__()
        self.table, self.own = nn.Embedding(7, 7), own

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids)
        if labels is None or not self.own:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


def test_a_users_loss_is_called_with_output_and_target():
    model, x, y = nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    value, count = loss_of(model, (x, y), nn.MSELoss())
    assert (value.item(), count) == (F.mse_loss(model(x), y).item(), 5)
    seen = []
    loss_of(model, {"input": x, "labels": y}, lambda output, target: (seen.append(target), output.sum())[1])
    loss_of(model, {"input": x}, lambda output, target: (seen.append(target), output.sum())[1])
    assert torch.equal(seen[0], y)
    assert set(seen[1]) == {"input"}


def test_classes_imply_cross_entropy():
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    y = torch.tensor([0, 3, 1, -100, 2])
    value, count = loss_of(model, (x, y))
    assert count == 4
    torch.testing.assert_close(value, F.cross_entropy(model(x), y))
    pixels, labels = torch.randn(2, 3, 5, 6), torch.randint(0, 4, (2, 5, 6))
    net = nn.Conv2d(3, 4, 1)
    torch.testing.assert_close(loss_of(net, (pixels, labels))[0], F.cross_entropy(net(pixels), labels))
    places = torch.randint(0, 4, (5, 6))
    wide = torch.randn(5, 6, 3)
    torch.testing.assert_close(
        loss_of(model, (wide, places))[0], F.cross_entropy(model(wide).reshape(-1, 4), places.reshape(-1))
    )


def test_token_ids_imply_the_next_token_and_padding_does_not_count():
    model, ids = Words(), torch.randint(0, 7, (1, 6))
    value, count = loss_of(model, {"input_ids": ids})
    assert count == 5
    logits = model(ids)["logits"]
    torch.testing.assert_close(value, F.cross_entropy(logits[0, :-1], ids[0, 1:]))
    padded = torch.cat([ids, torch.full((1, 3), 2)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    torch.testing.assert_close(loss_of(model, {"input_ids": padded, "attention_mask": mask})[0], value)
    left = torch.cat([torch.full((1, 3), 2), ids], 1)
    assert loss_of(model, {"input_ids": left, "attention_mask": mask.flip(1)})[1] == 5
    nothing, count = loss_of(model, ids[:, :1])
    assert (nothing.item(), count) == (0, 0)


def test_labels_imply_the_models_own_loss():
    ids = torch.randint(0, 7, (2, 6))
    labels = ids.clone()
    labels[0, :2] = -100
    value, count = loss_of(Words(own=True), {"input_ids": ids, "labels": labels})
    assert count == 10
    assert value.requires_grad


@pytest.mark.parametrize(
    ("model", "batch", "loss", "error", "words"),
    [
        (nn.Linear(3, 2), torch.zeros(4, 3), None, UsageError, "cannot be told from this batch; pass loss="),
        (nn.Linear(3, 2), (torch.zeros(4, 3), torch.zeros(4, 2)), None, UsageError, "pass loss="),
        (Words(), {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.zeros(1, 4)}, None, UsageError,
         "Words was given labels and returns no loss"),
        (nn.Linear(3, 2), (torch.zeros(4, 3), None), lambda o, t: o, UsageError, r"shape \(\), got \(4, 2\)"),
        (nn.Linear(3, 2), (torch.zeros(4, 3), None), lambda o, t: 1.0, UsageError, "got float"),
        (nn.Linear(3, 2), (torch.zeros(4, 3), None), lambda o, t: o.sum() / 0, NumericError, "NaN or Inf"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(model, batch, loss, error, words):
    with pytest.raises(error, match=words):
        loss_of(model, batch, loss)
