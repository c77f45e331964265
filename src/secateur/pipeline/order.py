"""In which order stages are carried out: the recommended one, and what an order would lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.errors import UsageError

__all__ = ["checked_order", "recommended"]

Named = tuple[str, Any]
RECOMMENDED = ("train", "distil", "prune", "shrink", "quantize", "fine-tune", "export")


def recommended(stages: Sequence[Named]) -> list[int]:
    """The positions of the given stages in the recommended order: prune, quantize, fine-tune.

    Pruning comes before quantization, because masks do not apply to integers; fine-tuning comes last, so that the kept
    weights learn to do without the pruned ones and with the rounding, at once. Distillation from another model makes
    the model that is pruned; from the model itself it is a way to recover, and stands beside fine-tuning.
    """

    def rank(number: int) -> float:
        name, settings = stages[number]
        if name == "distil" and settings.teacher is None:
            return RECOMMENDED.index("fine-tune") - 0.5
        return RECOMMENDED.index(name)

    return sorted(range(len(stages)), key=rank)


def checked_order(stages: Sequence[Named], where: Sequence[str]) -> tuple[str, ...]:
    """Refuse an order that loses work, saying what is lost; remarks on orders that merely surprise.

    Args:
        stages: name and settings.
        where: each of them stands, for messages.

    Raises:
        UsageError: masks or cuts after quantization, a shrinking of what is whole, an export that later
            stages would outdate, a teacher that is the student.
    """
    names = [name for name, _ in stages]
    notes = []
    for number, (name, settings) in enumerate(stages):
        before = names[:number]
        if name == "prune" and "quantize" in before:
            raise UsageError(
                f"{where[number]}: prune comes after quantize, and masks do not apply to integers: the scales were "
                "chosen for weights that would go, and what training learned of the rounding would be lost. Put prune "
                "before quantize"
            )
        if name == "shrink" and "quantize" in before:
            raise UsageError(
                f"{where[number]}: shrink comes after quantize, and integers are not cut. Put shrink before quantize"
            )
        if name == "shrink" and "prune" not in before:
            raise UsageError(
                f"{where[number]}: nothing is pruned before shrink, so there is nothing to take out; put prune with a "
                "pattern of whole units, such as heads,neurons, before it"
            )
        if name == "quantize" and "quantize" in before:
            raise UsageError(f"{where[number]}: the model is quantized already; leave one quantize out")
        if "export" in before:
            raise UsageError(
                f"{where[number]}: {name} comes after export, so what was written would not have it; put export last"
            )
        if name == "distil" and settings.teacher is None and not set(before) & {"prune", "quantize"}:
            raise UsageError(
                f"{where[number]}: the teacher is the model as it was loaded, and nothing has changed it yet, so there "
                "is nothing to learn; put distil after prune, or name another teacher"
            )
        if name == "fine-tune" and "prune" in names[number:] and "prune" not in before:
            notes.append(
                f"Stage {number + 1} fine-tunes before anything is pruned; what pruning costs does not come back by it."
            )
    return tuple(notes)
