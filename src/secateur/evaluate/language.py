"""How well a language model predicts text: perplexity under three named protocols."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import NumericError, UsageError, nearest
from secateur.evaluate.corpus import check_tokens, context_for, documents, encode, texts, vocabulary
from secateur.evaluate.likelihood import Piece, Progress, batch_for, losses, number_format
from secateur.evaluate.windows import rolling_windows, sliding_windows
from secateur.measurement import Condition, Measurement

__all__ = ["PROTOCOLS", "loglikelihood_rolling", "perplexity"]

PROTOCOLS = ("windows", "stride", "lm-eval")
"""The names `perplexity` knows."""


def perplexity(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    protocol: str = "windows",
    context: int | None = None,
    stride: int | None = None,
    drop_last: bool = False,
    batch_size: int | None = None,
    dataset: str = "",
    progress: Progress | None = None,
) -> Measurement:
    """exp of the mean negative log-likelihood per judged token (per word under `lm-eval`).

    Three protocols give three different numbers for one model; the measurement says which it is.

    * `windows`: windows of `context` tokens that do not overlap. The first token of each is not judged, the
      last window may be shorter (`drop_last` leaves it out, as the code of the pruning papers does).
    * `stride`: windows that start `stride` tokens apart; each judges only its new tokens, so every token but
      the very first of a document is judged exactly once, with at least `context - stride` tokens before it.
    * `lm-eval`: `loglikelihood_rolling`, of which this is the word perplexity.

    Losses are summed in float64 over judged tokens; padding does not occur, because only windows of equal
    length share a forward pass, so the value does not depend on `batch_size` beyond rounding (1e-6). The
    model's mode, its configuration and the random generators are as before afterwards.

    Args:
        model: returns logits `(batch, tokens, vocabulary)` for ids `(batch, tokens)`.
        data: a text, several texts (documents: no window crosses two), or ids; see `corpus.documents`.
        tokenizer: for text; its default special tokens are added, as the documented algorithm does.
        protocol: `windows`, `stride` or `lm-eval`.
        context: tokens per window; default the model's positions, at most 2,048 (`lm-eval`: all of them).
        stride: for `stride` only; default 512, or half the context where that is smaller.
        drop_last: for `windows` only: leave out a last window that is not full.
        batch_size: windows per forward pass; default as many as make 2,048 tokens.
        dataset: a name for the data, kept in the conditions.
        progress: called with windows done and windows in all.

    Returns:
        `perplexity` (`word_perplexity` under `lm-eval`), unit 1; the conditions hold the protocol, context,
        stride, judged tokens, windows and documents.

    Raises:
        UsageError: unknown protocol, an option of another protocol, no data, a token outside the
            vocabulary, a context longer than the model's positions.
        NumericError: a loss that is NaN or infinite.

    Cost: one forward pass per window; `stride` needs about context / stride times those of `windows`.

    Source: Hugging Face, "Perplexity of fixed-length models", for `stride`. Deviation: that page weights the
        mean loss of every window by its judged tokens minus one, right for the first window only (in later
        ones the shift hides no judged token); here each window counts with the tokens it judges.
    """
    _check_options(protocol, stride, drop_last)
    if protocol == "lm-eval":
        return loglikelihood_rolling(
            model, data, tokenizer, context=context, batch_size=batch_size, dataset=dataset, progress=progress
        )["word_perplexity"]

    length = context_for(model, context)
    step = length if protocol == "windows" else _stride(length, stride)
    found = documents(data, tokenizer)
    check_tokens(found, vocabulary(model))
    pieces = [
        Piece(number, window, document[window.begin : window.end])
        for number, document in enumerate(found)
        for window in sliding_windows(len(document), length, step, drop_last=drop_last)
    ]
    batch = batch_for(batch_size, length)
    total, judged = losses(model, pieces, batch, progress)
    if protocol == "windows":
        said = f"non-overlapping windows of {length}" + (", full ones only" if drop_last else "")
    else:
        said = f"sliding windows of {length}, stride {step}"
    conditions: dict[str, Condition] = {"protocol": said, "dataset": dataset, "context": length}
    if protocol == "stride":
        conditions["stride"] = step
    conditions |= _counts(model, judged, pieces, len(found), batch)
    return Measurement("perplexity", _exp(total / judged), "1", conditions)


def loglikelihood_rolling(
    model: nn.Module,
    data: str | Sequence[str],
    tokenizer: Any,
    *,
    context: int | None = None,
    prefix_token: int | None = None,
    detokenize: Callable[[str], str] | None = None,
    batch_size: int | None = None,
    dataset: str = "",
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Word perplexity, byte perplexity and bits per byte as lm-evaluation-harness computes them.

    Every token of every document is judged: the first one after a prefix token (BOS, else EOS). Windows do
    not overlap, except that the last one reads back until its context is full. Words and bytes are counted
    in the text as given, so the figures of models with different tokenizers can be compared.

    Args:
        model: returns logits for ids.
        data: one text, or several documents.
        tokenizer: a transformers tokenizer (its default special tokens are added, unless the text begins
            with the prefix already), a `tokenizers.Tokenizer`, or a function from text to ids.
        context: tokens the model may read at once; default all its positions.
        prefix_token: id; default the tokenizer's BOS, else its EOS.
        detokenize: applied to what the model reads, while words and bytes are still counted in the original.
            The harness's `wikitext` task does so; here it is done only when asked for.
        batch_size: windows per forward pass; default as many as make 2,048 tokens.
        dataset: a name for the data, kept in the conditions.
        progress: called with windows done and windows in all.

    Returns:
        `word_perplexity`, `byte_perplexity` and `bits_per_byte`. A word is what splitting at white space
        gives, empty strings at the two ends included, as the harness counts.

    Raises:
        UsageError: no text (ids do not tell words and bytes), no prefix token, a token outside the
            vocabulary, a context longer than the model's positions.
        NumericError: a loss that is NaN or infinite.

    Source: lm-evaluation-harness 0.4, `HFLM.loglikelihood_rolling` and the task `wikitext`. Deviation: the
        softmax is taken in float32 even where the model computes in bfloat16.
    """
    written = texts(data)
    if not written or not any(written):
        raise UsageError(
            'protocol "lm-eval" counts words and bytes: pass text that is not empty, not token ids'
        )
    length = context_for(model, context, full=True)
    prefix = _prefix(tokenizer, prefix_token)
    read = [detokenize(text) for text in written] if detokenize else written
    found = [torch.tensor([prefix, *_encode_as_harness(tokenizer, text, prefix)]) for text in read]
    check_tokens(found, vocabulary(model))
    pieces = [
        Piece(number, window, document[window.begin : window.end])
        for number, document in enumerate(found)
        for window in rolling_windows(len(document) - 1, length)
    ]
    batch = batch_for(batch_size, length)
    total, judged = losses(model, pieces, batch, progress)
    words = sum(len(re.split(r"\s+", text)) for text in written)
    size = sum(len(text.encode("utf-8")) for text in written)
    said = f"lm-evaluation-harness rolling windows of {length}" + (", detokenized" if detokenize else "")
    conditions: dict[str, Condition] = {"protocol": said, "dataset": dataset, "context": length}
    conditions |= _counts(model, judged, pieces, len(written), batch) | {"words": words, "bytes": size}
    return {
        "word_perplexity": Measurement("word_perplexity", _exp(total / words), "1", conditions),
        "byte_perplexity": Measurement("byte_perplexity", _exp(total / size), "1", conditions),
        "bits_per_byte": Measurement("bits_per_byte", total / size / math.log(2), "bits", conditions),
    }


def _check_options(protocol: str, stride: int | None, drop_last: bool) -> None:
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}; {nearest(str(protocol), PROTOCOLS)}")
    if stride is not None and protocol != "stride":
        raise UsageError(f'protocol "{protocol}" has no stride; leave stride= out or use protocol="stride"')
    if drop_last and protocol != "windows":
        raise UsageError(f'protocol "{protocol}" has no drop_last; it belongs to protocol="windows"')


def _stride(context: int, asked: int | None) -> int:
    return max(1, min(512, context // 2)) if asked is None else asked


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError as error:
        raise NumericError(f"a mean loss of {mean:.4g} nats is too large for a perplexity") from error


def _prefix(tokenizer: Any, asked: int | None) -> int:
    candidates = (asked, getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None))
    found = next((int(token) for token in candidates if token is not None), None)
    if found is None:
        raise UsageError("the tokenizer has neither a BOS nor an EOS token; pass prefix_token=")
    return found


def _encode_as_harness(tokenizer: Any, text: str, prefix: int) -> list[int]:
    known = (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None))
    prefixed = known != (None, None) and text.startswith(tokenizer.decode(prefix))
    return encode(tokenizer, text, special_tokens=False if prefixed else None)


def _counts(model: nn.Module, judged: int, pieces: list[Piece], count: int, batch: int) -> dict[str, Condition]:
    counts = {"tokens": judged, "windows": len(pieces), "documents": count, "batch": batch}
    return counts | number_format(model)
