"""One node of a graph as its rule sees it, and what is noted about every node."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from secateur.core.axes.atoms import Axes, Label, Reason
from secateur.core.axes.layout import Extent

__all__ = [
    "Dims",
    "Record",
    "Step",
    "Trace",
    "Unruled",
    "arguments",
    "is_symbol",
    "label_size",
    "operator",
    "sizes_of",
]

Dims = tuple[Label, ...]  # one label per dimension of a tensor


def operator(node: fx.Node) -> str:
    """The name of a node's operator without its overload, such as `aten.linear`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}"
    return str(getattr(target, "__name__", target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their names in the operator's schema, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    out: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            out[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
    return out


def sizes_of(value: torch.Tensor) -> tuple[int, ...]:
    """A traced shape in numbers; a size of the input that is a symbol is its example, or a large prime."""
    return tuple(size if isinstance(size, int) else _stand_in(size) for size in value.shape)


def _stand_in(size: torch.SymInt) -> int:
    if size.node.has_hint():
        return int(size.node.hint)
    expression = size.node.expr
    primes = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)
    names = sorted(map(str, expression.free_symbols))
    table = {symbol: primes[names.index(str(symbol)) % len(primes)] for symbol in expression.free_symbols}
    return max(2, int(expression.subs(table)))


def is_symbol(size: Any) -> bool:
    """Whether a traced size depends on the input."""
    return not isinstance(size, int)


def label_size(label: Label) -> int:
    """Number of positions of a label."""
    total = 1
    for atom in label:
        total *= atom.size
    return total


class Unruled:
    """Returned by a rule for an operator variant it does not cover."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass
class Record:
    """What a rule said about a node beyond its labels; read by the passes that follow."""

    zeros: str = "none"  # where the result is zero: "any", "all" or "pieces" of `zeros_of`, or "none"
    zeros_of: tuple[Any, ...] = ()
    contracted: list[tuple[Label, tuple[Any, ...]]] = field(default_factory=list)
    survivors: list[tuple[Label, str]] = field(default_factory=list)  # statistics over an axis: mean, norm
    rewritten: dict[str, Any] = field(default_factory=dict)  # argument -> value holding Extents
    target: Any = None  # another operator for the pruned program
    gathered: bool = False  # a constant made in the forward: the program selects the kept positions
    alias: fx.Node | None = None  # the result shares memory with this node
    made: list[Label] = field(default_factory=list)  # a forward's own numbers of positions, such as a padding
    reads: list[tuple[fx.Node, int, Label]] = field(default_factory=list)  # table, dimension, whose positions


class Trace:
    """The labels and records of every node of a graph."""

    def __init__(self) -> None:
        self.axes = Axes()
        self.dims: dict[fx.Node, Any] = {}
        self.records: dict[fx.Node, Record] = {}
        self.unruled: dict[str, str] = {}  # operator without a rule -> module where it was met first
        self.shared: set[fx.Node] = set()  # tables that are read through a gather


class Step:
    """One node as its rule sees it."""

    def __init__(self, trace: Trace, node: fx.Node) -> None:
        self.trace, self.node, self.axes = trace, node, trace.axes
        self.args = arguments(node)
        self.record = Record()

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def module(self) -> str:
        """Path of the module whose forward made this node."""
        stack = self.node.meta.get("nn_module_stack") or {}
        return str(list(stack.values())[-1][0]) if stack else ""

    def reason(self, text: str) -> Reason:
        """A reason that names this operator and module."""
        return Reason(text, operator(self.node), self.module)

    def value(self) -> Any:
        """The traced result (fake tensors)."""
        return self.node.meta.get("val")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the single result."""
        return sizes_of(self.value())

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of an argument."""
        return sizes_of(self.args[name].meta["val"])

    def dims(self, name: str | fx.Node) -> Dims:
        """Labels of an argument."""
        node = self.args[name] if isinstance(name, str) else name
        return self.trace.dims[node]

    def tensors(self) -> list[fx.Node]:
        """Input nodes that are single tensors."""
        return [n for n in self.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def _values(self) -> list[Any]:
        value = self.value()
        outs = list(value) if isinstance(value, (tuple, list)) else [value]
        return outs + [n.meta.get("val") for n in self.node.all_input_nodes]

    def has_tensors(self) -> bool:
        """Whether a tensor is involved; arithmetic on numbers is none of our business."""
        return any(isinstance(value, torch.Tensor) for value in self._values())

    def is_empty(self) -> bool:
        """Whether a tensor without elements is involved."""
        return any(isinstance(v, torch.Tensor) and 0 in sizes_of(v) for v in self._values())

    @staticmethod
    def each(dims: Any) -> Iterable[Dims]:
        """The tensors' labels of a node with one or several results."""
        if dims is None:
            return []
        return [d for d in dims if d is not None] if isinstance(dims, list) else [dims]

    def axis(self, dim: int, ndim: int) -> int:
        """A dimension counted from the front."""
        return dim % ndim if ndim else 0

    def freeze(self, labels: Iterable[Label], why: str | Reason) -> None:
        """Freeze every free leaf of these labels."""
        reason = why if isinstance(why, Reason) else self.reason(why)
        for label in labels:
            self.axes.freeze(label, reason)

    def fresh_frozen(self, shape: Sequence[int | torch.SymInt], why: str | Reason) -> Dims:
        """Labels of a tensor none of whose dimensions can be pruned."""
        reason = why if isinstance(why, Reason) else self.reason(why)
        return tuple(
            self.axes.label(size if isinstance(size, int) else _stand_in(size), reason) for size in shape
        )

    def fresh(self) -> Dims:
        """New free labels for the single result; sizes of the input are frozen."""
        why = self.reason("a size of the input")
        return tuple(
            self.axes.label(size, why if is_symbol(traced) else None)
            for size, traced in zip(self.shape, self.value().shape, strict=True)
        )

    def unify(self, left: Label, right: Label) -> Label:
        """Declare two labels the same axis, and give it back."""
        self.axes.unify(left, right, self.reason("axes that meet here cannot be aligned"))
        return left

    def regroup(self, label: Label, sizes: Sequence[int]) -> list[Label]:
        """Labels of a view."""
        return self.axes.regroup(label, sizes, self.reason("the view does not keep units apart"))

    def cut(self, label: Label, bounds: Sequence[int]) -> list[Label]:
        """Labels between the bounds; frozen where the label cannot be cut there."""
        pieces = self.axes.cut(label, bounds)
        if pieces is None:
            why = self.reason("cut inside a unit")
            self.axes.freeze(label, why)
            edges = [0, *bounds, label_size(label)]
            pieces = [self.axes.label(b - a, why) for a, b in itertools.pairwise(edges)]
        return pieces

    def broadcast(self, tensors: Sequence[Dims]) -> Dims:
        """Labels of a pointwise result; dimensions that meet are one axis."""
        ndim = max((len(dims) for dims in tensors), default=0)
        out: list[Label] = [()] * ndim
        for dims in tensors:
            for i, label in enumerate(dims, ndim - len(dims)):
                out[i] = self.unify(out[i], label) if out[i] and label else out[i] or label
        return tuple(out)

    def read_tables(self, tables: Sequence[fx.Node], dims: Dims) -> Dims:
        """Operands that several modules share stay whole; the program gathers what `dims` keep of them."""
        met = [
            (node, dim, label, dim + len(dims) - len(self.dims(node)))
            for node in tables
            for dim, label in enumerate(self.dims(node))
            if label
        ]
        if any(at < 0 or not dims[at] for _, _, _, at in met):  # the table is wider than what reads it
            return self.broadcast([dims, *(self.dims(node) for node in tables)])
        for node, dim, label, at in met:
            self.freeze([label], "a table that several modules share, read through a gather")
            self.record.reads.append((node, dim, dims[at]))
        return dims

    def rewrite(self, **changed: Any) -> None:
        """In the pruned program these arguments take these values, Extents evaluated."""
        self.record.rewritten.update(changed)

    def retarget(self, target: Any, *args: Any) -> None:
        """In the pruned program another operator with these positional arguments runs instead."""
        self.record.target = target
        self.record.rewritten = {str(i): value for i, value in enumerate(args)}

    def sizes(self, dims: Dims, given: Any = None, *, open_sizes: int = 1) -> list[Any]:
        """The shape of the result, following the widths; a size of the input stays as given, or is -1."""
        out: list[Any] = []
        for i, (label, traced) in enumerate(zip(dims, self.value().shape, strict=True)):
            if not is_symbol(traced):
                out.append(Extent((label,)))
            elif isinstance(given, (list, tuple)) and len(given) > i and self.axes.frozen(label):
                out.append(given[i])
            else:
                out.append(-1)
        if sum(not isinstance(size, Extent | fx.Node) for size in out) > open_sizes:
            raise ValueError("more than one size is left open")
        return out

    def zeros(self, mode: str, *of: Any) -> None:
        """Where the result is zero once a unit's parameters are: see Record."""
        self.record.zeros, self.record.zeros_of = mode, of

    def same(self, source: str | fx.Node = "self") -> None:
        """The result is zero where `source` is."""
        self.zeros("any", self.args[source] if isinstance(source, str) else source)

    def contract(self, label: Label, *operands: Any) -> None:
        """The label is summed over: at a removed unit one of the operands has to be zero."""
        self.record.contracted.append((label, operands))

    def survivors(self, labels: Iterable[Label], what: str) -> None:
        """A statistic is taken over these labels; the pruned one is that of the survivors."""
        self.record.survivors.extend((label, what) for label in labels)
