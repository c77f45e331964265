"""The stage that takes whole units out for good: a smaller model, its masks, and the same again for a resume."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.core.example import analysis_of
from secateur.core.masks import Masks
from secateur.core.unit_masks import whole_units
from secateur.deploy import Shrunk, shrink, shrunk
from secateur.deploy.cuts import cut, from_json
from secateur.deploy.shrunk import after
from secateur.deploy.slots import ATTRIBUTE
from secateur.errors import UsageError
from secateur.pipeline.subject import Subject

__all__ = ["cut_again_", "shrink_", "sliced"]


def shrink_(subject: Subject, *, homogeneous: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Put the smaller model in the subject's place; what is pruned of the rest stays pruned.

    Args:
        subject: its masks say which units are wholly pruned; those go, single weights stay where they are.
        homogeneous: see `shrink`.

    Returns:
        Facts for the record, and sentences for its reader.

    Raises:
        UsageError: no unit is wholly pruned, no example, or a model whose modules cannot follow.
    """
    model, example = subject.model, subject.by.example
    if example is None:
        raise UsageError(
            "whole units are found by following one input through the model, and no input is known; give data or "
            "labelled, or a model function that returns (model, example)"
        )
    earlier = vars(model).pop(ATTRIBUTE, None)  # of an earlier shrinking: kept, and joined below
    try:
        analysis, given = analysis_of(model, example)
        keep = whole_units(analysis, subject.masks)
        if not keep:
            raise UsageError(
                "no unit is wholly pruned, so nothing can be taken out; prune before it with a pattern of whole units, "
                "as prune: {pattern: 'heads,neurons', sparsity: 0.5}"
            )
        small = shrink(model, keep, given, analysis=analysis, homogeneous=homogeneous)
    finally:
        if earlier is not None:
            vars(model)[ATTRIBUTE] = earlier
    note = shrunk(small)
    subject.cuts = note if subject.cuts is None else after(subject.cuts, note)
    subject.masks = sliced(subject.masks, note)
    _put(subject, small, earlier, note)
    return _facts(note), _notes(note)


def cut_again_(subject: Subject, text: Any) -> None:
    """Shape the model, as it was loaded, like the one that earlier stages shrank; its numbers come from their state.

    Raises:
        InputError: cuts of another model.
    """
    model = subject.model
    earlier = vars(model).pop(ATTRIBUTE, None)
    subject.cuts = from_json(text, model)
    small = cut(model, subject.cuts)
    _put(subject, small, earlier, shrunk(small))


def _put(subject: Subject, small: nn.Module, earlier: Any, note: Shrunk) -> None:
    if isinstance(earlier, Shrunk):
        vars(small)[ATTRIBUTE] = after(earlier, note)
    subject.loaded = replace(subject.loaded, model=small)


def sliced(masks: Masks, note: Shrunk) -> Masks:
    """What masks say of the positions that are left; masks that prune nothing there are dropped."""
    left: dict[str, torch.Tensor] = {}
    for name, mask in masks.items():
        for dim, kept in enumerate(note.index.get(name, ())):
            if kept is not None:
                mask = mask.index_select(dim, kept.to(mask.device))
        if not bool(mask.all()):
            left[name] = mask
    return Masks(left)


def _facts(note: Shrunk) -> dict[str, Any]:
    before, now = note.parameters
    return {
        "parameters before": before,
        "parameters left": now,
        "difference": note.difference,
        "exact": note.exact,
        "axes": [dict(vars(axis)) for axis in note.axes],
    }


def _notes(note: Shrunk) -> tuple[str, ...]:
    before, now = note.parameters
    notes = [f"Without the units that went, {before:,} parameters become {now:,}; {note.equality}."]
    if note.padded:
        held = ", ".join(axis.name for axis in note.padded[:3])
        notes.append(f"Held wider than asked, with zeros, because the modules cannot follow: {held}.")
    if not note.exact:
        notes.append("Some norms now run over the units that are left alone.")
    return tuple(notes)
