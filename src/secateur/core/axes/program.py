"""The exported graph run again: with narrower tensors, or whole with masked units and norms over survivors.

Both are ordinary `fx.GraphModule`s with the model's own parameter names, called like the model. The narrow one
is what a pruned model computes; the masked one is what it has to equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.core.axes.layout import Extent, Kept, extent, positions
from secateur.core.axes.step import Record, Trace, arguments, operator
from secateur.core.axes.trace import attribute

__all__ = ["masked_module", "narrow_module", "narrow_tensor"]

Transform = Callable[[Tensor, list[Tensor | None]], Tensor]


def narrow_tensor(value: Tensor, kept: list[Tensor | None]) -> Tensor:
    """The tensor with only the kept positions of each dimension; itself where all stay."""
    for dim, index in enumerate(kept):
        if index is not None:
            value = value.index_select(dim, index.to(value.device))
    return value


def _masked_tensor(value: Tensor, kept: list[Tensor | None]) -> Tensor:
    """The tensor with zeros outside the kept positions."""
    for dim, index in enumerate(kept):
        if index is not None:
            alive = torch.zeros(value.shape[dim], dtype=torch.bool, device=value.device)
            alive[index.to(value.device)] = True
            shape = [-1 if i == dim else 1 for i in range(value.dim())]
            value = torch.where(
                alive.view(shape), value, torch.zeros((), dtype=value.dtype, device=value.device)
            )
    return value


def narrow_module(module: fx.GraphModule, trace: Trace, kept: Kept) -> fx.GraphModule:
    """The graph with sliced tensors and recomputed shapes.

    Cost: a copy of the sliced tensors; the others are shared.
    """
    return _rebuild(module, trace, kept, narrow_tensor, _narrow_node, buffers=True)


def masked_module(module: fx.GraphModule, trace: Trace, kept: Kept, *, lazy: bool = False) -> fx.GraphModule:
    """The graph with zeros in the parameters of removed units, and norms and means over the survivors.

    With `lazy` the graph holds the model's own tensors and lays the masks on them while it runs.
    """
    if lazy:
        return _rebuild(module, trace, kept, lambda value, _: value, _masked_node, buffers=False, lazy=True)
    return _rebuild(module, trace, kept, _masked_tensor, _masked_node, buffers=False)


def masked_at_run(value: Tensor, *kept: Tensor | None) -> Tensor:
    """A parameter with zeros where a dimension's positions are not kept, made when the graph runs."""
    for dim, alive in enumerate(kept):
        if alive is not None:
            shape = [-1 if i == dim else 1 for i in range(value.dim())]
            zero = torch.zeros((), dtype=value.dtype, device=value.device)
            value = torch.where(alive.to(value.device).view(shape), value, zero)
    return value


def _rebuild(
    module: fx.GraphModule,
    trace: Trace,
    kept: Kept,
    transform: Transform,
    edit: Any,
    *,
    buffers: bool,
    lazy: bool = False,
) -> fx.GraphModule:
    graph = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    done: dict[Any, Any] = {}
    pending: dict[fx.Node, list[str | None]] = {}  # parameters to mask where they are used, by the masks' names
    attributes: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and operator(node) == "aten._assert_tensor_metadata":
            continue
        for source, alive in ((n, pending[n]) for n in node.all_input_nodes if n in pending):
            given = (attributes[source], *(name and graph.get_attr(name) for name in alive))
            moved[source] = graph.call_function(
                masked_at_run, given
            )  # at each use, so that none is held for long
        new = moved[node] = graph.node_copy(node, moved.__getitem__)
        if node.op == "get_attr":
            value = root[str(node.target)] = _tensor(module, node, trace, kept, transform, done, buffers)
            attributes[node] = new
            if lazy and isinstance(value, nn.Parameter) and node in trace.dims:
                alive = _alive(node, trace, kept, root)
                pending |= {node: alive} if any(alive) else {}
        elif node.op == "call_function" and node in trace.records:
            moved[node] = edit(graph, node, new, trace, kept, moved)
    graph._codegen = copy(module.graph._codegen)
    out = fx.GraphModule(root, graph)
    for name, value in root.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            _register(out, name, value)
    return out.eval()


def _register(module: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    if last not in module._buffers:
        delattr(module, last)
        module.register_buffer(last, value)


def _tensor(
    module: fx.GraphModule, node: fx.Node, trace: Trace, kept: Kept, transform: Transform, done: dict[Any, Any],
    buffers: bool,
) -> Any:  # fmt: skip
    value = attribute(module, str(node.target))
    dims = trace.dims.get(node)
    if not isinstance(value, Tensor) or dims is None:
        return value
    if not buffers and not isinstance(value, nn.Parameter):
        return value
    if id(value) not in done:
        index = [positions(trace.axes, label, kept) for label in dims]
        new = transform(value.detach(), index) if any(i is not None for i in index) else value
        if isinstance(value, nn.Parameter) and new is not value:
            new = nn.Parameter(new, requires_grad=value.requires_grad)
        done[id(value)] = new
    return done[id(value)]


def _alive(node: fx.Node, trace: Trace, kept: Kept, root: dict[str, Any]) -> list[str | None]:
    """For each dimension the attribute that tells which positions stay; None where all do."""
    out: list[str | None] = []
    for size, label in zip(node.meta["val"].shape, trace.dims[node], strict=True):
        index = positions(trace.axes, label, kept)
        out.append(None)
        if index is not None:
            mask = torch.zeros(size, dtype=torch.bool)
            mask[index] = True
            name = f"_kept_{len(root)}"
            out[-1], root[name] = name, mask
    return out


def _evaluate(value: Any, trace: Trace, kept: Kept) -> Any:
    if isinstance(value, Extent):
        return sum(extent(trace.axes, label, kept) for label in value.labels) + value.plus
    if isinstance(value, (list, tuple)):
        return [_evaluate(v, trace, kept) for v in value]
    return value


def _touched(value: Any, trace: Trace, kept: Kept) -> bool | None:
    """Whether an argument's extents lose something; None for a value without extents."""
    if isinstance(value, Extent):
        return any(leaf in kept for label in value.labels for leaf in trace.axes.leaves(label))
    if isinstance(value, (list, tuple)):
        found = [state for state in (_touched(v, trace, kept) for v in value) if state is not None]
        return any(found) if found else None
    return None


def _with_arguments(new: fx.Node, changed: Mapping[str, Any]) -> None:
    """Set arguments of an ATen node by their schema names."""
    names = [argument.name for argument in new.target._schema.arguments]  # type: ignore[union-attr]
    args, kwargs = list(new.args), dict(new.kwargs)
    for name, value in changed.items():
        at = names.index(name)
        if at < len(args):
            args[at] = value
        else:
            kwargs[name] = value
    new.args, new.kwargs = tuple(args), kwargs


def _narrow_node(
    graph: fx.Graph, node: fx.Node, new: fx.Node, trace: Trace, kept: Kept, moved: dict[fx.Node, fx.Node]
) -> fx.Node:
    record: Record = trace.records[node]
    states = {name: _touched(value, trace, kept) for name, value in record.rewritten.items()}
    changed = {
        name: fx.node.map_arg(_evaluate(value, trace, kept), moved.__getitem__)
        for name, value in record.rewritten.items()
        if states[name] is not False
    }
    if record.target is not None:
        if True in states.values() or False not in states.values():
            all_of = (_evaluate(value, trace, kept) for value in record.rewritten.values())
            new.target, new.kwargs = record.target, {}
            new.args = tuple(fx.node.map_arg(value, moved.__getitem__) for value in all_of)
    elif changed:
        _with_arguments(new, changed)
    for table, dim, label in record.reads:
        index = positions(trace.axes, label, kept)
        if index is not None:
            with graph.inserting_before(new):
                part = (moved[table], dim, _constant(graph, index, moved[table]))
                read = graph.call_function(torch.ops.aten.index_select.default, part)
            new.replace_input_with(moved[table], read)
            moved = moved | {table: read}
    if not record.gathered:
        return new
    for dim, label in enumerate(trace.dims[node]):
        index = positions(trace.axes, label, kept)
        if index is not None:
            part = (new, dim, _constant(graph, index, new))
            new = graph.call_function(torch.ops.aten.index_select.default, part)
    return new


def _constant(graph: fx.Graph, index: Tensor, like: fx.Node) -> fx.Node:
    return graph.call_function(index_like, (index.tolist(), like))


def index_like(index: list[int], like: Tensor) -> Tensor:
    """The positions as a tensor on the device of another."""
    return torch.tensor(index, device=like.device)


def _masked_node(
    graph: fx.Graph, node: fx.Node, new: fx.Node, trace: Trace, kept: Kept, moved: dict[fx.Node, fx.Node]
) -> fx.Node:
    record: Record = trace.records[node]
    if not record.survivors:
        return new
    source = next(v for v in arguments(node).values() if isinstance(v, fx.Node))
    dims = trace.dims[source]
    index = [positions(trace.axes, label, kept) for label in dims]
    over = {id(atom) for label, _ in record.survivors for atom in trace.axes.leaves(label) if atom in kept}
    touched = {
        i: p.tolist()
        for i, (label, p) in enumerate(zip(dims, index, strict=True))
        if p is not None and over & {id(leaf) for leaf in trace.axes.leaves(label)}
    }
    if not touched:
        return new
    groups = _evaluate(record.rewritten.get("num_groups"), trace, kept)
    given: Any = (new.target, touched, groups, new.args, dict(new.kwargs))
    call = graph.call_function(over_survivors, given)
    graph.erase_node(new)
    return call


def over_survivors(
    target: Any,
    touched: dict[int, list[int]],
    groups: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A norm or mean of the kept positions only; the others of a result of the same shape are zero."""
    source = args[0]
    rest, options, chosen = list(args[1:]), dict(kwargs), source
    index = {dim: torch.tensor(kept, device=source.device) for dim, kept in touched.items()}
    for dim, kept in index.items():
        chosen = chosen.index_select(dim, kept)
    if "layer_norm" in str(target) or "rms_norm" in str(target):
        trailing = len(rest[0])
        first = source.dim() - trailing
        rest[0] = list(chosen.shape[first:])
        for at in range(1, min(3, len(rest))):
            for dim, kept in index.items():
                if isinstance(rest[at], Tensor) and dim >= first:
                    rest[at] = rest[at].index_select(dim - first, kept)
    elif "group_norm" in str(target):
        rest[0] = groups
        for at in (1, 2):
            if at < len(rest) and rest[at] is not None and 1 in index:
                rest[at] = rest[at].index_select(0, index[1])
    result = target(chosen, *rest, **options)
    if not isinstance(result, Tensor) or result.dim() != source.dim() or result.shape != chosen.shape:
        return result
    out = result.new_zeros(source.shape)
    grid = [index.get(d, torch.arange(n, device=source.device)) for d, n in enumerate(source.shape)]
    return out.index_put(tuple(torch.meshgrid(*grid, indexing="ij")), result)
