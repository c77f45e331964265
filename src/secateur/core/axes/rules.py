"""Visiting a graph: every operator's rule says what it does to the axes of its tensors.

A rule is a function `(step) -> Dims` registered for operator names with `@rule("view reshape")`. It may
unify, cut, join or regroup labels; it freezes what the operator ties to positions (softmax, sort, index); it
says which integer arguments follow the widths (`step.rewrite`), where the result is zero when a unit's
parameters are zero (`step.zeros`), and what is contracted (`step.contract`). An operator without a rule freezes
every axis it touches and is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from secateur.core.axes.step import Dims, Record, Step, Trace, Unruled, label_size, operator, sizes_of

__all__ = ["RULES", "Dims", "Step", "Trace", "Unruled", "label_size", "operator", "rule", "sizes_of", "visit"]

Rule = Callable[[Step], Any]  # returns Dims, or a list of Dims for an operator with several results

RULES: dict[str, Rule] = {}


def names(words: str) -> list[str]:
    """Operator names written in one line; those without a namespace are ATen's."""
    return [word if "." in word else f"aten.{word}" for word in words.split()]


EMPTY_ALLOWED = set(  # operators whose rules hold for tensors without elements
    names("slice cat neg mul add to transpose unsqueeze contiguous clone alias zeros new_zeros getitem")
)


def rule(words: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these operators, see `names`."""

    def register(function: Rule) -> Rule:
        for name in names(words):
            RULES[name] = function
        return function

    return register


def visit(trace: Trace, node: fx.Node) -> None:
    """Label one call_function node."""
    step = Step(trace, node)
    trace.records[node] = step.record
    name = operator(node)
    name = name if "." in name else f"aten.{name}"
    found = RULES.get(name)
    if found is None and isinstance(node.target, torch._ops.OpOverload):
        found = RULES["aten.pointwise"] if torch.Tag.pointwise in node.target.tags else None
    if found is None and not step.has_tensors():
        trace.dims[node] = None
        return
    if found is None or (name not in EMPTY_ALLOWED and step.is_empty()):
        if found is None:
            trace.unruled.setdefault(name, step.module)
        trace.dims[node] = unknown(step)
        return
    result = _apply(found, step, name)
    if isinstance(result, Unruled) or not _fits(step, result):
        trace.unruled.setdefault(getattr(result, "name", name), step.module)
        step.record = trace.records[node] = Record()
        result = unknown(step)
    trace.dims[node] = result


def _apply(found: Rule, step: Step, name: str) -> Any:
    """A rule that meets arguments it does not foresee, such as sizes that are no numbers, counts as none."""
    try:
        return found(step)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return Unruled(f"{name} ({type(error).__name__} in its rule)")


def _fits(step: Step, result: Any) -> bool:
    """Whether the labels have the traced sizes; a rule met in a way it does not foresee must not go on."""
    values = step.value()
    pairs = zip(result, values, strict=False) if isinstance(result, list) else [(result, values)]
    for dims, value in pairs:
        if isinstance(value, torch.Tensor) and (
            dims is None or [label_size(label) for label in dims] != list(sizes_of(value))
        ):
            return False
    return True


def unknown(step: Step) -> Any:
    """Freeze everything the node touches; its results are frozen too."""
    why = step.reason("no rule for this operator")
    for node in step.node.all_input_nodes:
        for dims in step.each(step.trace.dims.get(node)):
            step.freeze(dims, why)
    step.zeros("none")
    value = step.value()
    if isinstance(value, (tuple, list)):
        return [step.fresh_frozen(v.shape, why) if isinstance(v, torch.Tensor) else None for v in value]
    return step.fresh_frozen(value.shape, why) if isinstance(value, torch.Tensor) else None
