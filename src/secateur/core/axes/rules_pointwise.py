"""Rules of operators that work element by element, copy, cast, or make constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from secateur.core.axes.layout import Extent
from secateur.core.axes.rules import Dims, Step, label_size, rule

# f(0) = 0, so a result is zero where its input is
ZERO_KEEPING = {
    "abs", "asinh", "atan", "bitwise_and", "ceil", "clone", "elu", "erf", "expm1", "floor", "frac", "gelu",
    "hardshrink", "hardswish", "hardtanh", "leaky_relu", "log1p", "mish", "nan_to_num", "neg", "prelu", "relu",
    "relu6", "round", "rrelu", "selu", "sgn", "sign", "silu", "sin", "sinh", "softshrink", "softsign", "sqrt",
    "square", "tan", "tanh", "trunc",
}  # fmt: skip
LINEAR = {
    "add",
    "sub",
    "rsub",
    "maximum",
    "minimum",
    "where",
    "lerp",
    "min",
    "max",
}  # zero where all operands are
PRODUCT = {"mul", "multiply", "logical_and", "__and__"}  # zero where one operand is


def _value(x: Any) -> Any:
    """A Python number, or None for anything else."""
    return x if isinstance(x, (int, float, bool)) else None


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)


@rule(
    "pointwise __and__ __or__ __xor__ floor_divide floor_divide_ where min max masked_fill masked_fill_ "
    "rsub prelu lerp bitwise_not logical_not selu celu relu6 multiply subtract divide true_divide square "
    "clip"
)
def pointwise(step: Step) -> Dims | Any:
    """Element by element with broadcasting: axes that meet are one."""
    tensors = step.tensors()
    name = str(step.node.target).split(".")[1].rstrip("_") if "aten" in str(step.node.target) else ""
    if name in ("min", "max") and (len(tensors) != 2 or not isinstance(step.value(), torch.Tensor)):
        from secateur.core.axes.rules_reduce import reduction

        return reduction(step)
    if name == "prelu":
        return _prelu(step)
    tables = [node for node in tensors if node in step.trace.shared]
    own = [node for node in tensors if node not in tables]
    if own and tables and step.node not in step.trace.shared:
        dims = step.read_tables(tables, step.broadcast([step.dims(node) for node in own]))
    else:
        dims = step.broadcast([step.dims(node) for node in tensors])
    _zeros_of_pointwise(step, name)
    return dims


def _zeros_of_pointwise(step: Step, name: str) -> None:
    operands = [v for v in step.args.values() if _is_tensor(v) or _value(v) is not None]
    tensors = [v for v in operands if _is_tensor(v)]
    first = operands[0] if operands else None
    if name in PRODUCT:
        step.zeros("any", *tensors)
    elif name in ("add", "sub", "rsub", "subtract") and len(operands) >= 2:
        step.zeros("all", *operands[:2])
    elif name == "where":
        step.zeros("all", *operands[1:3])
    elif name in ("maximum", "minimum", "min", "max", "lerp"):
        step.zeros("all", *operands[:2])
    elif name == "masked_fill":
        step.zeros("all", first, step["value"])
    elif name in ("div", "divide", "true_divide", "floor_divide") and _is_tensor(first):
        step.zeros("quotient", first, operands[1])
    elif name == "pow" and _is_tensor(first) and (_value(step["exponent"]) or 0) > 0:
        step.zeros("any", first)
    elif name in ("clamp", "clip"):
        low, high = step["min"], step["max"]
        inside = (low is None or (_value(low) is not None and low <= 0)) and (
            high is None or (_value(high) is not None and high >= 0)
        )
        step.zeros("any", first) if inside else step.zeros("none")
    elif name == "hardtanh":
        keeps = step["min_val"] <= 0 <= step["max_val"]
        step.zeros("any", first) if keeps else step.zeros("none")
    elif name in ZERO_KEEPING and len(tensors) == 1:
        step.zeros("any", first)


def _prelu(step: Step) -> Dims:
    dims = step.dims("self")
    weight = step.dims("weight")
    if weight and weight[0] and len(dims) > 1:
        step.unify(dims[1], weight[0])
    step.same()
    return dims


@rule(
    "alias detach detach_ contiguous clone to _to_copy lift_fresh_copy lift_fresh type_as dropout dropout_ "
    "alpha_dropout feature_dropout positive real imag conj _conj conj_physical "
    "prims.convert_element_type resolve_conj resolve_neg"
)
def identity(step: Step) -> Dims:
    """A copy, a cast or another name of the same tensor."""
    source = step.tensors()[0]
    step.zeros("any", source)
    step.record.alias = source
    return step.dims(source)


@rule("_assert_tensor_metadata _assert_async _assert_scalar sym_size sym_numel")
def nothing(step: Step) -> None:
    """No tensor comes out."""
    return None


@rule("copy_")
def copy(step: Step) -> Dims:
    """Overwrite a tensor in place with another."""
    dims = step.dims("self")
    step.broadcast([dims, step.dims("src")])
    step.zeros("all", step["src"])
    return dims


@rule("fill_ zero_")
def fill(step: Step) -> Dims:
    """Overwrite with one number."""
    if step.args.get("value", 0) == 0:
        step.zeros("constant")
    return step.dims("self")


def _created(step: Step, sizes_name: str | None, value: Any) -> Dims:
    dims = step.fresh()
    if sizes_name is not None:
        step.rewrite(**{sizes_name: step.sizes(dims, step[sizes_name])})
    if value == 0:
        step.zeros("constant")
    return dims


@rule("zeros new_zeros")
def zeros(step: Step) -> Dims:
    """A constant of zeros: its axes are whatever they meet."""
    return _created(step, "size", 0)


@rule("ones new_ones empty new_empty rand randn empty_permuted")
def ones(step: Step) -> Dims:
    """A constant without structure."""
    return _created(step, "size", 1)


@rule("full new_full")
def full(step: Step) -> Dims:
    """A constant of one value."""
    return _created(step, "size", _value(step["fill_value"]))


@rule("zeros_like ones_like empty_like full_like rand_like randn_like")
def like(step: Step) -> Dims:
    """A constant of another tensor's shape."""
    name = str(step.node.target)
    value = 0 if "zeros_like" in name else _value(step["fill_value"]) if "full_like" in name else 1
    if value == 0:
        step.zeros("constant")
    return step.dims("self")


@rule("arange linspace eye scalar_tensor tril_indices triu_indices")
def numbered(step: Step) -> Dims:
    """A constant that differs from position to position: the pruned program selects the kept ones."""
    step.record.gathered = True
    return step.fresh()


@rule("tril triu tril_ triu_")
def triangle(step: Step) -> Dims:
    """Zero above or below the diagonal: rows and columns are positions."""
    dims = step.dims("self")
    step.freeze(dims[-2:], "a triangle of positions")
    step.same()
    return dims


@rule("getitem")
def getitem(step: Step) -> Dims | None:
    """One of several results."""
    source: Any = step.node.args[0]
    index = step.node.args[1]
    many = step.trace.dims.get(source)
    step.zeros("any", source)
    step.record.alias = source
    return many[index] if isinstance(many, Sequence) and isinstance(index, int) else None


@rule("expand broadcast_to expand_as")
def expand(step: Step) -> Dims:
    """Repeat a dimension of size 1: a new axis, whatever it meets."""
    source, shape = step.dims("self"), step.shape
    ndim = len(shape)
    dims = list(step.fresh())
    for i, label in enumerate(source, ndim - len(source)):
        if label:
            dims[i] = label
    step.same()
    step.record.alias = step["self"]
    if "expand_as" not in str(step.node.target):
        step.rewrite(size=step.sizes(tuple(dims), step["size"], open_sizes=len(dims)))
    return tuple(dims)


@rule("repeat tile")
def repeat(step: Step) -> Dims:
    """Copies one after the other: outer axis of a product."""
    source = step.dims("self")
    counts = list(step["repeats"] if step["repeats"] is not None else step["dims"])
    counts = [1] * (len(step.shape) - len(counts)) + counts
    source = ((),) * (len(step.shape) - len(source)) + tuple(source)
    runs = []
    for count, label, size in zip(counts, source, step.shape, strict=True):
        why = None if isinstance(count, int) else step.reason("repeated as often as a size of the input says")
        runs.append(step.axes.label(size // label_size(label), why))
    step.same()
    name = "repeats" if step["repeats"] is not None else "dims"
    new = [Extent((run,)) if isinstance(c, int) else c for run, c in zip(runs, counts, strict=True)]
    step.rewrite(**{name: new})
    return tuple(run + label for run, label in zip(runs, source, strict=True))


@rule("repeat_interleave")
def repeat_interleave(step: Step) -> Any:
    """Every position several times: inner axis of a product."""
    from secateur.core.axes.rules import Unruled

    if not isinstance(step["repeats"], int) or step["dim"] is None:
        return Unruled("aten.repeat_interleave")
    dims = list(step.dims("self"))
    at = step.axis(step["dim"], len(dims))
    run = step.axes.label(step["repeats"])
    dims[at] = dims[at] + run
    step.rewrite(repeats=Extent((run,)))
    step.same()
    return tuple(dims)
