"""Stages that several points begin with: carried out once, in folders of their own, from which the points start."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.sweep.points import Point

__all__ = ["Shared", "shared_stages", "start_of"]


@dataclass(frozen=True)
class Shared:
    """First stages of several points.

    Attributes:
        plain: the experiment that they make, as plain values.
        points: numbers of the points that begin with them.
    """

    plain: dict[str, Any]
    points: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many stages."""
        return len(self.plain["stages"])

    @property
    def name(self) -> str:
        """Of the folder: the stages for people, and a digest of all that they are asked."""
        names = "-".join(name for stage in self.plain["stages"] for name in stage)
        said = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{names}-s{self.plain.get('seed', 0)}")[:80]
        return f"{said}-{hashlib.sha256(_key(self.plain).encode()).hexdigest()[:8]}"


def shared_stages(points: Sequence[Point]) -> tuple[Shared, ...]:
    """What at least two points begin with, the shortest first; only where their ways part or one of them ends.

    So that of stages train, prune, fine-tune with two values of the last, train and prune are carried out once, and
    with two of prune as well, each prune starts from the same train.
    """
    held: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for number, point in enumerate(points):
        plain = point.experiment.plain()
        for length in range(1, len(plain["stages"]) + 1):
            first = {**plain, "stages": plain["stages"][:length]}
            held.setdefault(_key(first), (first, []))[1].append(number)
    found = []
    for first, numbers in held.values():
        longer = [n for other, n in held.values() if _goes_on(first, other)]
        if len(numbers) > 1 and not any(len(n) == len(numbers) for n in longer):
            found.append(Shared(first, tuple(numbers)))
    return tuple(sorted(found, key=lambda each: each.length))


def start_of(number: int, shared: Sequence[Shared], below: int | None = None) -> Shared | None:
    """The longest of the shared stages that a point begins with, of fewer than `below` stages where that is given."""
    fits = [each for each in shared if number in each.points and (below is None or each.length < below)]
    return max(fits, key=lambda each: each.length, default=None)


def _goes_on(first: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the other is the first and one stage more."""
    return {**other, "stages": other["stages"][:-1]} == first


def _key(plain: dict[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True)
