"""An integer for modules that use one number for a shape and for a scale."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["Width"]


class Width(int):
    """The new width wherever a whole number is wanted, and the old one where it is turned into a float.

    Attention divides by the square root of the width it was trained with; modules that compute that in their
    forward from the number that also shapes their views need both.

    Example:
        >>> width = Width(4, 16)
        >>> width * 3, width**-0.5, range(width)
        (12, 0.25, range(0, 4))
    """

    old: int

    def __new__(cls, new: int, old: int) -> Width:
        """The new width, which remembers the old one."""
        self = super().__new__(cls, new)
        self.old = old
        return self

    def __float__(self) -> float:
        return float(self.old)

    def __reduce__(self) -> tuple[Any, ...]:
        return Width, (int(self), self.old)

    def __deepcopy__(self, memo: Any) -> Width:
        return self

    def _computed(self, name: str, other: Any, swapped: bool) -> Any:
        compute = getattr(operator, name)
        if not isinstance(other, (int, float)):
            return NotImplemented

        def with_mine(mine: int) -> Any:
            return compute(other, mine) if swapped else compute(mine, other)

        value = with_mine(int(self)) if isinstance(other, int) else None
        return value if isinstance(value, int) else with_mine(self.old)

    def __pow__(self, other: Any, _: Any = None) -> Any:
        return self._computed("pow", other, False)

    def __rpow__(self, other: Any, _: Any = None) -> Any:
        return self._computed("pow", other, True)

    def __truediv__(self, other: Any) -> Any:
        return self._computed("truediv", other, False)

    def __rtruediv__(self, other: Any) -> Any:
        return self._computed("truediv", other, True)

    def __mul__(self, other: Any) -> Any:
        return self._computed("mul", other, False)

    def __rmul__(self, other: Any) -> Any:
        return self._computed("mul", other, True)
