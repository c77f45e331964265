"""A shrunk model into a folder: plain where a config can say its widths, padded with zeros, or compact."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur import pretrained
from secateur.checkpoint import TOKENIZER_FILES
from secateur.compact import write_compact
from secateur.deploy.describe import check_same, describe
from secateur.deploy.padded import padded
from secateur.errors import UsageError, nearest

__all__ = ["FORMS", "Form", "check_form", "save_shrunk"]

Form = Literal["auto", "hf", "compact", "padded"]
FORMS = ("auto", "hf", "compact", "padded")


def check_form(to: str) -> None:
    """Refuse an unknown form.

    Raises:
        UsageError: with the nearest.
    """
    if to not in FORMS:
        raise UsageError(f"to={to!r} is not known; {nearest(to, FORMS)}.")


def save_shrunk(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    to: str = "auto",
    dtype: torch.dtype | None = None,
    source: Path | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> str:
    """Write what `shrink` made into a folder that is there.

    Args:
        model: not changed.
        tokenizer: written beside it; None for none.
        folder: written into.
        to: "hf": a plain checkpoint, which is loaded again and run before it counts; "padded": that, else one at the
            whole size with zeros; "compact": what `secateur.load` reads; "auto": the first of hf and compact that can
            be.
        dtype: type in which floating-point tensors are stored; None keeps theirs.
        source: a folder whose tokenizer, generation and preprocessor files are copied.
        made_from: what is known of the model it was made from, for the compact form.

    Returns:
        The form that was written.

    Raises:
        UsageError: the form cannot say this model; why, and what can.
    """
    check_form(to)
    if to != "compact":
        try:
            _plain(model, model, describe(model), tokenizer, folder, dtype, source)
            return "hf" if to == "auto" else to
        except UsageError:
            if to == "hf":
                raise
            for left in folder.iterdir():  # of a plain checkpoint that computed something else
                if left.is_file():
                    left.unlink()
    if to == "padded":
        _plain(model, padded(model), None, tokenizer, folder, dtype, source)
        return to
    write_compact(model, folder, dtype=dtype, source=made_from)
    _beside(tokenizer, folder, source)
    return "compact"


def _plain(
    model: nn.Module,
    whole: nn.Module,
    config: Any,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype | None,
    source: Path | None,
) -> None:
    """Write a plain checkpoint and prove that it is this model."""
    from secateur.checkpoint import read_checkpoint

    pretrained.save_pretrained(whole, tokenizer, folder, dtype=dtype, source=source, config=config)
    held = next(model.parameters()).dtype
    loaded, _ = pretrained.build(
        read_checkpoint(folder), dtype=held, trust_remote_code=False, drop_unexpected=False
    )
    if dtype is None or torch.promote_types(held, dtype) == dtype:  # else what is stored is rounded
        check_same(model, loaded, "the plain checkpoint")


def _beside(tokenizer: Any, folder: Path, source: Path | None) -> None:
    """The files that a plain checkpoint would bring along."""
    names = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json")
    copied = [name for name in names if source is not None and (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, folder / name)  # type: ignore[operator]
    if tokenizer is not None and not set(copied) & set(TOKENIZER_FILES):
        with pretrained.quiet():
            tokenizer.save_pretrained(folder)
