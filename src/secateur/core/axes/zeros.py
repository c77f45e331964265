"""Where tensors are zero once a unit's parameters are: what makes removing the same as masking.

A sum over an axis may lose positions only if they add nothing. For every node the pass computes the leaves at
whose removed units the tensor is zero, from the parameters downwards; an axis that is summed over where no
operand is zero is frozen. Buffers are not taken for zero: a mask is laid on parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from secateur.core.axes.atoms import Atom, Reason
from secateur.core.axes.step import Record, Step, Trace, operator

__all__ = ["check_zeros"]

Leaves = frozenset[Atom]


class _Zeros:
    """Zero sets of the nodes of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.axes = trace.axes
        self.zero: dict[fx.Node, Leaves] = {}
        self.family: dict[fx.Node, list[fx.Node]] = {}  # base of shared memory -> nodes that look at it
        self.base: dict[fx.Node, fx.Node] = {}
        self._leaves: dict[fx.Node, Leaves] = {}

    def free(self, labels: Iterable[Any]) -> Leaves:
        """Free leaves of some labels."""
        return frozenset(leaf for label in labels for leaf in self.axes.leaves(label) if leaf.reason is None)

    def leaves(self, node: fx.Node) -> Leaves:
        """Free leaves of a node's results."""
        found = self._leaves.get(node)
        if found is None:
            found = frozenset().union(*(self.free(dims) for dims in Step.each(self.trace.dims.get(node))))
            self._leaves[node] = found
        return found

    def of(self, operand: Any, wanted: Leaves) -> Leaves:
        """Zero leaves of an operand; the number 0 is zero everywhere, another number nowhere."""
        if isinstance(operand, fx.Node):
            return self.zero.get(operand, frozenset())
        return wanted if operand is not None and operand == 0 else frozenset()

    def result(self, node: fx.Node, record: Record) -> Leaves:
        """Leaves at whose removed units the node's result is zero."""
        mine, of = self.leaves(node), record.zeros_of
        if not mine or record.zeros == "none":
            return frozenset()
        if record.zeros == "constant":
            return mine
        if record.zeros == "any":
            return mine & frozenset().union(*(self.of(x, mine) for x in of))
        if record.zeros == "all":
            return mine.intersection(*(self.of(x, mine) for x in of)) if of else frozenset()
        if record.zeros == "pieces":
            bad = frozenset().union(*(self.leaves(x) - self.zero[x] for x in of))
            return mine - bad
        if record.zeros == "quotient":
            return mine & self.of(of[0], mine)
        if record.zeros == "product":
            bias, *factors = of
            through = [self.zero[x] & self.free(labels) for x, labels in factors]
            found = mine & frozenset().union(*through)
            return found if bias is None else found & self.of(bias, mine)
        return self._affine(mine, *of)

    def _affine(self, mine: Leaves, source: Any, weight: Any, bias: Any) -> Leaves:
        scaled = frozenset() if weight is None else self.leaves(weight) & self.zero[weight]
        if bias is not None:
            scaled &= self.zero[bias]
        other = frozenset() if source is None or bias is not None else self.zero[source]
        return mine & (scaled | (other if weight is None else other - self.leaves(weight)))

    def share(self, node: fx.Node, record: Record) -> None:
        """Remember which nodes look at the same memory."""
        base = self.base.get(record.alias, record.alias) if record.alias is not None else node
        self.base[node] = base
        self.family.setdefault(base, []).append(node)

    def mutate(self, node: fx.Node) -> None:
        """After an in-place operator every view of the memory may hold what it wrote."""
        target = node.args[0]
        if not isinstance(target, fx.Node):
            return
        lost = self.leaves(node) - self.zero[node]
        base = self.base.get(target, target)
        for other in [base, *self.family.get(base, [])]:
            self.zero[other] = self.zero.get(other, frozenset()) - lost


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def check_zeros(trace: Trace, parameters: set[fx.Node]) -> None:
    """Freeze every axis that is summed over where masking does not make the summands zero.

    Cost: one pass over the graph.
    """
    state = _Zeros(trace)
    for node in trace.dims:
        record = trace.records.get(node)
        if record is None:  # parameters, buffers, inputs
            state.zero[node] = state.leaves(node) if node in parameters else frozenset()
            state.base[node] = node
            continue
        for label, operands in record.contracted:
            safe = frozenset().union(*(state.zero.get(x, frozenset()) for x in operands))
            _refuse(trace, node, state.free([label]) - safe, "summed over where masked units are not zero")
        if record.zeros == "quotient" and isinstance(record.zeros_of[1], fx.Node):
            bad = state.leaves(node) & state.zero[record.zeros_of[1]]
            _refuse(trace, node, bad, "masked units divide by zero")
        state.zero[node] = state.result(node, record)
        state.share(node, record)
        if _writes(node):
            state.mutate(node)


def _refuse(trace: Trace, node: fx.Node, leaves: Leaves, text: str) -> None:
    why = Reason(text, operator(node), Step(trace, node).module)
    for leaf in leaves:
        if leaf.reason is None:
            leaf.reason = why
