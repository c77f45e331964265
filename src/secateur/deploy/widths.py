"""The widths that the analysis found in each module: old and new extents of every label met there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from secateur.core.axes.atoms import Atom, Axes, Label, size_of
from secateur.core.axes.layout import Extent, extent
from secateur.core.axes.step import Record, Step, operator, sizes_of
from secateur.core.units import Analysis
from secateur.deploy.tagged import Use, family

__all__ = ["Counts", "Widths"]

AXES = Axes()  # the laws of labels; atoms hold the facts

Counts = Mapping[Atom, Tensor]  # leaf -> units that stay
Node = tuple[fx.Node, Any, Record]  # with the labels of its results, and what the rule said
Sized = dict[int, dict[Any, Label]]  # size -> labels of that size


@dataclass
class Widths:
    """Widths by module path.

    Attributes:
        parts: Path of a module -> its analysis; the whole model is at "".
    """

    parts: Mapping[str, Analysis]
    own: dict[str, Sized] = field(default_factory=dict)  # met in a module's own forward or tensors
    below: dict[str, Sized] = field(default_factory=dict)  # met in it or in its submodules
    nodes: dict[tuple[str, str, Any], list[Node]] = field(default_factory=dict)
    shaped: dict[tuple[str, Any], list[Node]] = field(default_factory=dict)
    kinds: dict[Atom, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prefix, analysis in self.parts.items():
            self.kinds.update({units.leaf: units.kind for units in analysis.units})
            self._look_at(prefix, analysis)

    def _look_at(self, prefix: str, analysis: Analysis) -> None:
        trace = analysis.trace
        for node, names in analysis.tensor_nodes().items():
            for name in names:
                self._meet(_joined(prefix, name.rpartition(".")[0]), trace.dims[node])
        for node, record in trace.records.items():
            path = _joined(prefix, Step(trace, node).module.partition("@")[0])  # @1: a further call of a module
            for dims in Step.each(trace.dims.get(node)):
                self._meet(path, dims)
            shapes = _shapes(node)
            if shapes:
                met = (node, trace.dims[node], record)
                name = operator(node).rpartition(".")[2]
                self.nodes.setdefault((path, family(name), shapes), []).append(met)
                self.shaped.setdefault((path, shapes), []).append(met)

    def _meet(self, path: str, dims: Any) -> None:
        for label in dims:
            for part in self._parts(label):
                key, size = tuple(map(id, part)), size_of(part)
                self.own.setdefault(path, {}).setdefault(size, {})[key] = part
                above = path
                while True:
                    self.below.setdefault(above, {}).setdefault(size, {})[key] = part
                    if not above:
                        break
                    above = above.rpartition(".")[0]

    def _parts(self, label: Label) -> Iterator[Label]:
        """Runs of a label's factors that hold a free leaf."""
        axes = AXES
        flat = axes.flat(label)
        for start in range(len(flat)):
            for stop in range(start + 1, len(flat) + 1):
                if not axes.frozen(flat[start:stop]):
                    yield flat[start:stop]

    def new(self, met: Extent, counts: Counts) -> int:
        """The width that is left."""
        return sum(extent(AXES, label, counts) for label in met.labels) + met.plus

    def whole(self, met: Extent) -> int:
        """The width before."""
        return sum(size_of(label) for label in met.labels) + met.plus

    def touched(self, met: Extent, counts: Counts) -> bool:
        """Whether anything of it goes."""
        axes = AXES
        return any(leaf in counts for label in met.labels for leaf in axes.leaves(label))

    def kinds_of(self, label: Label) -> list[str]:
        """Kinds of the free leaves of a label."""
        leaves = AXES.leaves(label)
        return [self.kinds.get(leaf, "other") for leaf in leaves if leaf.reason is None]

    def labels(self, path: str, size: int) -> list[tuple[int, Label]]:
        """Labels of this size met in a module: in its own forward or tensors (0), or in a submodule (1)."""
        mine = self.own.get(path, {}).get(size, {})
        others = self.below.get(path, {}).get(size, {})
        return [(0, label) for label in mine.values()] + [
            (1, x) for key, x in others.items() if key not in mine
        ]

    def matches(self, use: Use, made: int) -> list[Extent]:
        """What the number in a call stands for, by the exported graph; several when that is ambiguous.

        Args:
            use: The call.
            made: How many calls of its family with this shape of result the module made in all.
        """
        found = self.nodes.get((use.module, use.family, use.shapes), [])
        if len(found) == made:
            found = [found[use.order]]
        if found:
            return [extent for node in found for extent in self._in_node(node, use)]
        near = self.shaped.get((use.module, use.shapes), [])
        return [extent for node in near for extent in self._in_shape(node, use)]

    def _in_node(self, node: Node, use: Use) -> list[Extent]:
        """What the argument of a matching operator stands for; a constant where it is no width."""
        target, results, record = node[0].target, node[1], node[2]
        if use.dim is not None:
            return [] if isinstance(results, list) else [Extent((results[use.dim],))]
        named = record.target is None and isinstance(target, torch._ops.OpOverload)
        if named and use.family != "slice":
            arguments = [argument.name for argument in target._schema.arguments]  # type: ignore[union-attr]
            name = use.place if isinstance(use.place, str) else arguments[min(use.place, len(arguments) - 1)]
            if name in arguments:
                said = [e for e in _extents(record.rewritten.get(name)) if self.whole(e) == use.value]
                return said or [Extent((), use.value)]
        said = [e for e in _extents(record.rewritten) if self.whole(e) == use.value]
        return said if said and use.family != "view" else self._in_shape(node, use)

    def _in_shape(self, node: Node, use: Use) -> list[Extent]:
        labels = [label for dims in Step.each(node[1]) for label in dims]
        return [Extent((label,)) for label in labels if size_of(label) == use.value]


def _joined(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _extents(value: Any) -> Iterator[Extent]:
    if isinstance(value, Extent):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _extents(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _extents(part)


def _shapes(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else [value]
    return tuple(sizes_of(part) for part in parts if isinstance(part, torch.Tensor))
