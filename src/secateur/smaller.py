"""The smaller model that whole units leave, or the reason why there is none."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.core.masks import Masks
from secateur.deploy import shrink, shrunk
from secateur.errors import UsageError
from secateur.prune import Plan

__all__ = ["smaller"]


def smaller(model: nn.Module, masks: Masks, todo: Plan) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Shrink a model whose units are masked, as its plan found them.

    Args:
        model: masked, mended or not; untouched.
        masks: whole units.
        todo: the plan of the pruning.

    Returns:
        The smaller model, None where its modules cannot follow, and sentences for the reader of the results.

    Cost: see `shrink`.
    """
    example: Any = todo.example
    try:
        small = shrink(model, masks, example, analysis=todo.analysis)
    except UsageError as error:
        return None, (f"Not made smaller, the zeros stay in their place: {error}",)
    told = shrunk(small)
    before, after = told.parameters
    notes = [f"Without the units that went, {before:,} parameters become {after:,}; {told.equality}."]
    held = told.padded
    if held:
        names = ", ".join(axis.name for axis in held[:3]) + (
            f" and {len(held) - 3} more" if len(held) > 3 else ""
        )
        notes.append(f"Held wider than asked, with zeros, because the modules cannot follow: {names}.")
    if not told.exact:
        norms = [axis.name for axis in told.axes if not axis.exact]
        notes.append(
            f"Norms run over {', '.join(norms[:3])}: the smaller model normalises the units that are left."
        )
    return small, tuple(notes)
