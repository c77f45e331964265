"""Rules of operators that address positions by value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from secateur.core.axes.adding import adds_to
from secateur.core.axes.atoms import Label
from secateur.core.axes.layout import Extent
from secateur.core.axes.rules import Dims, Step, Unruled, operator, rule

WHY = "positions are chosen by index"


@rule("index _unsafe_index")
def index(step: Step) -> Any:
    """x[i, :, j]: indexed dimensions keep their positions, the others pass through."""
    source, indices = step.dims("self"), list(step["indices"])
    if any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return Unruled("aten.index with a mask")
    used = [i for i, node in enumerate(indices) if node is not None]
    if len(used) == 1 and _constant(step, indices[used[0]]) is not None:
        return _segment(step, source, used[0], _constant(step, indices[used[0]]))
    step.freeze([source[i] for i in used], WHY)
    taken = step.broadcast([step.dims(indices[i]) for i in used])
    rest = [label for i, label in enumerate(source) if i not in used]
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    step.same()
    return (*rest[:at], *taken, *rest[at:])


def _constant(step: Step, node: fx.Node) -> int | None:
    """The value of an index written as a list of one number, [-2]."""
    while node.op == "call_function" and operator(node) in (
        "aten.lift_fresh_copy",
        "aten.detach_",
        "aten.detach",
    ):
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    if node.op != "get_attr" or type(value) is not torch.Tensor or value.device.type == "meta":
        return None
    return int(value) if tuple(value.shape) == (1,) else None


def _segment(step: Step, source: Dims, at: int, value: int | None) -> Dims:
    """x[:, [-2]] is a slice of width 1."""
    size = step.shape_of("self")[at]
    start = (value or 0) % size
    bounds = sorted({start, start + 1} - {0, size})
    pieces = step.cut(source[at], bounds)
    before = pieces[:1] if start else []
    step.same()
    step.retarget(torch.ops.aten.slice.Tensor, step["self"], at, Extent(tuple(before)), Extent((*before, ())))
    return (*source[:at], (), *source[at + 1 :])


@rule("index_put index_put_ _unsafe_index_put")
def index_put(step: Step) -> Any:
    """x[i, :, j] = values."""
    source, indices = step.dims("self"), list(step["indices"])
    used = [i for i, node in enumerate(indices) if node is not None]
    step.freeze([source[i] for i in used], WHY)
    for i in used:
        step.freeze(step.dims(indices[i]), WHY)
    values = step.dims("values")
    if any(indices[i].meta["val"].dtype == torch.bool for i in used):
        step.freeze([*source, *values], WHY)
        return source
    taken = step.broadcast([step.dims(indices[i]) for i in used])
    rest = [label for i, label in enumerate(source) if i not in used]
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    step.broadcast([(*rest[:at], *taken, *rest[at:]), values])
    step.zeros("all", step["self"], step["values"])
    return source


@rule("index_select")
def index_select(step: Step) -> Dims:
    """Chosen positions of one dimension."""
    dims = step.dims("self")
    at = step.axis(step["dim"], len(dims))
    step.freeze([dims[at]], WHY)
    step.same()
    return (*dims[:at], step.dims("index")[0], *dims[at + 1 :])


def _aligned(
    step: Step, source: Dims, index: Dims, at: int, sizes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Dimensions of gather and scatter other than `at` run in parallel where their sizes agree."""
    step.freeze([source[at], index[at]], WHY)
    for i, (a, b) in enumerate(zip(source, index, strict=True)):
        if i == at:
            continue
        if sizes[0][i] == sizes[1][i]:
            if a and b:
                step.unify(a, b)
        else:
            step.freeze([a, b], WHY)


@rule("gather take_along_dim")
def gather(step: Step) -> Any:
    """out[i][j] = x[i][index[i][j]]."""
    picker = "index" if step["index"] is not None else "indices"
    if step["dim"] is None:
        return Unruled("aten.take_along_dim")
    dims, chosen = step.dims("self"), step.dims(picker)
    at = step.axis(step["dim"], len(dims))
    _aligned(step, dims, chosen, at, (step.shape_of("self"), step.shape_of(picker)))
    step.same()
    return chosen


@rule("scatter scatter_ scatter_add scatter_add_ scatter_reduce")
def scatter(step: Step) -> Any:
    """x[i][index[i][j]] = source[i][j]."""
    dims, chosen = step.dims("self"), step.dims("index")
    at = step.axis(step["dim"], len(dims))
    _aligned(step, dims, chosen, at, (step.shape_of("self"), step.shape_of("index")))
    value = step["src"]
    if isinstance(value, fx.Node):
        _aligned(step, dims, step.dims(value), at, (step.shape_of("self"), step.shape_of("src")))
    else:
        value = step["value"]
    step.zeros("all", step["self"], value)
    return dims


@rule("index_copy")
def index_copy(step: Step) -> Dims:
    """Positions of one dimension are replaced; the source may lose those that the index of a tap loses.

    Where the source is what was read at these positions plus something, masked positions of it hold what they
    replace, as a block of a residual stream adds nothing to them; where not, they may not go.
    """
    dims, chosen = step.dims("self"), step.dims("index")
    source: tuple[Label, ...] = step.dims("source")
    at = step.axis(step["dim"], len(dims))
    if step.axes.frozen(chosen[0]):
        return index_add(step)
    step.freeze([dims[at]], WHY)
    if not adds_to(step["source"], _read_at(step)):
        step.freeze(
            [chosen[0], source[at]], "does not add to what was read, so that its result cannot be left out"
        )
    step.unify(chosen[0], source[at])
    step.broadcast([(*dims[:at], (), *dims[at + 1 :]), (*source[:at], (), *source[at + 1 :])])
    step.zeros("all", step["self"], step["source"])
    return dims


def _read_at(step: Step) -> set[fx.Node]:
    """Where the positions that are written are read of the same tensor."""
    where = str(step["index"].target)
    return {
        user
        for user in step["self"].users
        if operator(user) == "aten.index_select" and str(user.args[2].target) == where
    }


@rule("index_add index_add_ index_copy_")
def index_add(step: Step) -> Dims:
    """Rows of one dimension receive rows of another tensor."""
    dims = step.dims("self")
    at = step.axis(step["dim"], len(dims))
    source: tuple[Label, ...] = step.dims("source")
    step.freeze([dims[at], *step.dims("index"), source[at]], WHY)
    step.broadcast([(*dims[:at], (), *dims[at + 1 :]), (*source[:at], (), *source[at + 1 :])])
    step.zeros("all", step["self"], step["source"])
    return dims
