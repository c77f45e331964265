"""The words and numbers of a request, each read strictly from what a user or a file says."""

from __future__ import annotations

import re
from typing import Any

from secateur.errors import UsageError, nearest
from secateur.unit_words import UNIT_WORDS, check_units

__all__ = [
    "METHOD_NAMES",
    "SHAPES",
    "parse_count",
    "read_count",
    "read_fraction",
    "read_method",
    "read_pattern",
    "read_words",
]

# the methods of recipes.METHODS, the two that decide how much is cut and the one that tries several; listed so that
# --help needs no torch
METHOD_NAMES = (
    "best",
    "magnitude",
    "global-magnitude",
    "wanda",
    "wanda-l1",
    "ria",
    "activation",
    "random",
    "snip",
    "taylor",
    "fisher",
    "wanda-mended",
    "sparsegpt",
    "admm",
    "alps",
    "l2",
    "gate",
    "flap",
    "active",
    "slimming",
    "threshold",
    "percentile",
)
SHAPES = ("weights", "rows", "columns")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_count(text: str | int) -> int:
    """A whole number of parameters, written out or with k, M or B.

    Example:
        >>> parse_count("104.69M"), parse_count("1,000"), parse_count(12)
        (104690000, 1000, 12)
    """
    found = re.fullmatch(
        r"(\d+)(?:\.(\d+))?\s*([kKmMbBgG]?)", str(text).replace(",", "").replace("_", "").strip()
    )
    if found is None:
        raise UsageError(f"{text!r} is no number of parameters; expected for example 104690000 or 104.69M")
    whole, fraction, unit = found[1], found[2] or "", _UNITS[found[3].lower()]
    value, rest = divmod(int(whole + fraction) * unit, 10 ** len(fraction))
    if rest:
        raise UsageError(
            f"{text!r} is no whole number of parameters; expected for example 104690000 or 104.69M"
        )
    return value


def read_count(value: Any) -> Any:
    """A count in digits or in words, see `parse_count`."""
    return value if value is None or isinstance(value, int) else parse_count(value)


def read_words(value: Any) -> Any:
    """One word or a list of them; YAML knows no tuples."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def read_fraction(value: Any) -> Any:
    """A fraction; a percentage is told from it."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100:
        raise ValueError(f"{value:g} is not in [0, 1]. Did you mean {value / 100:g}?")
    return value


def read_method(value: Any) -> Any:
    """The name of a method."""
    if value is None:
        return None
    name = str(value).replace("_", "-")
    if name == "structured":  # whole units, by the plainest of their scores
        return "l2"
    if name not in METHOD_NAMES:
        raise ValueError(f"{value!r} is no method; {nearest(name, METHOD_NAMES)}")
    return name


def read_pattern(value: Any) -> Any:
    """The words of a pattern."""
    if value is None:
        return None
    text = str(value)
    if text in SHAPES or re.fullmatch(r"\d+:\d+|blocks:\d+x\d+", text):
        return text
    try:
        check_units(text)
    except UsageError as error:
        raise ValueError(
            f"{text!r} is no pattern; expected weights, rows, columns, 2:4 (n kept of m), blocks:4x1, or whole units "
            f"joined by commas: {', '.join(UNIT_WORDS)}, axes:NAME ({error})"
        ) from None
    return text
