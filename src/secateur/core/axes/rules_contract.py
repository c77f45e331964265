"""Rules of contractions: matrix products, convolutions, attention, experts, recurrent layers, embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from secateur.core.axes.atoms import Label
from secateur.core.axes.layout import Extent
from secateur.core.axes.rules import Dims, Step, Unruled, label_size, rule


@rule("linear")
def linear(step: Step) -> Dims:
    """x Wᵀ + b: inputs are contracted, outputs are the weight's rows."""
    x, weight = step.dims("input"), step.dims("weight")
    step.unify(x[-1], weight[-1])
    step.contract(x[-1], step["input"], step["weight"])
    out = weight[0] if len(weight) == 2 else None
    if step["bias"] is not None and out is not None:
        step.unify(out, step.dims("bias")[0])
    step.zeros("product", step["bias"], (step["input"], x[:-1]), (step["weight"], weight[:-1]))
    return x[:-1] + ((out,) if out is not None else ())


def _product(step: Step, a: fx.Node, b: fx.Node, bias: Any = None) -> Dims:
    """Batched matrix product with matmul's broadcasting."""
    x, y = step.dims(a), step.dims(b)
    inner = y[-2] if len(y) > 1 else y[0]
    if x[-1] and inner:
        step.unify(x[-1], inner)
    step.contract(x[-1] or inner, a, b)
    batch = (
        step.broadcast([x[:-2], y[:-2]]) if len(x) > 1 and len(y) > 1 else (x[:-2] if len(x) > 2 else y[:-2])
    )
    rows = (x[-2],) if len(x) > 1 else ()
    columns = (y[-1],) if len(y) > 1 else ()
    step.zeros("product", bias, (a, (*x[:-2], *rows)), (b, (*y[:-2], *columns)))
    return (*batch, *rows, *columns)


@rule("matmul mm bmm mv dot vdot")
def matmul(step: Step) -> Dims:
    """Matrix product."""
    names = [name for name in step.args if isinstance(step.args[name], fx.Node)]
    return _product(step, step[names[0]], step[names[1]])


@rule("addmm baddbmm addmv baddbmm_ addmm_")
def addmm(step: Step) -> Dims:
    """A product added to a tensor."""
    names = list(step.args)[1:3]
    dims = _product(step, step[names[0]], step[names[1]], step["self"])
    return step.broadcast([dims, step.dims("self")])


@rule("outer ger")
def outer(step: Step) -> Dims:
    """Every pair."""
    other = step["vec2"]
    step.zeros("any", step["self"], other)
    return (step.dims("self")[0], step.dims(other)[0])


@rule("einsum")
def einsum(step: Step) -> Any:
    """Labels with the same letter are one axis; letters missing on the right are contracted."""
    equation, operands = str(step["equation"]).replace(" ", ""), list(step["tensors"])
    if "." in equation or "->" not in equation:
        return Unruled("aten.einsum")
    left, right = equation.split("->")
    letters: dict[str, Label] = {}
    for word, node in zip(left.split(","), operands, strict=True):
        for letter, label in zip(word, step.dims(node), strict=True):
            known = letters.get(letter)
            letters[letter] = step.unify(known, label) if known and label else known or label
    for letter, label in letters.items():
        if letter not in right:
            holders = [n for word, n in zip(left.split(","), operands, strict=True) if letter in word]
            step.contract(label, *holders)
    step.zeros("none")
    return tuple(letters[letter] for letter in right)


def _channels(step: Step, x: Label, rows: Label, columns: Label, groups: int) -> tuple[Label, Label]:
    """Couple channels with a weight of `groups` groups; (groups label, output channels).

    `rows` is the weight's dimension of groups × inside, `columns` the one of a single group.
    """
    if groups == 1:
        return (), rows
    inside = label_size(x) // groups
    outer, part = step.regroup(x, (groups, inside))
    runs, rest = step.regroup(rows, (groups, label_size(rows) // groups))
    step.unify(outer, runs)
    if part and columns:
        step.unify(part, columns)
    return outer, outer + rest


@rule("conv1d conv2d conv3d convolution _convolution")
def conv(step: Step) -> Any:
    """Channels in are contracted, channels out are the weight's rows; groups are an outer axis of both."""
    if step.args.get("transposed"):
        return Unruled("aten.convolution.transposed")
    x, weight = step.dims("input"), step.dims("weight")
    kernel = len(weight) - 2
    lead = len(x) - kernel - 1
    groups = int(step["groups"])
    if groups == 1:
        step.unify(x[lead], weight[1])
    runs, out = _channels(step, x[lead], weight[0], weight[1], groups)
    if groups > 1:
        step.rewrite(groups=Extent((runs,)))
    _finish_conv(step, x, weight, lead, (runs,), out)
    step.contract(weight[1], step["input"], step["weight"])
    return (*x[:lead], out, *step.fresh_frozen(step.shape[lead + 1 :], "positions of a map"))


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def conv_transpose(step: Step) -> Dims:
    """As a convolution, with the weight's first two dimensions exchanged."""
    x, weight = step.dims("input"), step.dims("weight")
    lead = len(x) - (len(weight) - 2) - 1
    groups = int(step["groups"])
    outer: Label
    if groups == 1:
        step.unify(x[lead], weight[0])
        outer, out, inside = (), weight[1], weight[0]
    else:
        size = label_size(x[lead])
        outer, inside = step.regroup(x[lead], (groups, size // groups))
        runs, rest = step.regroup(weight[0], (groups, size // groups))
        step.unify(outer, runs)
        if inside and rest:
            step.unify(inside, rest)
        step.rewrite(groups=Extent((outer,)))
        out = outer + weight[1]
    _finish_conv(step, x, weight, lead, (outer,), out)
    step.contract(inside, step["input"], step["weight"])
    return (*x[:lead], out, *step.fresh_frozen(step.shape[lead + 1 :], "positions of a map"))


def _finish_conv(step: Step, x: Dims, weight: Dims, lead: int, runs: Dims, out: Label) -> None:
    step.freeze(x[lead + 1 :], "positions of a map")
    step.freeze(weight[2:], "positions of a kernel")
    if step["bias"] is not None:
        step.unify(out, step.dims("bias")[0])
    through = (*x[:lead], *runs)
    step.zeros("product", step["bias"], (step["input"], through), (step["weight"], (out,)))


@rule("embedding")
def embedding(step: Step) -> Dims:
    """Rows chosen by value: the table keeps its rows."""
    weight = step.dims("weight")
    step.freeze([weight[0]], "rows are chosen by index")
    step.zeros("any", step["weight"])
    return step.dims("indices") + weight[1:]


@rule("embedding_bag _embedding_bag _embedding_bag_forward_only")
def embedding_bag(step: Step) -> Any:
    """Sums of rows chosen by value."""
    weight = step.dims("weight")
    step.freeze([weight[0]], "rows are chosen by index")
    step.zeros("any", step["weight"])
    first, *others = step.value()
    why = "rows are chosen by index"
    return [
        (step.fresh_frozen(first.shape[:1], why)[0], weight[1]),
        *(step.fresh_frozen(v.shape, why) for v in others),
    ]


@rule("cosine_similarity")
def cosine_similarity(step: Step) -> Dims:
    """Product of two directions: both have to be zero at removed units."""
    a, b = step["x1"], step["x2"]
    dims = step.broadcast([step.dims(a), step.dims(b)])
    at = step.axis(step["dim"], len(dims))
    step.contract(dims[at], a)
    step.contract(dims[at], b)
    step.zeros("any", a, b)
    return dims[:at] + dims[at + 1 :]


@rule("bilinear")
def bilinear(step: Step) -> Dims:
    """x1 W x2 for every output."""
    a, b, weight = step.dims("input1"), step.dims("input2"), step.dims("weight")
    step.unify(a[-1], weight[1])
    step.unify(b[-1], weight[2])
    step.contract(a[-1], step["input1"], step["weight"])
    step.contract(b[-1], step["input2"], step["weight"])
    if step["bias"] is not None:
        step.unify(weight[0], step.dims("bias")[0])
    step.zeros("product", step["bias"], (step["weight"], weight[:1]))
    return (*step.broadcast([a[:-1], b[:-1]]), weight[0])


@rule("scaled_dot_product_attention")
def attention(step: Step) -> Dims:
    """softmax(q kᵀ) v: positions stay, q and k share their width, heads are batch dimensions."""
    q, k, v = step.dims("query"), step.dims("key"), step.dims("value")
    why = "attention over positions"
    step.freeze([q[-2], k[-2], v[-2]], why)
    step.unify(q[-1], k[-1])
    step.contract(q[-1], step["query"], step["key"])
    batch = step.broadcast([k[:-2], v[:-2]])
    if step.args.get("enable_gqa") and label_size(q[-3]) != label_size(k[-3]):
        groups, repeat = label_size(k[-3]), label_size(q[-3]) // label_size(k[-3])
        outer, _ = step.regroup(q[-3], (groups, repeat))
        step.unify(outer, k[-3])
        batch = (*step.broadcast([q[:-3], batch[:-1]]), q[-3])
    else:
        batch = step.broadcast([q[:-2], batch])
    mask = step.args.get("attn_mask")
    if mask is not None:
        dims = step.dims(mask)
        step.freeze(dims[-2:], why)
        step.broadcast([batch, dims[:-2]])
    if step.args.get("scale") is None:  # 1/sqrt(width) must stay that of the whole width
        step.rewrite(scale=label_size(q[-1]) ** -0.5)
    step.zeros("any", step["value"])
    return (*batch, q[-2], v[-1])


@rule("transformers.grouped_mm_fallback _grouped_mm")
def grouped_mm(step: Step) -> Any:
    """Rows sorted by expert times one matrix per expert."""
    x, w, *rest = [n for n in step.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    a, b = step.dims(x), step.dims(w)
    if len(a) != 2 or len(b) != 3 or len(rest) != 1:
        return Unruled(str(step.node.target))
    step.freeze([a[0], b[0], *step.dims(rest[0])], "rows are grouped by expert")
    step.unify(a[1], b[1])
    step.contract(a[1], x, w)
    step.zeros("product", None, (x, (a[0],)), (w, (b[0], b[2])))
    return (a[0], b[2])


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(step: Step) -> Any:
    """One hidden width for all layers and directions, repeated for every gate."""
    if not str(step.node.target).endswith(".input"):
        return Unruled(str(step.node.target))
    gates = {"lstm": 4, "gru": 3}.get(str(step.node.target).split(".")[1], 1)
    initial = step["hx"]
    states = list(initial) if isinstance(initial, (list, tuple)) else [initial]
    hidden = step.dims(states[-1])[-1]
    output = step.dims(states[0])[-1]
    projected = label_size(hidden) != label_size(output)
    if projected:
        step.freeze([hidden, output], "an LSTM tells its projection by two different widths")
    else:
        step.unify(hidden, output)
    each = (4 if step["has_biases"] else 2) + (1 if projected else 0)
    parameters, directions = list(step["params"]), 2 if step["bidirectional"] else 1
    inputs = step.dims("input")[-1]
    for layer in range(int(step["num_layers"])):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            _cell(step, parameters[start : start + each], gates, inputs, hidden, output)
        inputs = step.axes.join([output] * directions)
    batch = 0 if step["batch_first"] else 1
    dims = step.dims("input")
    step.freeze([dims[1 - batch]], "steps of a sequence")
    for state in states:
        step.freeze([step.dims(state)[0]], "layers and directions")
    step.zeros("all", *states)
    tails = [step.dims(state) for state in states]
    return [(*dims[:-1], inputs), *tails]


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(step: Step) -> Any:
    """One step of a recurrent layer."""
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(str(step.node.target).split(".")[1], 1)
    states = list(step["hx"]) if gates == 4 else [step["hx"]]
    hidden = step.dims(states[0])[-1]
    for state in states[1:]:
        step.unify(hidden, step.dims(state)[-1])
    weights = [step[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if step[name] is not None]
    _cell(step, weights, gates, step.dims("input")[-1], hidden, hidden)
    step.zeros("all", *states)
    dims = (*step.dims("input")[:-1], hidden)
    return [dims, dims] if gates == 4 else dims


def _cell(step: Step, weights: list[Any], gates: int, inputs: Label, hidden: Label, output: Label) -> None:
    """weight_ih (gates·h, inputs), weight_hh (gates·h, outputs), biases (gates·h), weight_hr (outputs, h)."""
    hidden_size = label_size(hidden)
    for position, node in enumerate(weights):
        dims = step.dims(node)
        if len(dims) == 2 and label_size(dims[0]) != gates * hidden_size:  # the projection of an LSTM
            step.unify(dims[0], output)
            step.unify(dims[1], hidden)
            continue
        gate, unit = step.regroup(dims[0], (gates, hidden_size))
        step.freeze([gate], "gates of a recurrent cell")
        step.unify(unit, hidden)
        if len(dims) == 2:
            step.unify(dims[1], inputs if position == 0 else output)
