"""Losses of a language model over windows of text: nothing padded, nothing left behind, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.forward import accepts, device_of, dtype_of, logits_of, undisturbed
from secateur.errors import NumericError, UsageError
from secateur.evaluate.windows import Window
from secateur.measurement import Condition

__all__ = [
    "SCORES_AT_ONCE",
    "Piece",
    "Progress",
    "batch_for",
    "batches",
    "forward",
    "losses",
    "number_format",
    "wide",
]

Progress = Callable[[int, int], None]
"""Called with windows done and windows in all."""

TOKENS_PER_FORWARD = 2048
"""How many tokens a forward pass reads where nobody says otherwise."""

SCORES_AT_ONCE = 1 << 23
"""Logits turned into losses at a time: 32 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Piece:
    """One window of one document, cut and ready."""

    document: int
    window: Window
    tokens: Tensor


def losses(model: nn.Module, pieces: list[Piece], batch: int, progress: Progress | None) -> tuple[float, int]:
    """Negative log-likelihood in nats, summed in float64 over all judged tokens, and their number."""
    judged = sum(piece.window.scored for piece in pieces)
    if not judged:
        raise UsageError(
            "there is no token to judge: every document has fewer than 2 tokens, or none fills a window"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or type(model).__name__.endswith("ForMaskedLM"):
        raise UsageError(
            f"perplexity needs a model that predicts each token from those before; {type(model).__name__} "
            "does not"
        )
    total, done = 0.0, 0
    with undisturbed(model):
        for group in batches(pieces, batch, key=lambda piece: (piece.window.read, piece.window.scored)):
            scored = group[0].window.scored
            tokens = torch.stack([piece.tokens for piece in group])
            logits = forward(model, tokens[:, :-1], keep=scored)
            sums = _cross_entropy(logits, tokens[:, -scored:].to(logits.device))
            for piece, value in zip(group, sums, strict=True):
                if not math.isfinite(value):
                    window = piece.window
                    raise NumericError(
                        f"the loss is {value} in document {piece.document}, tokens {window.begin} to "
                        f"{window.end}; look for NaN or Inf in the weights, or compute in float32"
                    )
            total += math.fsum(sums)
            done += len(group)
            if progress:
                progress(done, len(pieces))
    return total, judged


def forward(model: nn.Module, tokens: Tensor, keep: int | None = None) -> Tensor:
    """Logits `(batch, keep or all, vocabulary)`; a cache or logits that nobody reads are not asked for."""
    options: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
    if keep is not None and accepts(model, "logits_to_keep"):
        options["logits_to_keep"] = keep
    try:
        logits = logits_of(model(tokens.to(device_of(model)), **options))
    except IndexError as error:
        raise UsageError(
            f"the model cannot look up these tokens (ids {int(tokens.min())} to {int(tokens.max())}, "
            f"{tokens.shape[1]} positions): {error}; check the tokenizer and context="
        ) from error
    if logits.dim() != 3 or logits.shape[0] != tokens.shape[0]:
        raise UsageError(
            f"expected logits (batch, tokens, vocabulary) for ids {tuple(tokens.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    wanted = tokens.shape[1] if keep is None else keep
    if logits.shape[1] < wanted:
        raise UsageError(f"expected logits at {wanted} positions, got {logits.shape[1]}")
    return logits[:, -wanted:]


def _cross_entropy(logits: Tensor, targets: Tensor) -> list[float]:
    """Loss of each row, summed over its tokens in float64, a bounded number of logits at a time."""
    size = logits.shape[-1]
    if int(targets.max()) >= size:
        raise UsageError(
            f"id {int(targets.max())} is outside the {size} tokens the model predicts; "
            "use the tokenizer the model was trained with"
        )
    step = max(1, SCORES_AT_ONCE // size)
    sums = []
    for row, wanted in zip(logits, targets, strict=True):
        parts = [
            functional.cross_entropy(wide(scores), ids, reduction="none").double().sum().item()
            for scores, ids in zip(row.split(step), wanted.split(step), strict=True)
        ]
        sums.append(sum(parts))
    return sums


def wide(scores: Tensor) -> Tensor:
    """`scores` in float32 at least: a softmax in 16 bits loses the third digit of a loss."""
    return scores if scores.dtype == torch.float64 else scores.float()


def batches(entries: list[Any], batch: int, key: Callable[[Any], Any]) -> list[list[Any]]:
    """Entries in batches of equal `key`, so that nothing is ever padded."""
    groups: dict[Any, list[Any]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return [group[at : at + batch] for group in groups.values() for at in range(0, len(group), batch)]


def batch_for(asked: int | None, context: int) -> int:
    """Windows per forward pass: the number asked for, or as many as make 2,048 tokens."""
    if asked is None:
        return max(1, TOKENS_PER_FORWARD // context)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise UsageError(f"batch_size must be a positive whole number, got {asked!r}")
    return asked


def number_format(model: nn.Module) -> dict[str, Condition]:
    """The number format and the kind of device a model computes with, as conditions."""
    return {"dtype": dtype_of(model), "device": device_of(model).type}
