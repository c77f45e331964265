"""Numbers as people read them: few digits, a unit, a sign where one is meant."""

from __future__ import annotations

import math

__all__ = ["change", "count", "number", "percent", "quantity"]

_MINUS = "\u2212"
_TIMES = {"s": 1.0, "seconds": 1.0, "ms": 1e-3, "milliseconds": 1e-3}


def count(value: int) -> str:
    """A whole number with its thousands apart.

    Example:
        >>> count(-1234567)
        '−1,234,567'
    """
    return f"{value:,}".replace("-", _MINUS)


def number(value: float) -> str:
    """Four significant digits, whole thousands written out, integers in full.

    Example:
        >>> [number(v) for v in (0.012345, 28.5, 210346.4, 7, float("inf"))]
        ['0.01235', '28.5', '210,346', '7', '∞']
    """
    if isinstance(value, int):
        return count(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else _MINUS + "∞"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return text.replace("-", _MINUS)


def percent(fraction: float) -> str:
    """A fraction in percent with one decimal; 0 and 100 only where they are exact.

    Example:
        >>> [percent(f) for f in (0, 0.5, 0.9999, 0.0001, 1)]
        ['0 %', '50.0 %', '> 99.9 %', '< 0.1 %', '100 %']
    """
    if fraction in (0, 1):
        return f"{int(fraction) * 100} %"
    if 0 < fraction < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    return f"{100 * fraction:.1f} %".replace("-", _MINUS)


def quantity(value: float, unit: str) -> str:
    """A value with its unit, bytes and times in the size that reads best.

    Example:
        >>> [quantity(v, u) for v, u in ((8_400_000, "bytes"), (12.34, "ms"), (3, "1"), (0.4, "nats"))]
        ['8.4 MB', '12.34 ms', '3', '0.4 nats']
    """
    if unit in ("1", ""):
        return number(value)
    if unit in ("bytes", "B") and math.isfinite(value):
        return _scaled(value, "B", (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))
    if unit in _TIMES and math.isfinite(value):
        return _scaled(value * _TIMES[unit], "s", (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))
    if unit.upper() in ("FLOP", "FLOPS") and math.isfinite(value):
        return _scaled(value, unit, (("T" + unit, 1e12), ("G" + unit, 1e9), ("M" + unit, 1e6)))
    return f"{number(value)} {unit}"


def _scaled(value: float, unit: str, sizes: tuple[tuple[str, float], ...]) -> str:
    for name, size in sizes:
        if abs(value) >= size:
            return f"{number(float(value) / size)} {name}"
    return f"{number(value)} {unit}"


def change(before: float, after: float, *, points: bool = False) -> str:
    """How `after` differs from `before`, with its sign.

    Args:
        before: what the change is relative to.
        after: the value now.
        points: both are fractions, so say the difference in percentage points instead of the ratio.

    Example:
        >>> [change(100, 50), change(20.0, 210346.0), change(5, 5), change(0, 3)]
        ['−50.0 %', '× 10,517', 'no change', '+3']
        >>> change(0.9, 0.88, points=True)
        '−2.0 points'
    """
    if before == after:
        return "no change"
    gap = after - before
    if not math.isfinite(gap):
        return ""
    sign = "+" if gap > 0 else _MINUS
    if points:
        return f"{sign}{_small(abs(gap) * 100)} points"
    if before == 0:
        return f"{sign}{number(abs(gap))}"
    ratio = after / before
    if ratio >= 10:
        return f"× {number(ratio)}"
    return f"{sign}{_small(abs(gap / before) * 100)} %"


def _small(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 else f"{value:.2g}"
