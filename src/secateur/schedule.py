"""When is how much pruned? Progress in [0, 1] -> sparsity, each schedule ending exactly at its target.

A schedule is any function of progress; those below are values that print and compare. `Due` says at which steps of
training it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from secateur.errors import UsageError

__all__ = [
    "Due",
    "Points",
    "Ramp",
    "Schedule",
    "constant",
    "cubic",
    "exponential",
    "geometric",
    "linear",
    "points",
    "targets",
]

Schedule = Callable[[float], float]
ROUNDING = 1e-12  # a schedule may fall by this much by rounding alone


@dataclass(frozen=True)
class Ramp:
    """A sparsity that grows from `start` to `end` along a named curve; made by `linear`, `cubic`, `exponential`."""

    curve: str
    start: float
    end: float

    def __post_init__(self) -> None:
        for sparsity in (self.start, self.end):
            _check_sparsity(self.curve, sparsity)
        if self.end < self.start:
            raise UsageError(
                f"{self!r}: sparsity would fall from {self.start:g} to {self.end:g}; what is pruned stays pruned, so "
                "give the lower one first"
            )

    def __call__(self, progress: float) -> float:
        """The sparsity at `progress`; exactly `start` at 0 and `end` at 1."""
        if not 0 < progress < 1:
            return self.start if progress <= 0 else self.end
        return min(self.end, max(self.start, CURVES[self.curve](self.start, self.end, progress)))

    def __repr__(self) -> str:
        return f"{self.curve}({self.start:g}, {self.end:g})"


# name -> sparsity between the ends; what lies at 0 and 1 is said by `Ramp`
CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda a, b, t: a + (b - a) * t,
    "cubic": lambda a, b, t: b + (a - b) * (1 - t) ** 3,
    "exponential": lambda a, b, t: 1 - (1 - a) * ((1 - b) / (1 - a)) ** t,
}


def linear(start: float, end: float) -> Ramp:
    """Sparsity grows evenly: `a + (b - a) t`.

    Example:
        >>> [linear(0.2, 0.8)(t) for t in (0, 0.5, 1)]
        [0.2, 0.5, 0.8]
    """
    return Ramp("linear", start, end)


def cubic(start: float, end: float) -> Ramp:
    """Much is pruned early, while there is much to spare, little at the end: `b + (a - b) (1 - t)^3`.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", equation 1.

    Example:
        >>> [round(cubic(0.0, 0.8)(t), 3) for t in (0, 0.5, 1)]
        [0.0, 0.7, 0.8]
    """
    return Ramp("cubic", start, end)


def exponential(start: float, end: float) -> Ramp:
    """Every step prunes the same fraction of what is left: density falls as `(1 - a) ((1 - b) / (1 - a))^t`.

    Raises:
        UsageError: an end of 1, which no fraction of what is left ever reaches.

    Example:
        >>> [round(exponential(0.0, 0.75)(t), 3) for t in (0, 0.5, 1)]
        [0.0, 0.5, 0.75]
    """
    if start == 1 or end == 1:
        raise UsageError(
            f"exponential({start:g}, {end:g}): a constant fraction of what is left never reaches sparsity 1; end below "
            "1, or take linear or cubic"
        )
    return Ramp("exponential", start, end)


def constant(sparsity: float) -> Ramp:
    """All at once, at the first step that is due; the rest of training only holds it.

    Example:
        >>> constant(0.5)(0.0)
        0.5
    """
    return Ramp("linear", sparsity, sparsity)


@dataclass(frozen=True)
class Points:
    """Straight lines through the given `(progress, sparsity)`; made by `points`."""

    given: tuple[tuple[float, float], ...]

    def __call__(self, progress: float) -> float:
        """The sparsity at `progress`; exactly that of a point at its progress."""
        for (t0, a), (t1, b) in zip(self.given, self.given[1:], strict=False):
            if progress <= t0:
                return a
            if progress < t1:
                return a + (b - a) * (progress - t0) / (t1 - t0)
        return self.given[-1][1]

    def __repr__(self) -> str:
        return f"points({', '.join(f'({t:g}, {s:g})' for t, s in self.given)})"


def points(*given: tuple[float, float]) -> Points:
    """A schedule through `(progress, sparsity)` points, from progress 0 to progress 1, straight between them.

    Example:
        >>> points((0, 0.0), (0.5, 0.75), (1, 1.0))(0.25)
        0.375
    """
    try:
        pairs = tuple((float(t), float(s)) for t, s in given)
    except (TypeError, ValueError):
        raise UsageError(f"points{given!r}: expected pairs of (progress, sparsity)") from None
    places = [t for t, _ in pairs]
    if len(pairs) < 2 or places[0] != 0 or places[-1] != 1 or sorted(set(places)) != places:
        raise UsageError(
            f"points at progress {places}: expected at least two, rising, the first at 0 and the last at 1"
        )
    for _, sparsity in pairs:
        _check_sparsity("points", sparsity)
    return Points(pairs)


def geometric(fraction: float | None = None, rounds: int = 1, *, end: float | None = None) -> Iterator[float]:
    """The sparsities of iterative pruning: every round prunes the same fraction of what is left.

    Args:
        fraction: of the remaining weights, pruned in each round, in (0, 1).
        rounds: how many, at least 1.
        end: instead of a fraction, the sparsity that the last round reaches exactly, in (0, 1).

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", section 2: each round prunes `p^(1/n)`.

    Example:
        >>> [round(sparsity, 3) for sparsity in geometric(0.5, rounds=3)]
        [0.5, 0.75, 0.875]
        >>> [round(sparsity, 3) for sparsity in geometric(rounds=2, end=0.75)]
        [0.5, 0.75]
    """
    if (fraction is None) == (end is None):
        raise UsageError(
            "geometric: give either the fraction that each round prunes or end=, the last sparsity"
        )
    given = fraction if fraction is not None else end
    if not isinstance(given, Real) or not 0 < float(given) < 1:
        raise UsageError(f"geometric: {'fraction' if end is None else 'end'} {given!r} is not in (0, 1)")
    if not isinstance(rounds, int) or rounds < 1:
        raise UsageError(f"geometric: rounds is {rounds!r}; expected a whole number of at least 1")
    left = (1 - float(given)) ** (1.0 if end is None else 1 / rounds)
    found = [1 - left**k for k in range(1, rounds + 1)]
    if end is not None:
        found[-1] = end
    return iter(found)


@dataclass(frozen=True)
class Due:
    """Updates after step `begin` and every `every` steps from there, the last after step `end`.

    Raises:
        UsageError: an interval that does not lead from begin to end.
    """

    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        for name, value, least in (("begin", self.begin, 0), ("end", self.end, 1), ("every", self.every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is {value!r}; expected a whole number of steps, at least {least}")
        if self.begin >= self.end:
            raise UsageError(f"begin {self.begin} is not before end {self.end}; no step lies between them")
        over = (self.end - self.begin) % self.every
        if over:
            last = self.end - over
            raise UsageError(
                f"the schedule never reaches its end: updates every {self.every} steps from {self.begin} fall on "
                f"{last} and {last + self.every}, not on {self.end}. Set end to one of these, or every to a divisor of "
                f"{self.end - self.begin}"
            )

    @classmethod
    def spread(cls, steps: int, begin: float = 0.1, end: float = 0.7, updates: int = 20) -> Due:
        """Updates between two fractions of a training, evenly, as many as asked for or one a step.

        Args:
            steps: of the whole training.
            begin, end: fractions of them, in [0, 1]; what follows the last update is left to recover.
            updates: after the first, at most.

        Raises:
            UsageError: fractions out of order, or no step between them.

        Example:
            >>> Due.spread(1000), Due.spread(10)
            (Due(begin=100, end=700, every=30), Due(begin=1, end=7, every=1))
        """
        if not 0 <= begin < end <= 1 or updates < 1:
            raise UsageError(
                f"begin {begin:g}, end {end:g} and {updates} updates; expected 0 <= begin < end <= 1 and at least one"
            )
        first, span = round(begin * steps), round(end * steps) - round(begin * steps)
        if span < 1:
            raise UsageError(
                f"the schedule never reaches its end: no step of {steps} lies between {begin:g} and {end:g} of them; "
                "train for more epochs"
            )
        every = max(1, span // updates)
        return cls(first, first + every * (span // every), every)

    @property
    def updates(self) -> int:
        """How many updates follow the first."""
        return (self.end - self.begin) // self.every

    def update(self, steps: int) -> int:
        """The number of the latest update that is due after so many steps; 0 is the first, -1 none yet."""
        return -1 if steps < self.begin else min((steps - self.begin) // self.every, self.updates)


def targets(schedule: Schedule, due: Due) -> tuple[float, ...]:
    """The sparsity of every update, checked before training starts.

    Raises:
        UsageError: a schedule that is no function, leaves [0, 1] or falls.
    """
    if not callable(schedule):
        raise UsageError(
            f"schedule is {schedule!r}; expected a function of progress in [0, 1] such as cubic(0.0, 0.9)"
        )
    found: list[float] = []
    for k in range(due.updates + 1):
        progress = k / due.updates
        sparsity = schedule(progress)
        _check_sparsity(f"schedule {_name(schedule)} at progress {progress:g}", sparsity)
        sparsity = float(sparsity)
        if found and sparsity < found[-1] - ROUNDING:
            raise UsageError(
                f"schedule {_name(schedule)} falls from {found[-1]:g} to {sparsity:g} at progress {progress:g}; what "
                "is pruned stays pruned, so it may only rise"
            )
        found.append(max([sparsity, *found[-1:]]))
    return tuple(found)


def _name(schedule: Any) -> str:
    return getattr(schedule, "__name__", None) or repr(schedule)


def _check_sparsity(where: str, sparsity: Any) -> None:
    number = float(sparsity) if isinstance(sparsity, Real) else math.nan
    if not 0 <= number <= 1:
        shown = f"{number:g}" if isinstance(sparsity, Real) else repr(sparsity)
        hint = f". Did you mean {number / 100:g}?" if 1 < number <= 100 else ""
        raise UsageError(f"{where}: sparsity {shown} is not in [0, 1]{hint}")
