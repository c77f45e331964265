"""Text or token ids, in whatever form they come, as documents of real tokens; and what a model can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import UsageError

__all__ = ["check_tokens", "context_for", "documents", "encode", "positions", "texts", "vocabulary"]

_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx", "block_size", "max_seq_len", "context_length")
"""Where configurations keep the number of positions; the first three in the harness's order."""

_DEFAULT_CONTEXT = 2048


def encode(tokenizer: Any, text: str, special_tokens: bool | None = None) -> list[int]:
    """The ids of `text`.

    Args:
        tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer`, or any function from text to ids.
        text: what to encode.
        special_tokens: whether to add the tokenizer's own (BOS, EOS); None leaves its default.

    Raises:
        UsageError: no tokenizer, or one that gives no ids.
    """
    if tokenizer is None:
        raise UsageError("text needs a tokenizer: pass tokenizer=, or token ids in place of the text")
    options: dict[str, Any] = {} if special_tokens is None else {"add_special_tokens": special_tokens}
    if hasattr(tokenizer, "encode"):
        # Without verbose=False transformers warns that a long text does not fit; it is cut here, later.
        quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        found = tokenizer.encode(text, **options, **quiet)
        found = getattr(found, "ids", found)
    elif callable(tokenizer):
        found = tokenizer(text)
        found = found["input_ids"] if isinstance(found, Mapping) else found
    else:
        raise UsageError(f"tokenizer must encode text, got {type(tokenizer).__name__}")
    return _ids(found).tolist()


def texts(data: Any) -> list[str] | None:
    """The documents in `data` if it is text (one string, or several), else None."""
    if isinstance(data, str):
        return [data]
    if isinstance(data, list | tuple) and data and all(isinstance(entry, str) for entry in data):
        return list(data)
    return None


def documents(data: Any, tokenizer: Any = None) -> list[Tensor]:
    """`data` as documents: one 1-D int64 tensor of real tokens each. No window ever crosses two of them.

    Args:
        data: a text, several texts, token ids (1-D, or 2-D with one document per row), several sequences of
            ids, or batches: mappings with `input_ids` and, where there is padding, `attention_mask`, whose
            zeros are dropped.
        tokenizer: needed for text only.

    Raises:
        UsageError: nothing in it, ids that are no integers, or a mask of another shape.
    """
    found = [document for document in _documents(data, tokenizer) if len(document)]
    if not found:
        raise UsageError("there is no token in the data; expected text or token ids")
    return found


def _documents(data: Any, tokenizer: Any) -> list[Tensor]:
    written = texts(data)
    if written is not None:
        return [_ids(encode(tokenizer, text)) for text in written]
    if isinstance(data, Mapping):
        return _unpadded(data)
    if isinstance(data, Tensor | np.ndarray):
        table = torch.as_tensor(data)
        return [_ids(row) for row in table] if table.dim() == 2 else [_ids(table)]
    if isinstance(data, Sequence):
        if all(isinstance(entry, int | np.integer) for entry in data):
            return [_ids(data)]
        return [document for entry in data for document in _documents(entry, tokenizer)]
    raise UsageError(f"expected text or token ids, got {type(data).__name__}")


def _unpadded(batch: Mapping[str, Any]) -> list[Tensor]:
    if "input_ids" not in batch:
        raise UsageError(f"a batch needs input_ids, got {sorted(map(str, batch))}")
    table = torch.atleast_2d(torch.as_tensor(batch["input_ids"]))
    mask = batch.get("attention_mask")
    if mask is None:
        return [_ids(row) for row in table]
    real = torch.atleast_2d(torch.as_tensor(mask)).to(table.device) != 0
    if real.shape != table.shape:
        raise UsageError(
            f"attention_mask is {tuple(real.shape)}, input_ids are {tuple(table.shape)}; give one shape"
        )
    return [_ids(row[kept]) for row, kept in zip(table, real, strict=True)]


def _ids(values: Any) -> Tensor:
    found = torch.as_tensor(values).detach().cpu()
    if found.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise UsageError(f"token ids must be integers, got {str(found.dtype).removeprefix('torch.')}")
    if found.dim() != 1:
        raise UsageError(f"token ids of one document must be one-dimensional, got shape {tuple(found.shape)}")
    return found.to(torch.int64)


def positions(model: nn.Module) -> int | None:
    """How many positions the model's configuration names; None where it has none."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    for name in _POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model's input embedding knows; None where it cannot be told."""
    if hasattr(model, "get_input_embeddings"):
        try:
            weight = getattr(cast(Any, model).get_input_embeddings(), "weight", None)
        except NotImplementedError:
            weight = None
        if isinstance(weight, Tensor):
            return int(weight.shape[0])
    value = getattr(getattr(model, "config", None), "vocab_size", None)
    return value if isinstance(value, int) else None


def context_for(model: nn.Module, context: int | None, *, full: bool = False) -> int:
    """The window length to use: the one asked for, or the model's positions (at most 2,048 unless `full`).

    Raises:
        UsageError: longer than the model's positions, or not to be found in its configuration.
    """
    limit = positions(model)
    if context is None:
        if limit is None:
            raise UsageError("the model does not say how many positions it has; pass context=")
        return limit if full else min(limit, _DEFAULT_CONTEXT)
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise UsageError(f"context must be a positive whole number of tokens, got {context!r}")
    if limit is not None and context > limit:
        raise UsageError(f"context {context} is longer than the model's {limit} positions; use at most {limit}")
    return context


def check_tokens(found: list[Tensor], limit: int | None) -> None:
    """Refuse a token that the model cannot look up.

    Raises:
        UsageError: an id below 0, or not below `limit`; the first one is named.
    """
    for number, document in enumerate(found):
        wrong = document < 0 if limit is None else (document < 0) | (document >= limit)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            known = "0 and up" if limit is None else f"0 to {limit - 1}"
            raise UsageError(
                f"document {number}, token {at}: id {int(document[at])} is outside the vocabulary ({known}); "
                "use the tokenizer the model was trained with"
            )
