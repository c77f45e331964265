"""A classifier on top of a language model, read at the last real token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.forward import undisturbed
from secateur.errors import UsageError

__all__ = ["Classifier", "fitted"]


class Classifier(nn.Module):
    """A linear head on the hidden state of the last real token of each row.

    Padding follows the real tokens and is not read: what a row is padded with, and how far, changes nothing.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        body = getattr(model, "base_model", None)
        if body is None or body is model:
            raise UsageError(
                f"{type(model).__name__} has no body (base_model) that a classifier could stand on"
            )
        self.model = model
        embedding: Any = model.get_input_embeddings()
        width = getattr(model.config, "hidden_size", None) or embedding.weight.shape[1]
        self.head = nn.Linear(width, classes)

    def features(
        self, input_ids: Int[Tensor, "row token"], attention_mask: Int[Tensor, "row token"]
    ) -> Float[Tensor, "row width"]:
        """Hidden states of the last real tokens."""
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "row class"]:
        """Logits of the classes."""
        return self.head(self.features(input_ids, attention_mask))


def fitted(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], classes: int, penalty: float = 1e-2
) -> Classifier:
    """A classifier on a copy of a model, only its head fitted: logistic regression on standardised features.

    Args:
        model: a causal language model; copied, not changed.
        batches: `input_ids`, `attention_mask` and `labels`.
        classes: how many.
        penalty: half of it times the squared weights is added to the mean loss.

    Cost: one forward pass, and at most 100 steps of L-BFGS on the features.
    """
    found = Classifier(copy.deepcopy(model), classes).eval()
    with undisturbed(found):
        features = torch.cat([found.features(b["input_ids"], b["attention_mask"]) for b in batches]).double()
    labels = torch.cat([b["labels"] for b in batches])
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(scaled @ weight.t() + bias, labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        found.head.weight.copy_(weight / std)
        found.head.bias.copy_(bias - (weight / std) @ mean)
    return found
