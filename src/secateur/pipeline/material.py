"""What stages that train learn from: batches cut from a text, or the user's own, with a tenth held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur import data, mixes, own
from secateur.core.digest import digest
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.model import Loaded
from secateur.pipeline.spec import Common
from secateur.sources import context_of, split, writes_text

__all__ = ["Material", "material"]


@dataclass(frozen=True)
class Material:
    """Batches to train on, and batches of the same kind by which the best epoch is chosen; never what is judged by.

    Attributes:
        name: what they are called.
        batches: to train on.
        held_out: None where there is one batch alone.
    """

    name: str
    batches: list[Any]
    held_out: list[Any] | None

    @property
    def identity(self) -> str:
        """SHA-256 of all of it."""
        return digest([self.batches, self.held_out or []])


def material(common: Common, loaded: Loaded, tell: Tell) -> Material:
    """Read what `train`, or else `data`, names.

    Raises:
        UsageError: neither is given, or a text for a model that does not learn from text alone.
    """
    source = common.train or common.data
    if source is None:
        raise UsageError(
            "stages that train need data; give train: a text for a causal language model (python-docs is on every "
            "machine), or train: file.py:function giving (inputs, labels) batches"
        )
    if own.is_own(source):
        batches = data.read_batches(source, seed=common.seed)
    else:
        batches = _windows(common, loaded, source, tell)
    if len(batches) < 2:
        return Material(mixes.mix_name(source), batches, None)
    cut = len(batches) - max(1, len(batches) // 10)
    return Material(mixes.mix_name(source), batches[:cut], batches[cut:])


def _windows(common: Common, loaded: Loaded, source: str, tell: Tell) -> list[Any]:
    if loaded.tokenizer is None or not writes_text(loaded.model):
        raise UsageError(
            f"{source} is a text, and this model does not learn from text alone; give train: file.py:function, "
            "which returns batches (inputs, labels)"
        )
    texts = mixes.read_texts(source)
    if source == common.data and common.evaluate is None:
        texts, _ = mixes.cut_each(texts, split)  # the rest is what the model is judged by
    tell("training text", 0, 1)
    drawn, _ = mixes.drawn_from(
        texts,
        loaded.tokenizer,
        context=context_of(common, loaded),
        samples=common.windows,
        seed=common.seed,
        batch=common.batch,
        model=loaded.model,
    )
    tell("training text", 1, 1)
    return list(drawn)
