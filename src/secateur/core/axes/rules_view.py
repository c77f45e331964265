"""Rules of operators that look at the same numbers in another shape, cut them or put them together."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from secateur.core.axes.atoms import Label
from secateur.core.axes.layout import Extent
from secateur.core.axes.rules import Dims, Step, Unruled, label_size, rule, sizes_of

aten = torch.ops.aten


@rule("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias ravel")
def view(step: Step) -> Any:
    """Row-major in other sizes: products open and close."""
    if "view.dtype" in str(step.node.target):
        return Unruled("aten.view.dtype")
    flat: Label = tuple(atom for label in step.dims("self") for atom in label)
    dims = tuple(step.regroup(flat, step.shape))
    step.same()
    step.record.alias = step["self"]
    name = str(step.node.target).split(".")[1]
    if name == "unflatten":
        at = step.axis(step["dim"], len(step.dims("self")))
        step.rewrite(sizes=[Extent((label,)) for label in dims[at : at + len(step["sizes"])]])
    elif name not in ("flatten", "ravel", "view_as", "reshape_as"):
        given = step["size"] if step["size"] is not None else step["shape"]
        step.retarget(aten.reshape.default, step["self"], step.sizes(dims, given))
    return dims


@rule("transpose permute t numpy_T mT movedim swapaxes swapdims adjoint transpose_ t_ moveaxis")
def permute(step: Step) -> Any:
    """Dimensions in another order; the order is read off a small tensor, so every spelling is covered."""
    source = step.dims("self")
    ndim = len(source)
    probe = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    rest = [v for k, v in step.args.items() if k != "self"]
    moved = step.node.target(probe, *rest)  # type: ignore[operator]
    step.same()
    step.record.alias = step["self"]
    return tuple(source[size - 2] for size in moved.shape)


@rule("unsqueeze unsqueeze_")
def unsqueeze(step: Step) -> Dims:
    """One more dimension of size 1."""
    dims = list(step.dims("self"))
    dims.insert(step.axis(step["dim"], len(dims) + 1), ())
    step.same()
    step.record.alias = step["self"]
    return tuple(dims)


@rule("squeeze squeeze_")
def squeeze(step: Step) -> Dims:
    """Without dimensions of size 1; a pruned dimension that became 1 stays."""
    source = step.dims("self")
    dim = step["dim"]
    chosen = range(len(source)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {step.axis(d, len(source)) for d in chosen}
    dims = tuple(label for i, label in enumerate(source) if i not in gone or label)
    step.same()
    step.record.alias = step["self"]
    step.retarget(aten.squeeze.dims, step["self"], sorted(i for i in gone if not source[i]))
    return dims


def _replace(dims: Dims, at: int, label: Label) -> Dims:
    return (*dims[:at], label, *dims[at + 1 :])


@rule("slice narrow")
def slicing(step: Step) -> Dims:
    """A run of a dimension cuts its axis in up to three segments; a stride is an inner axis."""
    dims = step.dims("self")
    at = step.axis(step["dim"] or 0, len(dims))
    size = step.shape_of("self")[at]
    if any(isinstance(step[name], fx.Node) for name in ("start", "end", "step", "length")):
        step.same()
        step.record.alias = step["self"]
        step.freeze([dims[at]], "cut at a size of the input")
        return _replace(dims, at, step.fresh_frozen([step.shape[at]], "cut at a size of the input")[0])
    start = step["start"] or 0
    if "narrow" in str(step.node.target):
        stop, stride = (start % size) + step["length"], 1
        start %= size
    else:
        stop = size if step["end"] is None else step["end"]
        stride = step["step"] or 1
        start, stop, stride = slice(start, stop, stride).indices(size)
    step.same()
    step.record.alias = step["self"]
    if start == 0 and stop >= size and stride == 1:
        step.rewrite(end=2**62) if "narrow" not in str(step.node.target) else step.rewrite(
            length=Extent((dims[at],))
        )
        return dims
    if start >= stop:  # nothing: as in a rotary embedding of the whole head
        return _replace(dims, at, step.fresh_frozen([0], "empty")[0])
    if stride != 1:
        return _strided(step, dims, at, start, stop, stride)
    bounds = sorted({start, stop} - {0, size})
    pieces = step.cut(dims[at], bounds)
    before = pieces[0] if start else ()
    inside = pieces[1] if start else pieces[0]
    low = Extent((before,)) if start else 0
    if "narrow" in str(step.node.target):
        step.rewrite(start=low, length=Extent((inside,)))
    else:
        step.rewrite(start=low, end=Extent((before, inside) if start else (inside,)))
    return _replace(dims, at, inside)


def _strided(step: Step, dims: Dims, at: int, start: int, stop: int, stride: int) -> Dims:
    """Every `stride`-th position: for a free axis the outer one of a product whose inner one is whole."""
    label, size = dims[at], label_size(dims[at])
    count = step.shape[at]
    if not step.axes.frozen(label) and size % stride == 0 and count == size // stride:
        outer, inner = step.regroup(label, (count, stride))
        step.freeze([inner], "strided slice")
        step.rewrite(end=2**62)
        return _replace(dims, at, outer)
    step.freeze([label], "strided slice")
    return _replace(dims, at, step.fresh_frozen([count], "strided slice")[0])


@rule("select")
def select(step: Step) -> Dims:
    """One position: the axis has to keep its positions."""
    dims = step.dims("self")
    at = step.axis(step["dim"], len(dims))
    step.freeze([dims[at]], "a single position is selected")
    step.same()
    step.record.alias = step["self"]
    return dims[:at] + dims[at + 1 :]


@rule("unbind")
def unbind(step: Step) -> list[Dims]:
    """All positions, one tensor each."""
    dims = step.dims("self")
    at = step.axis(step["dim"] or 0, len(dims))
    step.freeze([dims[at]], "single positions are taken apart")
    step.same()
    step.record.alias = step["self"]
    return [dims[:at] + dims[at + 1 :]] * len(step.value())


@rule("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes")
def split(step: Step) -> Any:
    """Segments of a sum; the program splits by the segments' own widths."""
    dims = step.dims("self")
    at = step.axis(step["dim"] or 0, len(dims))
    sizes = [sizes_of(value)[at] for value in step.value()]
    if 0 in sizes:
        return Unruled(f"{step.node.target} into empty parts")
    bounds = [sum(sizes[:i]) for i in range(1, len(sizes))]
    pieces = step.cut(dims[at], bounds)
    step.same()
    step.record.alias = step["self"]
    widths = [Extent((piece,)) for piece in pieces]
    step.retarget(aten.split_with_sizes.default, step["self"], widths, at)
    return [_replace(dims, at, piece) for piece in pieces]


@rule("cat concat concatenate")
def cat(step: Step) -> Dims:
    """One after the other: a sum."""
    nodes = list(step["tensors"])
    at = step.axis(step["dim"] or 0, len(step.shape))
    many = [step.dims(node) for node in nodes]
    full = [dims for dims in many if all(label_size(label) for label in dims)] or many[:1]
    dims = step.broadcast([_replace(dims, at, ()) for dims in full])
    step.zeros("pieces", *nodes)
    return _replace(dims, at, step.axes.join([dims[at] for dims in full]))


@rule("stack")
def stack(step: Step) -> Dims:
    """A new dimension of positions."""
    nodes = list(step["tensors"])
    dims = step.broadcast([step.dims(node) for node in nodes])
    at = step.axis(step["dim"] or 0, len(dims) + 1)
    new = step.fresh_frozen([len(nodes)], "tensors are stacked")[0]
    step.zeros("all", *nodes)
    return (*dims[:at], new, *dims[at:])


@rule("flip roll rot90")
def moved(step: Step) -> Any:
    """Positions change places."""
    dims = step.dims("self")
    chosen = step["dims"]
    if "rot90" in str(step.node.target):
        return Unruled("aten.rot90")
    touched = [dims[step.axis(d, len(dims))] for d in chosen] if chosen else list(dims)
    step.freeze(touched, "positions change places")
    step.same()
    return dims


@rule("pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d")
def pad(step: Step) -> Dims:
    """A dimension grows by constants on either side, whose numbers may follow the widths."""
    dims = list(step.dims("self"))
    shape, widths = step.shape, list(step["pad"] if step["pad"] is not None else step["padding"])
    constant = (step.args.get("mode") or "constant") == "constant" and "_pad1" not in str(step.node.target)
    constant = constant and "_pad2" not in str(step.node.target)
    value, amounts = step.args.get("value") or 0, list(widths)
    for i in range(len(widths) // 2):
        low, high = widths[2 * i], widths[2 * i + 1]
        at = len(dims) - 1 - i
        if not (low or high):
            continue
        if not constant or not all(isinstance(width, int) and width >= 0 for width in (low, high)):
            step.freeze([dims[at]], "padded")
            dims[at] = step.fresh_frozen([shape[at]], "padded")[0]
            continue
        before, after = step.axes.label(low), step.axes.label(high)
        pieces = ([before] if low else []) + [dims[at]] + ([after] if high else [])
        dims[at] = step.axes.join(pieces)
        for place, label in ((2 * i, before if low else None), (2 * i + 1, after if high else None)):
            if label:
                amounts[place] = Extent((label,))
                step.record.made.append(label)
    step.rewrite(**{"pad": amounts} if step["pad"] is not None else {})
    if value == 0:
        step.zeros("pieces", step["self"])
    return tuple(dims)


@rule("pixel_shuffle")
def pixel_shuffle(step: Step) -> Dims:
    """C·r·r channels become C channels and r times larger maps."""
    dims, r = step.dims("self"), step["upscale_factor"]
    channels = step.shape[-3]
    outer, *inner = step.regroup(dims[-3], (channels, r, r))
    step.freeze([*inner, *dims[-2:]], "channels become pixels")
    step.same()
    return (*dims[:-3], outer, *step.fresh_frozen(step.shape[-2:], "pixels"))


@rule("pixel_unshuffle")
def pixel_unshuffle(step: Step) -> Dims:
    """Pixels become channels."""
    dims, r = step.dims("self"), step["downscale_factor"]
    step.freeze(dims[-2:], "pixels become channels")
    inner = step.fresh_frozen([r, r], "pixels become channels")
    step.same()
    return (*dims[:-3], dims[-3] + inner[0] + inner[1], *step.fresh_frozen(step.shape[-2:], "pixels"))


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(step: Step) -> Dims:
    """(groups, c) becomes (c, groups)."""
    dims, groups = step.dims("self"), step["groups"]
    a, b = step.regroup(dims[1], (groups, step.shape[1] // groups))
    step.same()
    step.rewrite(groups=Extent((a,)))
    return (dims[0], b + a, *dims[2:])


@rule("view_as_complex")
def view_as_complex(step: Step) -> Dims:
    """Pairs become numbers."""
    dims = step.dims("self")
    step.freeze(dims[-1:], "real and imaginary part")
    step.same()
    return dims[:-1]


@rule("view_as_real")
def view_as_real(step: Step) -> Dims:
    """Numbers become pairs."""
    step.same()
    return (*step.dims("self"), *step.fresh_frozen([2], "real and imaginary part"))


@rule("diagonal unfold as_strided")
def positions(step: Step) -> Any:
    """Windows and diagonals are about positions of the dimensions they name."""
    name = str(step.node.target)
    if "unfold" not in name:
        return Unruled(name)
    dims = step.dims("self")
    at = step.axis(step["dimension"], len(dims))
    step.freeze([dims[at]], "windows of positions")
    new = step.fresh_frozen([step.shape[at], step["size"]], "windows of positions")
    step.same()
    return (*_replace(dims, at, new[0]), new[1])
