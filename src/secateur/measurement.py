"""A number that says what it is: name, value, unit, the conditions it holds under, and its spread."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from secateur.errors import InputError, UsageError

__all__ = ["Condition", "Measurement", "Spread"]

Condition = str | int | float | bool

_MACHINE = frozenset({"cpu", "instructions", "cores", "torch", "accelerator", "dtype", "device"})
"""Conditions that describe the machine or the number format: kept and stored, left out of the one-line text."""
_DETAIL = frozenset({"context", "stride", "windows", "documents", "batch"})
"""Conditions left out of the one-line text where a protocol is named: it says them, or they change nothing."""
_PLAIN = frozenset({"protocol", "dataset", "task", "method", "average", "statistic", "note"})
"""Conditions whose value speaks for itself."""
_COUNTED = {
    "tokens": "token",
    "documents": "document",
    "windows": "window",
    "words": "word",
    "bytes": "byte",
    "examples": "example",
    "threads": "thread",
    "rounds": "round",
    "files": "file",
    "tensors": "tensor",
}
"""Conditions that are counts, with the noun in the singular."""


@dataclass(frozen=True)
class Spread:
    """How far repeats of one measurement lie apart.

    Args:
        low: lower end, in the unit of the measurement.
        high: upper end.
        kind: what the two ends are: `interquartile`, `range` or `standard error`.
        repeats: how many values (or, for a standard error, how many examples) it was found from.

    Raises:
        UsageError: an end is not finite, the ends are in the wrong order, the kind is unknown, or there is
            not one repeat.

    Example:
        >>> print(Spread(11.9, 12.8, "interquartile", repeats=20))
        interquartile 11.9 to 12.8 of 20
    """

    low: float
    high: float
    kind: str
    repeats: int

    KINDS = ("interquartile", "range", "standard error")

    def __post_init__(self) -> None:
        low = _number("the lower end of a spread", self.low)
        high = _number("the upper end of a spread", self.high)
        if low > high:
            raise UsageError(f"a spread runs from low to high, got {low} to {high}")
        if self.kind not in self.KINDS:
            raise UsageError(f"unknown kind of spread {self.kind!r}; known: {', '.join(self.KINDS)}")
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or self.repeats < 1:
            raise UsageError(f"a spread needs at least one repeat, got {self.repeats!r}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def __contains__(self, value: float) -> bool:
        """Whether a value lies within: repeats that lie on both sides of it do not say on which side it is.

        Example:
            >>> 1 in Spread(0.97, 1.04, "interquartile", repeats=10)
            True
        """
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.kind} {_digits(self.low)} to {_digits(self.high)} of {self.repeats:,}"


@dataclass(frozen=True)
class Measurement:
    """One number with its unit and the conditions it was taken under.

    A perplexity without its protocol, or a time without its threads, cannot be compared with anything; so
    nothing in `secateur.evaluate` returns a bare float.

    Args:
        name: what was measured, for instance `perplexity`.
        value: finite; an int stays an int.
        unit: `bytes`, `ms`, `nats` ...; `1` for a pure number or a fraction in [0, 1].
        conditions: what the value depends on (protocol, dataset, tokens, batch, threads, seed ...).
        spread: how far repeats lie apart, where there were any.

    Raises:
        UsageError: an empty name or unit, a value that is no finite number, or a condition that JSON cannot
            hold.

    Example:
        >>> print(Measurement("perplexity", 29.4134, "1", {"protocol": "windows of 1024", "tokens": 286221}))
        perplexity 29.41 (windows of 1024, 286,221 tokens)
        >>> print(Measurement("latency", 12.3, "ms", {"batch": 1, "threads": 2}))
        latency 12.3 ms (batch 1, 2 threads)
    """

    name: str
    value: float | int
    unit: str
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    spread: Spread | None = None

    def __post_init__(self) -> None:
        for label, text in (("name", self.name), ("unit", self.unit)):
            if not isinstance(text, str) or not text:
                raise UsageError(f"the {label} of a measurement must be a text that is not empty, got {text!r}")
        if not isinstance(self.conditions, Mapping):
            raise UsageError(f"{self.name}: conditions must be a mapping, got {type(self.conditions).__name__}")
        if self.spread is not None and not isinstance(self.spread, Spread):
            raise UsageError(f"{self.name}: spread must be a Spread or None, got {type(self.spread).__name__}")
        held = {key: _condition(self.name, key, value) for key, value in self.conditions.items()}
        object.__setattr__(self, "value", _number(self.name, self.value))
        object.__setattr__(self, "conditions", MappingProxyType(held))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled; a sweep sends measurements between processes.
        return (type(self), (self.name, self.value, self.unit, dict(self.conditions), self.spread))

    def __hash__(self) -> int:
        return hash((self.name, self.value, self.unit, frozenset(self.conditions.items()), self.spread))

    def __str__(self) -> str:
        unit = "" if self.unit == "1" else f" {self.unit}"
        hidden = _MACHINE | _DETAIL if "protocol" in self.conditions else _MACHINE
        said = [_said(key, value) for key, value in self.conditions.items() if key not in hidden]
        if self.spread is not None:
            said.insert(0, str(self.spread))
        tail = ", ".join(part for part in said if part)
        return f"{self.name} {_digits(self.value)}{unit}" + (f" ({tail})" if tail else "")

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain JSON values; `from_dict` gives it back exactly.

        Example:
            >>> Measurement("size", 3, "bytes").to_dict()
            {'name': 'size', 'value': 3, 'unit': 'bytes', 'conditions': {}}
        """
        entry: dict[str, Any] = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "conditions": dict(self.conditions),
        }
        if self.spread is not None:
            spread = self.spread
            entry["spread"] = {
                "low": spread.low,
                "high": spread.high,
                "kind": spread.kind,
                "repeats": spread.repeats,
            }
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` wrote; strict, because the entry may come from a damaged file.

        Raises:
            InputError: a key is missing or unknown, or a value has the wrong type.

        Example:
            >>> Measurement.from_dict({"name": "size", "value": 3, "unit": "bytes", "conditions": {}}).value
            3
        """
        _keys("measurement", entry, {"name", "value", "unit", "conditions"}, {"spread"})
        spread = entry.get("spread")
        if spread is not None:
            _keys("spread", spread, {"low", "high", "kind", "repeats"}, set())
        try:
            return cls(
                name=entry["name"],
                value=entry["value"],
                unit=entry["unit"],
                conditions=entry["conditions"],
                spread=None if spread is None else Spread(**spread),
            )
        except UsageError as error:
            raise InputError(f"this entry is no measurement: {error}") from error


def _number(label: str, value: Any) -> float | int:
    """`value` as a plain finite int or float, so that JSON and arithmetic see the same."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{label}: the value must be a number, got {type(value).__name__} {value!r}")
    if isinstance(value, numbers.Integral):
        return int(value)
    plain = float(value)
    if not math.isfinite(plain):
        raise UsageError(f"{label}: the value must be finite, got {plain}")
    return plain


def _condition(name: str, key: Any, value: Any) -> Condition:
    if not isinstance(key, str) or not key:
        raise UsageError(f"{name}: a condition's key must be a text that is not empty, got {key!r}")
    if isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        return _number(f"{name}, condition {key!r}", value)
    raise UsageError(
        f"{name}: condition {key!r} must be a text, a number or a yes/no, got {type(value).__name__}"
    )


def _keys(label: str, entry: Any, needed: set[str], optional: set[str]) -> None:
    if not isinstance(entry, Mapping):
        raise InputError(f"a {label} must be an object with named entries, got {type(entry).__name__}")
    missing = sorted(needed - set(entry))
    unknown = sorted(str(key) for key in set(entry) - needed - optional)
    if missing or unknown:
        faults = [f"misses {missing}"] * bool(missing) + [f"has unknown {unknown}"] * bool(unknown)
        raise InputError(f"this {label} {' and '.join(faults)}; expected {sorted(needed | optional)}")


def _digits(value: float | int) -> str:
    """Four significant digits, whole thousands written out."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _said(key: str, value: Condition) -> str:
    if value == "" and isinstance(value, str):
        return ""
    if isinstance(value, bool):
        return key if value else f"not {key}"
    if isinstance(value, str):
        return value if key in _PLAIN else f"{key} {value}"
    if key in _COUNTED and isinstance(value, int):
        return f"{_digits(value)} {_COUNTED[key]}" + ("" if value == 1 else "s")
    return f"{key} {_digits(value)}"
