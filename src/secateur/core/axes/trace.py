"""From a model and an example to a labelled graph: torch.export, non-strict, before decomposition."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateur.core.axes import rules_contract, rules_index, rules_pointwise, rules_reduce, rules_view
from secateur.core.axes.atoms import Reason
from secateur.core.axes.rules import visit
from secateur.core.axes.step import Trace, sizes_of
from secateur.core.axes.tables import shared_tables
from secateur.core.misfit import run
from secateur.core.quiet import quiet
from secateur.core.taps import selections
from secateur.errors import UsageError

__all__ = ["attribute", "evaluating", "export", "label_graph", "tied"]

_ = (rules_contract, rules_index, rules_pointwise, rules_reduce, rules_view)  # importing registers the rules


@contextmanager
def evaluating(model: nn.Module):
    """Every submodule in eval mode, and back to its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    output: str | Callable[[Any], Any] | None = None,
    dynamic: bool = False,
) -> fx.GraphModule:
    """The model's computation on the example as a graph over ATen operators; no number is computed.

    With `dynamic` every size of the inputs that the model allows to vary may differ from the example's.

    Raises:
        UsageError: a module is quantized, or the model cannot be exported (with the tracer's own words).
        MisfitError: the model cannot be run on the example.
    """
    for path, part in model.named_modules():
        if ".quantized" in type(part).__module__:
            raise UsageError(
                f"{path or 'the model'}: {type(part).__name__} is quantized; its packed weights cannot be sliced. "
                "Prune the float model first, then quantize."
            )
    try:
        with torch.no_grad(), evaluating(model), returning(model, output), quiet(logging.ERROR):
            shapes = _varying(args, kwargs).dynamic_shapes(model, args, dict(kwargs)) if dynamic else None
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
            module: fx.GraphModule = program.module(check_guards=False)
            _inline(module)
    except UsageError:
        raise
    except Exception as error:
        if not any(parameter.is_meta for parameter in model.parameters()):
            with torch.no_grad(), evaluating(model):
                run(model, args, kwargs)  # where the model itself refuses the example, that is what to say
        words = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise UsageError(
            f"{type(model).__name__}: torch.export cannot trace the forward with this example: {words}. "
            "Expected no control flow that depends on tensor values, and outputs that are tensors. "
            'For a transformer pass use_cache=False and an attention_mask, or output="logits"; '
            "otherwise analyse its submodules with analyse_blocks."
        ) from error
    module.graph.eliminate_dead_code()  # a tensor made only for its shape ties nothing
    return module


def _varying(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.export.ShapesCollection:
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            shapes[leaf] = dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO)
    return shapes


def _inline(module: fx.GraphModule) -> None:
    """Open regions under no_grad and switched-off autocast: they change nothing that is computed here."""
    for node in list(module.graph.nodes):
        name = str(getattr(node.target, "__name__", node.target))
        if name == "wrap_with_set_grad_enabled":
            body, inputs = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, inputs = node.args[4], node.args[5:]
        else:
            continue
        region = attribute(module, str(body.target))
        holes = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(region.graph, dict(zip(holes, inputs, strict=True)))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _pick(whole: Any, output: str | Callable[[Any], Any]) -> Any:
    """A key or attribute of an output, or what a function picks; tensors only."""
    if isinstance(output, str):
        try:
            picked = whole[output] if isinstance(whole, Mapping) else getattr(whole, output)
        except (KeyError, AttributeError):
            known = ", ".join(map(str, whole)) if isinstance(whole, Mapping) else type(whole).__name__
            raise UsageError(f"output {output!r} is not in the model's output; it has: {known}.") from None
    else:
        picked = output(whole)
    leaves = pytree.tree_leaves(picked)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        name = repr(output) if isinstance(output, str) else getattr(output, "__name__", repr(output))
        raise UsageError(
            f"{name} finds no tensor in the model's output, a {type(whole).__name__}; say which part counts "
            "(analyse(..., output=...)), or return tensors."
        )
    return picked


@contextmanager
def returning(model: nn.Module, output: str | Callable[[Any], Any] | None) -> Iterator[None]:
    """The model's forward returns only a part of its output, so that caches and the like are never seen."""
    own = model.__dict__.get("forward")
    forward = model.forward

    @functools.wraps(forward)
    def picking(*args: Any, **kwargs: Any) -> Any:
        return _pick(forward(*args, **kwargs), output)  # type: ignore[arg-type]

    if output is not None:
        model.__dict__["forward"] = picking
    try:
        yield
    finally:
        if output is not None:
            del model.__dict__["forward"]
            if own is not None:
                model.__dict__["forward"] = own


def attribute(module: nn.Module, target: str) -> Any:
    """The attribute a get_attr node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter's and buffer's name -> all names of the same tensor, the first one first."""
    groups: dict[Any, list[str]] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in pairs:
        groups.setdefault(_identity(tensor), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def _identity(tensor: torch.Tensor) -> Any:
    try:
        storage = tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())


def label_graph(
    module: fx.GraphModule, model: nn.Module, *, fixed: Iterable[str] = (), decouple: bool = False
) -> tuple[Trace, dict[str, fx.Node]]:
    """Visit every node; the trace, and for each parameter or buffer name the node that holds its labels."""
    trace = Trace()
    ties = tied(model)
    whole = {
        **dict.fromkeys(overlaps(model), "shares a part of its memory with another tensor"),
        **dict.fromkeys((name for tensor in fixed for name in ties.get(tensor, ())), "fixed by the caller"),
    }
    if decouple:
        trace.shared = shared_tables(module.graph)
    chosen = selections(model)
    shared: dict[str, Any] = {}
    holders: dict[str, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attribute(module, str(node.target))
            if isinstance(value, torch.Tensor):
                names = ties.get(str(node.target), (str(node.target),))
                node.meta["val"] = value
                trace.dims[node] = shared.setdefault(
                    names[0], _attribute_dims(trace, node, value, ties, whole, chosen)
                )
                if str(node.target) in ties and (node.users or names[0] not in holders):
                    holders[names[0]] = node
        elif node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                why = Reason("an input of the model", "input", str(node.target))
                trace.dims[node] = tuple(trace.axes.label(size, why) for size in sizes_of(value))
        elif node.op == "call_function":
            visit(trace, node)
        elif node.op == "output":
            for result in pytree.tree_leaves(node.args):
                if isinstance(result, fx.Node):
                    why = Reason("an output of the model", "output", result.name)
                    for label in trace.dims.get(result) or ():
                        trace.axes.freeze(label, why)
    return trace, {name: holders[name] for name in ties if name in holders and holders[name].users}


def overlaps(model: nn.Module) -> set[str]:
    """Names of tensors that share only a part of their memory with another."""
    spans: dict[Any, dict[Any, list[str]]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        identity = _identity(tensor)
        if isinstance(identity, tuple):
            spans.setdefault(identity[0], {}).setdefault(identity, []).append(name)
    out: set[str] = set()
    for views in spans.values():
        reach: list[tuple[int, int, list[str]]] = []
        for (_, offset, shape, stride), names in views.items():
            last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
            reach.append((offset, offset + last, names))
        reach.sort(key=lambda span: span[:2])
        for (_, stop, names), (start, _, others) in itertools.pairwise(reach):
            if start <= stop:
                out.update(names, others)
    return out


def _attribute_dims(
    trace: Trace, node: fx.Node, value: torch.Tensor, ties: dict[str, tuple[str, ...]],
    whole: Mapping[str, str], chosen: set[str],
) -> Any:  # fmt: skip
    why = None
    if str(node.target) in whole:
        why = Reason(whole[str(node.target)], "constant", str(node.target))
    elif not (value.is_floating_point() or value.is_complex() or str(node.target) in chosen):
        why = Reason("a table of positions", "constant", str(node.target))
    elif str(node.target) not in ties:
        why = Reason("a constant made in the forward", "constant", str(node.target))
    return tuple(trace.axes.label(int(size), why) for size in value.shape)
