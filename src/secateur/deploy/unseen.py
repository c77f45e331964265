"""Shrinking a model that has no numbers: decided on the meta device, and checked operator by operator.

Where there is no memory for the weights there is no output to compare. What can be compared is the computation: the
small model is exported again, and its graph must be the pruned graph, the same operators in the same order with the
same shapes and the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.core.axes.atoms import Atom
from secateur.core.axes.step import operator
from secateur.core.axes.trace import export
from secateur.core.example import Example, analysis_of, main_output
from secateur.core.masks import Masks
from secateur.core.units import Analysis, pruned_program
from secateur.deploy.attributes import survey
from secateur.deploy.cuts import cut
from secateur.deploy.fitting import NotExactError, fit
from secateur.deploy.parts import Parts
from secateur.deploy.shrunk import Axis, Shrunk
from secateur.deploy.slots import Slot, numbers_of, read
from secateur.deploy.twin import configuration
from secateur.deploy.width import Width
from secateur.deploy.widths import Widths
from secateur.errors import UsageError

__all__ = ["plan_cuts"]

SAME = {
    "aten.view": "aten.reshape",
    "aten.split": "aten.split_with_sizes",
    "aten.chunk": "aten.split_with_sizes",
}
SKIPPED = {"aten._assert_tensor_metadata", "aten.contiguous", "aten.clone", "aten.alias"}  # change no number
CHECKED = "its graph, operator by operator"


def plan_cuts(
    model: nn.Module, masks: Masks | Mapping[str, Any], example: Any, *, analysis: Analysis | None = None
) -> Shrunk:
    """What has to be cut in a model without numbers, so that it computes what the masked model does.

    Args:
        model: On the meta device; untouched.
        masks: Whole units, or axis name -> units that stay.
        example: Inputs on the meta device.
        analysis: Of this model and example; by default it is made here.

    Returns:
        The cuts, for `cut`.

    Raises:
        UsageError: masks that are no whole units; modules that cannot follow an axis, by name.

    Cost: two exports; no tensor is computed.
    """
    found, given = analysis_of(model, example) if analysis is None else (analysis, example)
    parts = Parts({"": found})
    asked = parts.kept(masks) if isinstance(masks, Masks) else parts.named(masks)
    units = {each.leaf: each for _, each in parts.axes()}
    with _as_exporting():
        observed = survey(model, given, Widths(parts.analyses))
    try:
        held, domains, _ = fit(observed, asked, units, may_pad=False)
    except NotExactError as error:
        raise UsageError(f"{error.units.name}: the modules cannot follow this axis: {error}.") from None
    numbers = {slot: values[0] for slot, values in domains.items()} | observed.idle(held)
    changed: dict[Slot, tuple[int, int]] = {}
    for slot, new in numbers.items():
        old = observed.old[slot]
        if new != old:
            changed[slot] = (old, Width(new, old) if slot in observed.scales else new)
    axes = tuple(
        Axis(
            units[leaf].name,
            units[leaf].kind,
            leaf.size,
            len(kept),
            len(kept),
            units[leaf].exact,
            units[leaf].reason,
        )
        for leaf, kept in asked.items()
    )
    before = sum(p.numel() for p in model.parameters())
    index = parts.index(held)
    note = Shrunk(
        axes, index, {}, changed, 0.0, (CHECKED,), (before, 0), type(model).__name__, configuration(model)
    )
    small = cut(model, note)
    _check(small, parts, held, given)
    changed = {
        slot: (old, new)
        for slot, old in numbers_of(model).items()
        if (new := _read(small, slot)) not in (None, old)
    }
    return replace(note, numbers={**changed, **note.numbers})


@contextmanager
def _as_exporting() -> Iterator[None]:
    """Let models take the way that they take in torch.export: without looking at numbers that are not there."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {name: getattr(torch.compiler, name) for name in flags if hasattr(torch.compiler, name)}
    try:
        for name in before:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


def _read(model: nn.Module, slot: Slot) -> Any:
    try:
        return read(model, slot)
    except (KeyError, IndexError, AttributeError):
        return None


def _check(small: nn.Module, parts: Parts, held: Mapping[Atom, Tensor], given: Example) -> None:
    assert parts.whole is not None
    wanted = pruned_program(parts.whole, parts.by_name("", held))
    name = type(small).__name__
    try:
        graph = export(small, given.args, given.kwargs, output=main_output)
        found = [*_steps(graph, given)]
    except Exception as error:  # whatever a forward with wrong sizes raises
        words = " ".join(str(error).split())[:200]
        raise UsageError(f"{name}: the modules cannot follow these axes: {words}") from None
    for at, (one, other) in enumerate(zip_longest(_steps(wanted, given), found)):
        if one is None or other is None or not _alike(one, other):
            raise UsageError(
                f"{name}: the modules cannot follow these axes: step {at} of the small model is "
                f"{_words(other)}, expected {_words(one)}."
            )


Taken = tuple[str, tuple[tuple[int, ...], ...], tuple[float, ...]]  # operator, shapes of its results, constants


class _Shapes(fx.Interpreter):
    """Runs a graph on the meta device and remembers every step."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.steps: list[Taken] = []

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.op == "call_function" and operator(node) not in SKIPPED:
            tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            plain = [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, float)]
            if tensors:
                name = SAME.get(operator(node), operator(node))
                shapes = tuple(tuple(x.shape) for x in tensors)
                self.steps.append((name, shapes, tuple(plain)))
        return result


@torch.no_grad()
def _steps(program: fx.GraphModule, given: Example) -> Iterator[Taken]:
    runner = _Shapes(program)
    runner.run(*pytree.tree_leaves((given.args, dict(given.kwargs))), enable_io_processing=False)
    yield from runner.steps


def _alike(one: Taken, other: Taken) -> bool:
    same = one[:2] == other[:2] and len(one[2]) == len(other[2])
    return same and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one[2], other[2], strict=True))


def _words(step: Taken | None) -> str:
    return "nothing" if step is None else f"{step[0]} of shape {' and '.join(map(str, step[1]))}"
