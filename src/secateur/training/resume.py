"""Going on after an interruption: the state must belong to what it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.core.masks import Masks
from secateur.errors import UsageError

__all__ = ["check_same", "masks_of"]


def check_same(kind: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise unless the state was taken from an object that was made in the same way.

    Raises:
        UsageError: naming the first thing that differs, what it was and what it is.
    """
    if not isinstance(state, Mapping) or state.get("kind") != kind:
        found = state.get("kind") if isinstance(state, Mapping) else None
        raise UsageError(
            f"this is no state of {kind}{f', but of {found}' if found else ''}; give what state_dict() gave"
        )
    for what, now in own.items():
        was = state.get(what)
        if was != now:
            raise UsageError(
                f"the state was taken with {what} {_differing(was, now)}, now it is {_differing(now, was)}; resume "
                "with what it was made with, or start anew"
            )


def masks_of(state: Mapping[str, Any]) -> Masks:
    """The masks in a state."""
    masks = state.get("masks")
    if not isinstance(masks, Mapping) or not all(isinstance(mask, Tensor) for mask in masks.values()):
        raise UsageError("the state holds no masks; give what state_dict() gave")
    return Masks({str(name): mask.bool() for name, mask in masks.items()})


def _differing(value: Any, other: Any) -> Any:
    """The part of a mapping that is not the same in the other one; anything else as it is."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return {
            key: value[key] for key in value if value[key] != other.get(key)
        } or f"without {[k for k in other if k not in value]}"
    return value
