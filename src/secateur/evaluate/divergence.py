"""How far a language model has moved from a reference, judged by what both predict."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.forward import undisturbed
from secateur.errors import NumericError, UsageError
from secateur.evaluate.corpus import check_tokens, context_for, documents, vocabulary
from secateur.evaluate.likelihood import (
    SCORES_AT_ONCE,
    Progress,
    batch_for,
    batches,
    forward,
    number_format,
    wide,
)
from secateur.evaluate.windows import chunks
from secateur.measurement import Condition, Measurement

__all__ = ["divergence"]


def divergence(
    model: nn.Module,
    reference: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    batch_size: int | None = None,
    dataset: str = "",
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """How far a model has moved from a reference, by what both predict; no labels needed.

    At every position of every non-overlapping window, KL(reference || model) = sum over the vocabulary of
    p_reference (log p_reference - log p_model), in nats, and whether both put the same token first.

    Args:
        model: the model to judge, for instance the pruned one.
        reference: the model to compare with, for instance the dense one; the same vocabulary.
        data: text or ids; see `corpus.documents`.
        tokenizer: for text.
        context: tokens per window; default the model's positions, at most 2,048.
        batch_size: windows per forward pass; default as many as make 2,048 tokens.
        dataset: a name for the data, kept in the conditions.
        progress: called with windows done and windows in all.

    Returns:
        `kl_divergence` (nats per token) and `top1_agreement` (a fraction), means over positions.

    Raises:
        UsageError: different vocabularies, no data, a token outside the vocabulary, a context longer than
            the positions of either model.
        NumericError: logits with NaN, or a model that rules out what the reference allows.

    Cost: one forward pass of both models per window.
    """
    length = min(context_for(model, context), context_for(reference, context))
    found = documents(data, tokenizer)
    check_tokens(found, vocabulary(model))
    check_tokens(found, vocabulary(reference))
    pieces = [document[begin:end] for document in found for begin, end in chunks(len(document), length)]
    batch = batch_for(batch_size, length)
    kl, same, seen, done = 0.0, 0, 0, 0
    with undisturbed(model), undisturbed(reference):
        for group in batches(pieces, batch, key=len):
            tokens = torch.stack(group)
            mine, theirs = forward(model, tokens), forward(reference, tokens)
            if mine.shape != theirs.shape:
                raise UsageError(
                    f"the models answer with {mine.shape[-1]} and {theirs.shape[-1]} tokens of vocabulary; "
                    "divergence needs the same one"
                )
            part, agreed = _compare(mine.flatten(0, 1), theirs.flatten(0, 1).to(mine.device))
            kl, same, seen = kl + part, same + agreed, seen + tokens.numel()
            done += len(group)
            if progress:
                progress(done, len(pieces))
    if not math.isfinite(kl):
        raise NumericError(
            "the divergence is not finite: logits hold NaN, or the model gives probability 0 to a token "
            "that the reference allows; look for NaN or Inf in the weights"
        )
    said = f"non-overlapping windows of {length}, every position"
    conditions: dict[str, Condition] = {"protocol": said, "dataset": dataset, "context": length, "tokens": seen}
    conditions |= {"windows": len(pieces), "documents": len(found), "batch": batch} | number_format(model)
    return {
        # Rounding can leave a hair below zero, which no divergence is.
        "kl_divergence": Measurement("kl_divergence", max(0.0, kl / seen), "nats", conditions),
        "top1_agreement": Measurement("top1_agreement", same / seen, "1", conditions),
    }


def _compare(mine: Tensor, theirs: Tensor) -> tuple[float, int]:
    """KL summed over positions, and how many positions agree on the first token."""
    kl, same = 0.0, 0
    step = max(1, SCORES_AT_ONCE // mine.shape[-1])
    for scores, expected in zip(mine.split(step), theirs.split(step), strict=True):
        q = functional.log_softmax(wide(scores), dim=-1)
        p = functional.log_softmax(wide(expected), dim=-1)
        weight = p.exp()
        # 0 log 0 is 0: a token the reference rules out costs nothing.
        terms = torch.where(weight == 0, torch.zeros_like(p), weight * (p - q))
        kl += terms.sum(dim=-1, dtype=torch.float64).sum().item()
        same += int((scores.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
    return kl, same
