"""Which integers of the modules follow which widths, found in the computation itself.

The model runs once with its own integers replaced by numbers that remember their origin. What such a number
says in a view, a split or a norm is looked up in the exported graph, at the same call of the same module: the
label there gives its new value. Numbers that no call uses, such as `in_features`, follow where their name and
the widths of their module agree. Nothing here is trusted: the shrunk model is run against the masked one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.core.axes.layout import Extent
from secateur.core.example import Example
from secateur.core.statistics import evaluating
from secateur.deploy.naming import HINTED, NEUTRAL, hint
from secateur.deploy.slices import shared_copy
from secateur.deploy.slots import Slot, integers, write_
from secateur.deploy.tagged import Formula, Tagged, Uses, watching
from secateur.deploy.widths import Counts, Widths

__all__ = ["Conflict", "Demand", "Survey", "survey"]

MANY = 4096  # combinations of one formula's numbers that are tried


@dataclass(frozen=True)
class Demand:
    """A number in a call has to be the width of one of these."""

    formula: Formula
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class Conflict:
    """Widths that one integer would have to hold, and cannot.

    Attributes:
        slot: The integer.
        extents: What it stands for.
        fixed: Whether it also sets a scale, so that it must not change.
    """

    slot: Slot
    extents: tuple[Extent, ...]
    fixed: bool


@dataclass
class Survey:
    """What one run told about a model's integers.

    Attributes:
        old: Integer slots and their numbers.
        demands: What calls need.
        scales: Slots that Python turned into floats; they go on to do so with the old width, see `Width`.
        fixed: Slots that tensors were multiplied by or compared with: they must stay.
        classes: Module path -> name of its class.
        widths: The analysis by module.
    """

    old: dict[Slot, int]
    demands: list[Demand]
    scales: set[Slot]
    fixed: set[Slot]
    classes: Mapping[str, str]
    widths: Widths
    live: set[Slot] = field(default_factory=set)
    ignored: set[Slot] = field(default_factory=set)  # what calls say of them cannot be: only the check decides

    def __post_init__(self) -> None:
        self.live = {slot for demand in self.demands for slot in demand.formula.slots}

    def candidates(self, slot: Slot, counts: Counts) -> list[tuple[tuple[int, int], int]]:
        """Possible new values with their ranks, best first; the old one stands where the name fits none."""
        best: dict[int, tuple[int, int]] = {self.old[slot]: (NEUTRAL, 2)}
        for near, label in self.widths.labels(slot.module, self.old[slot]):
            value = self.widths.new(Extent((label,)), counts)
            rank = (hint(slot.name, self.widths.kinds_of(label)), near)
            best[value] = min(best.get(value, rank), rank)
        return sorted((rank, value) for value, rank in best.items())

    def domains(self, counts: Counts) -> dict[Slot, list[int]] | Conflict:
        """For every slot that a call uses the values that all its own calls allow, best first."""
        out: dict[Slot, list[int]] = {}
        allowed = self._allowed(counts)
        for slot in sorted(self.live, key=str):
            values = [value for _, value in self.candidates(slot, counts)]
            if slot in self.ignored:
                out[slot] = values
                continue
            sets = [found for sure, found, _ in allowed.get(slot, []) if sure]
            if slot in self.fixed:
                sets.append({self.old[slot]})
            unsure = [found for sure, found, _ in allowed.get(slot, []) if not sure]
            if sets or unsure:
                common = set.intersection(*sets) if sets else set(values)
                for found in unsure:  # a formula with a number that may be a size itself only helps to choose
                    common = common & found or common
                if not common:
                    extents = tuple(e for sure, _, each in allowed.get(slot, []) if sure for e in each)
                    return Conflict(slot, tuple(dict.fromkeys(extents)), slot in self.fixed)
                values = [v for v in values if v in common] or sorted(common)
            out[slot] = values
        return self._joint(out, counts)

    def _allowed(self, counts: Counts) -> dict[Slot, list[tuple[bool, set[int], tuple[Extent, ...]]]]:
        out: dict[Slot, list[tuple[bool, set[int], tuple[Extent, ...]]]] = {}
        for demand in self.demands:
            if len(demand.formula.slots) == 1 and demand.extents:
                (slot,) = demand.formula.slots
                wanted = {self.widths.new(e, counts) for e in demand.extents}
                values = {
                    v for v in self._nearby(slot, counts, wanted) if self._holds(demand, {slot: v}, wanted)
                }
                out.setdefault(slot, []).append((demand.formula.pure, values, demand.extents))
        return out

    def _nearby(self, slot: Slot, counts: Counts, wanted: set[int]) -> set[int]:
        """Values worth trying in a formula: the candidates, and for plain numbers what is wanted."""
        return wanted | {value for _, value in self.candidates(slot, counts)}

    @staticmethod
    def _holds(demand: Demand, numbers: Mapping[Slot, int], wanted: set[int]) -> bool:
        try:
            return demand.formula.evaluate(numbers) in wanted
        except (ArithmeticError, ValueError):
            return False

    def _joint(self, domains: dict[Slot, list[int]], counts: Counts) -> dict[Slot, list[int]] | Conflict:
        """Keep of each domain what formulas of several slots allow."""
        for demand in self.demands:
            slots = tuple(dict.fromkeys(demand.formula.slots))
            if len(slots) < 2 or not demand.extents or self.ignored & set(slots):
                continue
            wanted = {self.widths.new(e, counts) for e in demand.extents}
            combinations = itertools.islice(itertools.product(*(domains[slot] for slot in slots)), MANY)
            good = [c for c in combinations if self._holds(demand, dict(zip(slots, c, strict=True)), wanted)]
            if not good and not demand.formula.pure:
                continue
            if not good:
                return Conflict(slots[0], demand.extents, any(slot in self.fixed for slot in slots))
            for at, slot in enumerate(slots):
                left = {c[at] for c in good}
                domains[slot] = [value for value in domains[slot] if value in left]
        return domains

    def idle(self, counts: Counts) -> dict[Slot, int]:
        """New values of slots that no call uses, where name and widths agree on one."""
        out = {}
        for slot, old in self.old.items():
            if slot in self.live or slot in self.fixed or slot in self.scales:
                continue
            ranked = [(rank, value) for rank, value in self.candidates(slot, counts) if value != old]
            best = [value for rank, value in ranked if rank == ranked[0][0]]
            if len(best) == 1 and ranked[0][0][0] == HINTED:
                out[slot] = best[0]
        return out

    def clusters(self, domains: Mapping[Slot, list[int]]) -> dict[tuple[str, Any], list[Slot]]:
        """Slots with several possible values, those of one class and name together."""
        out: dict[tuple[str, Any], list[Slot]] = {}
        for slot, values in domains.items():
            if len(values) > 1:
                out.setdefault((self.classes[slot.module], slot.path), []).append(slot)
        return out


def survey(model: nn.Module, example: Example, widths: Widths) -> Survey:
    """Run the model once on the example and note which integers feed which calls.

    Args:
        model: Untouched; a copy that shares its tensors runs.
        example: Inputs.
        widths: Of its analysis.

    Cost: one forward.
    """
    probe = shared_copy(model)
    old: dict[Slot, int] = {}
    for path, module in probe.named_modules():
        met = widths.below.get(path, {})
        old |= {slot: number for slot, number in integers(module, path) if number in met}
    with watching(probe) as uses:
        tags = {slot: Tagged.of(n, Formula((slot,), _reader(slot)), uses.floats) for slot, n in old.items()}
        write_(probe, tags)
        with torch.no_grad(), evaluating(probe):
            probe(*example.args, **example.kwargs)
    demands = list(_demands(uses, widths))
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    return Survey(old, demands, uses.floats, uses.scalars, classes, widths)


def _reader(slot: Slot) -> Any:
    return lambda numbers: numbers[slot]


def _demands(uses: Uses, widths: Widths) -> Iterable[Demand]:
    seen = set()
    for use in uses.calls:
        made = uses.counts[use.module, use.family, use.shapes]
        extents = tuple(dict.fromkeys(widths.matches(use, made)))
        key = (use.formula.slots, use.value, extents)
        if len(use.formula.slots) > 1 or key not in seen:
            seen.add(key)
            yield Demand(use.formula, extents)
