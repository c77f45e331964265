"""Rules of norms, reductions, pooling and of operators that order or compare positions."""

from __future__ import annotations

from typing import Any

import torch

from secateur.core.axes.atoms import Label
from secateur.core.axes.layout import Extent
from secateur.core.axes.rules import Dims, Step, Unruled, label_size, rule


def _chosen(step: Step, ndim: int) -> list[int]:
    dim = step["dim"]
    if dim is None or dim == []:
        return list(range(ndim))
    return [step.axis(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)]


@rule(
    "mean sum var std amax amin prod norm any linalg_vector_norm logsumexp all argmax argmin var_mean "
    "median std_mean nansum count_nonzero"
)
def reduction(step: Step) -> Any:
    """Dimensions vanish: sums need zeros there, means and variances are over survivors, the rest freezes."""
    name = str(step.node.target).split(".")[1]
    source = step.dims("self")
    gone = _chosen(step, len(source))
    over = [source[i] for i in gone]
    order = step.args.get("ord", step.args.get("p", 2))
    if name in ("sum", "nansum", "count_nonzero") or (
        name in ("linalg_vector_norm", "norm") and order in (None, 1, 2)
    ):
        for label in over:
            step.contract(label, step["self"])
    elif name in ("mean", "var", "std", "var_mean", "std_mean"):
        step.survivors(over, "mean over it" if name == "mean" else "variance over it")
    else:
        step.freeze(over, f"{name} over it")
    if name not in ("logsumexp", "argmax", "argmin", "all", "any"):
        step.same()
    keep = bool(step.args.get("keepdim"))
    dims: Dims = tuple(() if i in gone else label for i, label in enumerate(source) if i not in gone or keep)
    value = step.value()
    return [dims] * len(value) if isinstance(value, (tuple, list)) else dims


@rule("softmax _softmax log_softmax _log_softmax _safe_softmax cumprod cumsum logcumsumexp cummax softmin")
def along(step: Step) -> Any:
    """Every result depends on all positions along the dimension."""
    dims = step.dims("self")
    name = str(step.node.target).split(".")[1]
    step.freeze([dims[step.axis(step["dim"], len(dims))]] if dims else [], f"{name} over it")
    if "cum" in name:
        step.same()
    return [dims] * 2 if isinstance(step.value(), (tuple, list)) else dims


@rule("glu")
def glu(step: Step) -> Dims:
    """The first half times the sigmoid of the second."""
    dims = list(step.dims("self"))
    at = step.axis(-1 if step["dim"] is None else step["dim"], len(dims))
    half = step.shape[at]
    first, second = step.cut(dims[at], [half])
    dims[at] = step.unify(first, second)
    step.same()
    return tuple(dims)


@rule("sort topk argsort diff kthvalue")
def ordered(step: Step) -> Any:
    """Positions are compared with each other."""
    dims = list(step.dims("self"))
    given = step.args.get("dim")
    at = step.axis(-1 if given is None else given, len(dims))
    name = str(step.node.target).split(".")[1]
    step.freeze([dims[at]], f"{name} over it")
    value = step.value()
    first = value[0] if isinstance(value, (tuple, list)) else value
    if len(first.shape) == len(dims):
        dims[at] = step.fresh_frozen([first.shape[at]], f"{name} over it")[0]
    else:
        del dims[at]
    if name == "diff":
        step.same()
    return [tuple(dims)] * len(value) if isinstance(value, (tuple, list)) else tuple(dims)


def _affine(step: Step, labels: tuple[Label, ...]) -> bool:
    """Unify a norm's weight and bias with the labels; whether the result is zero with them."""
    given = [step[name] for name in ("weight", "bias") if step[name] is not None]
    for node in given:
        for label, mine in zip(labels, step.dims(node), strict=True):
            step.unify(label, mine)
    return step["weight"] is not None


@rule("layer_norm rms_norm")
def layer_norm(step: Step) -> Dims:
    """Centre and scale over the last dimensions."""
    dims = step.dims("input")
    over = dims[len(dims) - len(step["normalized_shape"]) :]
    _affine(step, over)
    root = "rms" in str(step.node.target)
    step.survivors(over, "root mean square over it" if root else "mean and variance over it")
    step.rewrite(normalized_shape=[Extent((label,)) for label in over])
    # zero where weight and bias are; where only the input is, the bias comes through
    step.zeros("affine", step["input"], step["weight"], step["bias"])
    return dims


@rule("native_layer_norm")
def native(step: Step) -> Any:
    """Only met after decomposition, which is not asked for."""
    return Unruled("aten.native_layer_norm")


@rule("batch_norm instance_norm")
def batch_norm(step: Step) -> Dims:
    """Per channel: exact."""
    dims = step.dims("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if step[name] is not None:
            step.unify(dims[1], step.dims(name)[0])
    if step["weight"] is not None:
        step.zeros("affine", None, step["weight"], step["bias"])
    return dims


@rule("group_norm")
def group_norm(step: Step) -> Dims:
    """Statistics over each group's channels: whole groups are exact, channels within are not."""
    dims = step.dims("input")
    groups = int(step["num_groups"])
    channels = step.shape[1]
    outer, inner = step.regroup(dims[1], (groups, channels // groups))
    for name in ("weight", "bias"):
        if step[name] is not None:
            step.unify(dims[1], step.dims(name)[0])
    step.survivors([inner], "mean and variance over it")
    step.rewrite(num_groups=Extent((outer,)))
    step.zeros("affine", None, step["weight"], step["bias"])
    return dims


@rule("_weight_norm _weight_norm_interface")
def weight_norm(step: Step) -> Any:
    """v·g/‖v‖ over all dimensions but one: exact over the others; a masked slice of that one is 0/0."""
    if isinstance(step.value(), (tuple, list)):
        return Unruled("aten._weight_norm_interface")
    v, g = step.dims("v"), step.dims("g")
    for a, b in zip(v, g, strict=True):
        if a and b:
            step.unify(a, b)
    why = "a masked slice has no direction: bake the weight norm in before pruning"
    step.freeze(g, why)
    for a, b in zip(v, g, strict=True):
        if not b:
            step.contract(a, step["v"])
    step.zeros("any", step["v"], step["g"])
    return v


def _spatial(step: Step, count: int) -> Any:
    source = step.tensors()[0]
    dims = step.dims(source)
    lead = len(dims) - count
    step.freeze(dims[lead:], "positions of a map")
    step.zeros("any", source)
    value = step.value()
    if isinstance(value, (tuple, list)):
        return [dims[:lead] + step.fresh_frozen(v.shape[lead:], "positions of a map") for v in value]
    return dims[:lead] + step.fresh_frozen(value.shape[lead:], "positions of a map")


POOLS = (
    "max_pool{0}d max_pool{0}d_with_indices avg_pool{0}d adaptive_avg_pool{0}d _adaptive_avg_pool{0}d "
    "adaptive_max_pool{0}d lp_pool{0}d upsample_nearest{0}d upsample_nearest_exact{0}d "
    "_upsample_nearest_exact{0}d upsample_linear{0}d upsample_bilinear{0}d upsample_trilinear{0}d "
    "upsample_bicubic{0}d _upsample_bilinear{0}d_aa _upsample_bicubic{0}d_aa "
)


@rule("".join(POOLS.format(n) for n in (1, 2, 3)))
def pool(step: Step) -> Any:
    """Windows over maps: channels are untouched."""
    name = str(step.node.target).split(".")[1]
    return _spatial(step, int(next(c for c in name if c.isdigit())))


@rule("im2col")
def im2col(step: Step) -> Dims:
    """Windows of maps become channels: an inner axis of positions."""
    dims = step.dims("self")
    lead = len(dims) - 3
    step.freeze(dims[lead + 1 :], "positions of a map")
    window = step.shape[lead] // label_size(dims[lead])
    inner = step.axes.label(window, step.reason("positions of a window"))
    step.same()
    return (*dims[:lead], dims[lead] + inner, *step.fresh_frozen(step.shape[lead + 1 :], "windows"))


@rule("item _local_scalar_dense")
def item(step: Step) -> None:
    """A number is read from a tensor."""
    for node in step.tensors():
        step.freeze(step.dims(node), "a value of it is read")


@rule("grid_sampler grid_sampler_2d")
def grid_sample(step: Step) -> Any:
    """Positions computed from a grid."""
    step.freeze(step.dims("grid"), "sampled positions")
    dims = step.dims("input")
    step.freeze(dims[2:], "sampled positions")
    step.same("input")
    return dims[:2] + step.fresh_frozen(step.shape[2:], "sampled positions")


@rule("bincount histc nonzero masked_select unique one_hot searchsorted bucketize")
def counted(step: Step) -> Any:
    """Values decide about positions: everything stays whole."""
    for node in step.tensors():
        step.freeze(step.dims(node), f"{str(step.node.target).split('.')[1]} over it")
    value = step.value()
    if not isinstance(value, torch.Tensor):
        return Unruled(str(step.node.target))
    return step.fresh_frozen(value.shape, "counted")
