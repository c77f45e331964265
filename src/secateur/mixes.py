"""Calibration from several texts at once: `A,B`, `A:0.75,B`; how many windows each gives, and the draw."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import data, own
from secateur import documents as texts_of
from secateur.core.select import apportion
from secateur.errors import UsageError
from secateur.request import spec_name

__all__ = [
    "Share",
    "check_there",
    "cut_each",
    "drawn_from",
    "mix_name",
    "mixed_tokens",
    "read_mix",
    "read_texts",
    "shared_out",
]

_SHARE = re.compile(r"(?P<spec>.+):(?P<share>\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Share:
    """One text of a mix, and the part of the windows that it gives, in (0, 1]."""

    spec: str
    share: float


def read_mix(spec: str) -> tuple[Share, ...]:
    """Take `A,B:0.25` apart; what exists under its whole name is one text.

    Those without a share have what the others leave, in equal parts; where all have one, only their ratios count.

    Raises:
        UsageError: an empty part, code of the user's own beside others, shares that leave nothing.

    Example:
        >>> [(part.spec, part.share) for part in read_mix("a.txt,b.jsonl:text:0.25")]
        [('a.txt', 0.75), ('b.jsonl:text', 0.25)]
    """
    if own.is_own(spec) or _exists(spec):
        return (Share(spec, 1.0),)
    parts = [part.strip() for part in spec.split(",")]
    if not all(parts):
        raise UsageError(f"data {spec!r}: an empty name between commas; give texts as A,B or A:0.75,B")
    given = [_with_share(part) for part in parts]
    for name, _ in given:
        if len(given) > 1 and own.is_own(name):
            raise UsageError(
                f"data {spec!r}: {name} is code and cannot be mixed with texts; mix in that function"
            )
    stated = sum(share for _, share in given if share is not None)
    open_ = sum(share is None for _, share in given)
    if any(share == 0 for _, share in given) or (open_ and stated >= 1):
        raise UsageError(
            f"data {spec!r}: each text needs a share above 0, and shares together {stated:g} leave nothing for the "
            "texts without one; give shares such as A:0.75,B"
        )
    rest = (1 - stated) / open_ if open_ else 0.0
    whole = 1.0 if open_ else stated
    return tuple(Share(name, (rest if share is None else share) / whole) for name, share in given)


def _exists(name: str) -> bool:
    return Path(name).expanduser().exists()


def _with_share(part: str) -> tuple[str, float | None]:
    found = None if _exists(part) else _SHARE.fullmatch(part)
    return (found["spec"], float(found["share"])) if found else (part, None)


def mix_name(spec: str) -> str:
    """What a mix is called in results: names without paths.

    Example:
        >>> mix_name("/home/me/a.txt:0.25,b.txt"), mix_name("/home/me/a.txt")
        ('25% a.txt and 75% b.txt', 'a.txt')
    """
    parts = read_mix(spec)
    if len(parts) == 1:
        return spec_name(parts[0].spec)
    return " and ".join(f"{100 * part.share:.3g}% {spec_name(part.spec)}" for part in parts)


def shared_out(parts: Sequence[Share], samples: int) -> list[int]:
    """How many of `samples` windows each text gives; exact in sum, by Webster's method.

    Raises:
        UsageError: so few windows that a text would give none.
    """
    counts = apportion([max(1, round(part.share * 10**9)) for part in parts], samples)
    for part, count in zip(parts, counts, strict=True):
        if not count:
            raise UsageError(
                f"{samples} samples leave none for {spec_name(part.spec)}, whose share is {part.share:.3g}; ask for "
                "more samples or for a larger share"
            )
    return counts


def mixed_tokens(
    texts: Sequence[tuple[Sequence[str], float]],
    tokenizer: Any,
    *,
    context: int,
    samples: int,
    seed: int = 0,
    batch: int = 1,
    model: nn.Module | None = None,
    names: Sequence[str] | None = None,
) -> tuple[list[dict[str, Tensor]], list[tuple[int, int]]]:
    """Draw calibration windows from several texts, in random order.

    Args:
        texts: documents of each text, and its share; only the ratios count.
        tokenizer, context, seed, batch, model: as for `data.tokens`.
        samples: windows in all, shared out exactly.
        names: of the texts, for messages.

    Returns:
        Batches as those of `data.tokens`, and for each text its windows and its tokens, padding not counted. The
        same for the same seed, whatever the batch size.

    Raises:
        UsageError: a share of 0, too few samples, and all that `data.tokens` refuses, naming the text.
    """
    if not texts or not all(0 < share < float("inf") for _, share in texts):
        raise UsageError("a mix needs texts, each with a share above 0")
    whole = sum(share for _, share in texts)
    called = names or [f"text {place}" for place in range(1, len(texts) + 1)]
    parts = [Share(name, share / whole) for name, (_, share) in zip(called, texts, strict=True)]
    windows: list[Tensor] = []
    counted = []
    for place, ((documents, _), count) in enumerate(zip(texts, shared_out(parts, samples), strict=True)):
        try:
            drawn = data.tokens(
                documents, tokenizer, context=context, samples=count, seed=seed + place, model=model
            )
        except UsageError as error:
            raise UsageError(f"{spec_name(called[place])}: {error}" if len(texts) > 1 else str(error)) from None
        rows = [each["input_ids"][0] for each in drawn]
        windows += rows
        counted.append((count, sum(len(row) for row in rows)))
    if len(texts) > 1:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = [windows[place] for place in order.tolist()]
    return data.batched([row.tolist() for row in windows], tokenizer, batch), counted


def drawn_from(
    texts: Sequence[tuple[Share, Sequence[str]]], tokenizer: Any, **options: Any
) -> tuple[list[dict[str, Tensor]], str]:
    """The windows of a mix that was read, and what they are in words."""
    given = [(documents, part.share) for part, documents in texts]
    batches, counted = mixed_tokens(given, tokenizer, names=[part.spec for part, _ in texts], **options)
    said = [
        f"{windows} windows ({tokens:,} tokens) of {spec_name(part.spec)}"
        for (part, _), (windows, tokens) in zip(texts, counted, strict=True)
    ]
    return batches, " and ".join(said)


def cut_each(
    texts: Sequence[tuple[Share, list[str]]], cut: Callable[[list[str]], tuple[list[str], list[str]]]
) -> tuple[list[tuple[Share, list[str]]], list[tuple[Share, list[str]]]]:
    """Both halves of every text of a mix."""
    halves = [(part, *cut(documents)) for part, documents in texts]
    return [(part, first) for part, first, _ in halves], [(part, second) for part, _, second in halves]


def check_there(spec: str) -> None:
    """Whether every text of a mix is there, before anything dear is done; code of the user's own is not looked at."""
    if not own.is_own(spec):
        for part in read_mix(spec):
            texts_of.check_there(part.spec)


def read_texts(spec: str) -> list[tuple[Share, list[str]]]:
    """The documents of every text of a mix."""
    return [(part, data.read_text(part.spec)) for part in read_mix(spec)]
