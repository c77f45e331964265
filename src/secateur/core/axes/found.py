"""What an analysis finds: axes that can be pruned, and dimensions that keep their size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from jaxtyping import Int
from torch import Tensor, fx

from secateur.core.axes.atoms import NARROW, Atom, Label, Reason
from secateur.core.axes.layout import index_map
from secateur.core.axes.step import Step, Trace, operator, sizes_of
from secateur.core.axes.words import kind_of, name_of, roles

__all__ = ["Frozen", "Member", "Units", "collect"]

Notes = dict[Atom, dict[str, None]]  # leaf -> texts, in order and once each


@dataclass(frozen=True, eq=False)
class Member:
    """A dimension of a parameter or buffer that carries the units.

    Attributes:
        name: The tensor's first name in the model.
        dim: Its dimension.
        aliases: Other names of the same tensor (tied weights).
        is_parameter: False for a buffer.
    """

    name: str
    dim: int
    aliases: tuple[str, ...]
    is_parameter: bool
    label: Label = field(repr=False)
    leaf: Atom = field(repr=False)
    trace: Trace = field(repr=False)

    @cached_property
    def indices(self) -> Int[Tensor, "units width"]:
        """Row u: the indices along `dim` that go when unit u goes."""
        return index_map(self.trace.axes, self.label, self.leaf)


@dataclass(frozen=True, eq=False)
class Units:
    """One prunable axis: `size` units, each a set of slices that are removed together.

    Attributes:
        name: In words, unique within an analysis.
        kind: head, query head, KV group, qk dimension, rotary pair, v dimension, feed-forward unit,
            expert feed-forward, hidden, channel or other.
        size: Number of units.
        members: The tensors' dimensions that carry them.
        exact: Whether removing equals masking; False where a norm or mean is taken over the axis.
        reason: Why it is not exact.
        constants: Operators that make constants along the axis in the forward (positions, padding); the pruned
            program follows, a module has to do the same.
        gathers: With `decouple`, which tables the program reads the kept positions of, and their size.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    exact: bool
    reason: str
    constants: tuple[str, ...]
    gathers: tuple[str, ...]
    leaf: Atom = field(repr=False)

    @property
    def width(self) -> int:
        """Largest number of indices one unit has along one tensor."""
        return max(member.indices.shape[1] for member in self.members)


@dataclass(frozen=True, eq=False)
class Frozen:
    """Dimensions that keep their size, and why.

    Attributes:
        reason: What was found, with the operator and module.
        members: (tensor name, dimension) pairs.
    """

    reason: Reason
    members: tuple[tuple[str, int], ...]


def collect(
    trace: Trace,
    holders: Mapping[str, fx.Node],
    ties: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, Any],
    module: fx.GraphModule,
) -> tuple[tuple[Units, ...], tuple[Frozen, ...]]:
    """The free leaves that parameters carry as named units, and the others by reason."""  # fmt: skip
    members: dict[Atom, list[Member]] = {}
    reasons: dict[Reason, list[tuple[str, int]]] = {}
    for name, node in holders.items():
        for dim, label in enumerate(trace.dims[node]):
            for leaf in dict.fromkeys(trace.axes.leaves(label)):
                if leaf.reason is None:
                    member = Member(name, dim, ties[name][1:], name in parameters, label, leaf, trace)
                    members.setdefault(leaf, []).append(member)
                elif leaf.reason is not NARROW and (name, dim) not in reasons.setdefault(leaf.reason, []):
                    reasons[leaf.reason].append((name, dim))
    live, approximate, constants, gathers = _facts(trace)
    met = roles(trace, module.graph)
    units: list[Units] = []
    for leaf, mine in members.items():
        if leaf not in live or leaf.size < 2 or not any(member.is_parameter for member in mine):
            text = (
                "the example never touches these positions" if leaf not in live else "no parameter carries it"
            )
            reasons.setdefault(Reason(text), []).extend((member.name, member.dim) for member in mine)
            continue
        kind = kind_of(met.get(leaf, Counter()))
        why = "; ".join(approximate.get(leaf, ()))
        made = tuple(constants.get(leaf, ()))
        read = tuple(gathers.get(leaf, ()))
        units.append(Units("", kind, leaf.size, tuple(mine), not why, why, made, read, leaf))
    frozen = tuple(Frozen(reason, tuple(where)) for reason, where in reasons.items())
    return _named(units), frozen


def _named(units: list[Units]) -> tuple[Units, ...]:
    """Unique names: by shared path, else by the first modules, else numbered."""
    tensors = [[member.name for member in axis.members if member.is_parameter] for axis in units]
    names = [name_of(axis.kind, mine) for axis, mine in zip(units, tensors, strict=True)]
    often = Counter(names)
    names = [
        name if often[name] == 1 else name_of(axis.kind, mine, listed=True)
        for name, axis, mine in zip(names, units, tensors, strict=True)
    ]
    seen: Counter[str] = Counter()
    out: list[Units] = []
    for name, axis in zip(names, units, strict=True):
        seen[name] += 1
        out.append(replace(axis, name=f"{name} ({seen[name]})" if seen[name] > 1 else name))
    return tuple(out)


def _facts(
    trace: Trace,
) -> tuple[set[Atom], Notes, Notes, Notes]:
    """Leaves that reach a computed tensor; statistics over, constants along, and tables read for a leaf."""
    live: set[Atom] = set()
    approximate: Notes = {}
    constants: Notes = {}
    gathers: Notes = {}
    for node, record in trace.records.items():
        where = None
        for label, what in record.survivors:
            for leaf in trace.axes.leaves(label):
                where = where or Step(trace, node).module
                approximate.setdefault(leaf, {})[what] = None
        for table, _, label in record.reads:
            text = (
                f"{table.name} read at {Step(trace, node).module}, {prod(sizes_of(table.meta['val']))} numbers"
            )
            for leaf in trace.axes.leaves(label):
                gathers.setdefault(leaf, {})[text] = None
        labels = [label for dims in Step.each(trace.dims[node]) for label in dims]
        live.update(leaf for label in labels for leaf in trace.axes.leaves(label))
        for label in labels if record.gathered else record.made:
            for leaf in trace.axes.leaves(label):
                constants.setdefault(leaf, {})[f"{operator(node)} at {Step(trace, node).module}"] = None
    return live, approximate, constants, gathers
