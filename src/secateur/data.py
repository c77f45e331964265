"""Documents become batches of tokens; the model itself or the user's own code can give data as well."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur import own
from secateur.documents import PYTHON_DOCS, read_text
from secateur.errors import NumericError, UsageError
from secateur.pretrained import is_pretrained

__all__ = ["PYTHON_DOCS", "batched", "read_batches", "read_text", "self_generated", "stream", "tokens"]

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def tokens(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    context: int,
    samples: int,
    seed: int = 0,
    batch: int = 1,
    model: nn.Module | None = None,
) -> list[dict[str, Tensor]]:
    """Draw calibration windows from documents.

    Each document is cut from a random start into windows of `context` tokens that do not overlap. Documents
    take turns in random order, each giving a random one of its windows, so no token is drawn twice; documents
    shorter than a window come after all windows.

    Args:
        texts: documents, encoded one by one as the tokenizer does by default.
        tokenizer: a transformers tokenizer.
        context: tokens in a window, at least 1.
        samples: number of windows, at least 1.
        seed: of the draw; the global generators are not touched.
        batch: windows in a batch, fewer in the last one.
        model: when given, its vocabulary and positions are compared with the tokens.

    Returns:
        Batches `{"input_ids": "batch length", "attention_mask": "batch length"}`, padded on the right to the
        longest of the batch, with zeros in the mask for padding.

    Raises:
        UsageError: a number out of range, less text than asked for, or a model that does not fit.

    Cost:
        Encodes documents until `samples` of them hold a window, in the worst case all.

    Source:
        Calibration as in Sun et al. 2023 (Wanda): random windows of random documents; here without repetition.
    """
    _at_least_one(context=context, samples=samples, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    long: list[list[list[int]]] = []
    short, count = [], 0
    for index in torch.randperm(len(texts), generator=generator).tolist():
        ids = _encode(texts[index], tokenizer)
        count += len(ids)
        if len(ids) < context:
            short += [ids] if ids else []
            continue
        long.append(_windows(ids, context, generator))
        if len(long) == samples:
            break
    turns = itertools.chain.from_iterable(itertools.zip_longest(*long))
    chosen = list(itertools.islice(itertools.chain((turn for turn in turns if turn), short), samples))
    if len(chosen) < samples:
        raise UsageError(
            f"{samples} samples of {context} tokens are asked for, and the text gives {len(chosen)} "
            f"({count:,} tokens in {len(texts)} documents). Ask for fewer or shorter ones, or give more text."
        )
    _check(model, max(map(max, chosen)), context)
    return batched(chosen, tokenizer, batch)


def stream(
    texts: Sequence[str], tokenizer: Any, *, separator: str | None = None, model: nn.Module | None = None
) -> Tensor:
    """Encode documents into one row of tokens, as perplexity is measured on.

    Args:
        texts: documents.
        tokenizer: a transformers tokenizer; special tokens are those it adds by default.
        separator: joins the documents before they are encoded as one text; None encodes each by itself.
        model: when given, its vocabulary is compared with the tokens.

    Returns:
        Long tensor of shape "tokens", at least one.

    Raises:
        UsageError: no token, or a token that the model does not know.
    """
    parts = texts if separator is None else [separator.join(texts)]
    encoded = [torch.tensor(_encode(text, tokenizer), dtype=torch.long) for text in parts]
    joined = torch.cat(encoded) if encoded else torch.empty(0, dtype=torch.long)
    if not len(joined):
        raise UsageError(f"{len(texts)} documents give no token; give more text or another tokenizer.")
    _check(model, int(joined.max()), 1)
    return joined


def self_generated(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    context: int,
    samples: int,
    seed: int = 0,
    batch: int = 8,
    temperature: float = 1.0,
) -> list[dict[str, Tensor]]:
    """Let a causal language model write its own calibration data, where there is no text at hand.

    Each sample begins with the tokenizer's start token (or end token, or a random one where there is neither)
    and is drawn token by token from the model's own distribution, until the end token or `context`.

    Args:
        model: takes `input_ids` and gives logits "batch length vocabulary", alone or as `.logits`.
        tokenizer: tells start, end and padding; None starts from random tokens and knows no end.
        context: tokens in a sample at most, the first included.
        samples: number of samples, at least 1.
        seed: of the draw; the global generators and the modes of the modules are as before afterwards.
        batch: samples in a batch; each batch is drawn by itself.
        temperature: divides the logits, above 0; 1 is the model's own distribution.

    Returns:
        Batches as those of `tokens`, on the CPU.

    Raises:
        UsageError: a number out of range, or a model that is no causal language model.
        NumericError: the model's logits are not finite.

    Cost:
        One forward pass per token and batch; with a transformers model over one token at a time.

    Source:
        Williams, Chrysostomou, Aletras 2024, "Self-calibration for Language Model Quantization and Pruning",
        without its schedule of temperatures.
    """
    _at_least_one(context=context, samples=samples, batch=batch)
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}; a number above 0 is expected.")
    config = getattr(model, "config", None)
    if is_pretrained(model) and (getattr(config, "is_encoder_decoder", False) or not model.can_generate()):  # type: ignore[operator]
        raise UsageError(
            f"{type(model).__name__} is no causal language model and cannot write text; give data."
        )
    _check(model, 0, context)
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(seed)
    sequences: list[list[int]] = []
    try:
        model.eval()
        with torch.no_grad(), own.seeded(seed):
            while len(sequences) < samples:
                count = min(batch, samples - len(sequences))
                sequences += _written(model, tokenizer, count, context, temperature, generator)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return batched(sequences, tokenizer, batch)


def read_batches(spec: str, *, seed: int = 0, limit: int | None = None) -> list[Any]:
    """Batches from the user's own function, for models of images, sound, tables or anything else.

    Args:
        spec: `file.py:function`; the function takes no arguments and returns an iterable of batches.
        seed: where the generators of torch, numpy and random start.
        limit: take at most this many batches, as from a generator without end.

    Returns:
        The batches as they were given, at least one.

    Raises:
        UsageError: no such function, no batches, or an exception in the user's code.
    """
    path, name, _ = own.split(spec)

    def drawn(batches: Any) -> list[Any]:
        if isinstance(batches, Tensor | str | dict) or not hasattr(batches, "__iter__"):
            raise UsageError(
                f"{path}:{name} returned {type(batches).__name__}; expected an iterable of batches."
            )
        return list(itertools.islice(batches, limit))

    found = own.call(spec, seed=seed, finish=drawn)
    if not found:
        raise UsageError(f"{path}:{name} gave no batches; it must give at least one.")
    return found


def _windows(ids: list[int], context: int, generator: torch.Generator) -> list[list[int]]:
    """Cut a document from a random start into windows that do not overlap, in random order."""
    first = int(torch.randint(len(ids) % context + 1, (1,), generator=generator))
    starts = first + context * torch.randperm((len(ids) - first) // context, generator=generator)
    return [ids[start : start + context] for start in starts.tolist()]


def _written(
    model: nn.Module, tokenizer: Any, count: int, context: int, temperature: float, generator: torch.Generator
) -> list[list[int]]:
    """Draw `count` sequences side by side; each ends with its end token or at `context`."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    end = getattr(tokenizer, "eos_token_id", None)
    start = next((i for i in (getattr(tokenizer, "bos_token_id", None), end) if i is not None), None)
    ids = torch.full((count, 1), start) if start is not None else torch.empty((count, 0), dtype=torch.long)
    if start is None:
        rows = _vocabulary(model)
        if rows is None:
            raise UsageError("the model's vocabulary is not known; give a tokenizer or data.")
        ids = torch.randint(rows, (count, 1), generator=generator)
    done = torch.zeros(count, dtype=torch.bool)
    memory = None
    while ids.shape[1] < context and not done.all():
        logits, memory = _next_logits(model, ids.to(device), memory)
        logits = logits.float().cpu() / temperature
        if not torch.isfinite(logits).all():
            raise NumericError(
                f"the model's logits are not finite at token {ids.shape[1]}; its weights may be damaged."
            )
        if tokenizer is not None:
            logits[:, len(tokenizer) :] = -torch.inf  # rows that only pad the vocabulary
        if end is not None and ids.shape[1] == 1:
            logits[:, end] = -torch.inf  # a sample of nothing is no sample
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
        done |= drawn[:, 0] == (-1 if end is None else end)
    return [_until(row, end) for row in ids.tolist()]


def _next_logits(model: nn.Module, ids: Tensor, memory: Any) -> tuple[Tensor, Any]:
    """Logits "batch vocabulary" of the next token, and the model's cache where it keeps one."""
    if not is_pretrained(model):
        output, cache = model(ids), None
    else:
        new = ids if memory is None else ids[:, -1:]
        keeps = "past_key_values" in inspect.signature(model.forward).parameters
        output = model(new, past_key_values=memory, use_cache=True) if keeps else model(ids)
        cache = getattr(output, "past_key_values", None)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UsageError(
            f"{type(model).__name__} gives no logits of shape (batch, length, vocabulary); give data."
        )
    return logits[:, -1], cache


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end, 1) + 1] if end in row[1:] else row


def batched(sequences: list[list[int]], tokenizer: Any, batch: int) -> list[dict[str, Tensor]]:
    """Pad on the right to the longest sequence of each batch."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    padding = next((i for i in known if i is not None), 0)
    batches = []
    for first in range(0, len(sequences), batch):
        rows = sequences[first : first + batch]
        ids = torch.full((len(rows), max(map(len, rows))), padding)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(rows):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _check(model: nn.Module | None, largest: int, context: int) -> None:
    """Raise where a token has no row in the model's embedding, or a window more tokens than positions."""
    rows = None if model is None else _vocabulary(model)
    if rows is not None and largest >= rows:
        raise UsageError(
            f"the tokenizer gives token {largest}, the model knows 0 to {rows - 1}: they do not fit."
        )
    config = getattr(model, "config", None)
    positions = next((n for key in _POSITIONS if isinstance(n := getattr(config, key, None), int)), None)
    if positions is not None and 0 < positions < context:
        raise UsageError(f"a context of {context} tokens is more than the {positions} positions of the model.")


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding, None where the model does not say which layer that is."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _encode(text: str, tokenizer: Any) -> list[int]:
    ids = tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
    return [int(each) for each in ids]


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} is {number}; a whole number of at least 1 is expected.")
