"""What an axis is called: its kind, read off the operators that meet it, and a name in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from secateur.core.axes.atoms import Atom, Label
from secateur.core.axes.step import Trace, arguments, operator

__all__ = ["Roles", "kind_of", "name_of", "roles"]

Roles = dict[Atom, Counter[str]]  # leaf -> how often each role was met


def _aten(names: str) -> frozenset[str]:
    return frozenset("aten." + name for name in names.split())


ACTIVATIONS = _aten(
    "relu relu_ gelu silu silu_ tanh sigmoid softplus hardtanh hardtanh_ elu elu_ leaky_relu leaky_relu_ mish "
    "hardswish hardswish_ hardsigmoid selu celu prelu relu6 glu"
)
PRODUCTS = _aten("matmul bmm baddbmm")
CONTRACTIONS = PRODUCTS | _aten("linear addmm mm conv1d conv2d conv3d scaled_dot_product_attention")
REPEATING = _aten("expand repeat_interleave repeat broadcast_to")
PASSING = _aten(  # between the scores, the softmax and the product with the values
    "add add_ sub mul mul_ div div_ to view reshape masked_fill masked_fill_ where dropout clone contiguous "
    "type_as _to_copy clamp tanh cat slice maximum alias unflatten flatten squeeze unsqueeze"
)
KEYS = PASSING | REPEATING | _aten("transpose permute neg index")  # between the keys' projection and the scores
PLURALS = {
    "head": "heads",
    "query head": "query heads",
    "KV group": "KV groups",
    "qk dimension": "qk dimensions",
    "rotary pair": "rotary pairs",
    "head dimension": "head dimensions",
    "v dimension": "v dimensions",
    "feed-forward unit": "feed-forward units",
    "expert feed-forward": "expert feed-forward units",
    "hidden": "hidden dimensions",
    "channel": "channels",
    "recurrent unit": "recurrent units",
    "other": "inner dimensions",
}


def roles(trace: Trace, graph: fx.Graph) -> Roles:
    """What every free leaf meets: attention, convolutions, linear layers, residual sums, activations."""
    out: Roles = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_function" or node not in trace.records:
            continue
        name = operator(node)
        if name == "aten.scaled_dot_product_attention":
            given = arguments(node)
            _attention(trace, out, [given["query"], given["key"], given["value"]], trace.dims[node])
        elif name in ("aten.softmax", "aten._softmax", "aten._safe_softmax"):
            _softmax(trace, out, node)
        elif name in ACTIVATIONS:
            _mark(trace, out, trace.dims[node], "activation")
        elif name in ("aten.add", "aten.add_"):
            _residual(trace, out, node, order)
        elif "conv" in name or name in (
            "aten.linear",
            "aten.addmm",
            "aten.mm",
            "aten.matmul",
            "aten.embedding",
        ):
            role = "conv" if "conv" in name else "embedding" if "embedding" in name else "linear"
            for source in map(_weight, node.all_input_nodes):
                if source.op == "get_attr" and len(trace.dims[source]) > 1:
                    _mark(trace, out, trace.dims[source], role)
        elif "grouped_mm" in name:
            for source in node.all_input_nodes:
                if len(trace.dims[source]) == 3:
                    _mark(trace, out, trace.dims[source], "expert")
        elif name in ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"):
            _mark(trace, out, trace.dims[node][1], "recurrent")
    return out


def _weight(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and operator(node) in (
        "aten.t",
        "aten.numpy_T",
        "aten.transpose",
        "aten.to",
    ):
        node = node.all_input_nodes[0]
    return node


def _mark(trace: Trace, out: Roles, labels: Iterable[Label], role: str) -> None:
    for label in labels:
        for leaf in trace.axes.leaves(label):
            if leaf.reason is None:
                out.setdefault(leaf, Counter())[role] += 1


def _back(node: fx.Node, through: frozenset[str], to: frozenset[str], limit: int = 24) -> fx.Node | None:
    """The nearest node among `to` reached by going up through operators in `through`."""
    queue, seen = [node], {node}
    while queue and limit:
        limit -= 1
        here = queue.pop(0)
        name = operator(here) if here.op == "call_function" else ""
        if name in to:
            return here
        if name in through or here is node:
            for above in here.all_input_nodes:
                if above not in seen and isinstance(above.meta.get("val"), torch.Tensor):
                    seen.add(above)
                    queue.append(above)
    return None


def _softmax(trace: Trace, out: Roles, node: fx.Node) -> None:
    scores = _back(node, PASSING, PRODUCTS)
    queue, seen, mixed = [node], {node}, None
    while queue and mixed is None:
        here = queue.pop(0)
        for below in here.users:
            if operator(below) in PRODUCTS:
                mixed = below
            elif operator(below) in PASSING and below not in seen and len(seen) < 24:
                seen.add(below)
                queue.append(below)
    if scores is None or mixed is None or scores is mixed:
        return
    q, k = [v for v in arguments(scores).values() if isinstance(v, fx.Node)][-2:]
    v = [v for v in arguments(mixed).values() if isinstance(v, fx.Node)][-1]
    _attention(trace, out, [q, k, v], trace.dims[mixed])


def _attention(trace: Trace, out: Roles, qkv: Sequence[fx.Node], result: Sequence[Label]) -> None:
    q, k, v = qkv
    queries, values = trace.dims[q], trace.dims[v]
    whole = list(trace.axes.leaves(queries[-1]))
    interleaved = any(leaf.reason is not None for leaf in whole) and len(set(whole)) == 2
    for leaf in dict.fromkeys(whole):
        if leaf.reason is None:
            pair = whole.count(leaf) > 1 or interleaved
            out.setdefault(leaf, Counter())["rotary pair" if pair else "qk dimension"] += 1
    _mark(trace, out, [values[-1]], "v dimension")
    heads = {leaf for label in result[:-2] for leaf in trace.axes.leaves(label) if leaf.reason is None}
    repeated = heads & _repeated(trace, k)
    if k.op == "call_function" and len(trace.dims[k]) == len(result):  # attention that groups by itself
        held = {leaf for label in trace.dims[k][:-2] for leaf in trace.axes.leaves(label)}
        repeated |= heads - held
    for leaf in heads:
        role = "head" if not repeated else "query head" if leaf in repeated else "KV group"
        out.setdefault(leaf, Counter())[role] += 1


def _repeated(trace: Trace, keys: fx.Node) -> set[Atom]:
    """Leaves that only exist because the keys were repeated for several query heads."""
    out: set[Atom] = set()
    queue, seen = [keys], {keys}
    while queue and len(seen) < 60:
        here = queue.pop(0)
        if here.op != "call_function" or operator(here) not in KEYS:
            continue
        above = [n for n in here.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if operator(here) in REPEATING:
            before = {leaf for label in trace.dims[above[0]] for leaf in trace.axes.leaves(label)}
            out |= {leaf for label in trace.dims[here] for leaf in trace.axes.leaves(label)} - before
        fresh = [n for n in above if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return out


def _residual(trace: Trace, out: Roles, node: fx.Node, order: dict[fx.Node, int]) -> None:
    """x + f(x): one operand is computed from the other."""
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op == "call_function"]
    if len(operands) != 2 or not any(
        leaf.reason is None for d in trace.dims[node] for leaf in trace.axes.leaves(d)
    ):
        return
    old, new = sorted(operands, key=order.__getitem__)
    old = _same_tensor(old)
    stack, seen, contracts = [new], {new}, False
    while stack:
        here = stack.pop()
        contracts = contracts or (
            here is not old and here.op == "call_function" and operator(here) in CONTRACTIONS
        )
        if here is old and not stack and contracts:
            _mark(
                trace, out, trace.dims[node][-1:] if len(trace.dims[node]) < 4 else trace.dims[node], "residual"
            )
            return
        for above in here.all_input_nodes if here is not old else ():
            if above not in seen and order[above] >= order[old]:
                seen.add(above)
                stack.insert(0 if above is old else len(stack), above)  # the old one is looked at last


def _same_tensor(node: fx.Node) -> fx.Node:
    while (
        operator(node) in ("aten.to", "aten.dropout", "aten.alias", "aten.contiguous") and node.all_input_nodes
    ):
        node = node.all_input_nodes[0]
    return node


def kind_of(met: Counter[str]) -> str:
    """The kind of an axis from the roles it plays."""
    for role in ("KV group", "query head", "head"):
        if met[role]:
            return role
    if met["recurrent"]:
        return "recurrent unit"
    if met["conv"] and met["conv"] >= met["linear"]:
        return "channel"
    if met["residual"] or met["embedding"]:
        return "hidden"
    query = next((role for role in ("rotary pair", "qk dimension") if met[role]), "")
    if query and met["v dimension"]:
        return "head dimension"
    if query or met["v dimension"]:
        return query or "v dimension"
    if met["expert"]:
        return "expert feed-forward"
    return "feed-forward unit" if met["linear"] and met["activation"] else "other"


def _ranges(numbers: Iterable[int]) -> str:
    out: list[list[int]] = []
    for number in sorted(set(numbers)):
        if out and number == out[-1][-1] + 1:
            out[-1].append(number)
        else:
            out.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in out)


def name_of(kind: str, tensors: Sequence[str], *, listed: bool = False) -> str:
    """The kind and the modules it lives in: what their paths share, numbered layers as ranges.

    With `listed` the first modules by name instead, for axes that share their path with others.

    Example:
        >>> name_of("head", ["h.0.attn.q.weight", "h.0.attn.o.weight"])
        'heads of h.0.attn'
        >>> name_of("rotary pair", ["h.0.q.weight", "h.1.q.weight", "h.2.q.weight"])
        'rotary pairs of h.0-2.q'
    """
    paths = list(dict.fromkeys(tuple(name.split(".")[:-1]) for name in tensors))
    shared: list[str] = []
    for tokens in zip(*paths, strict=False):
        if len(set(tokens)) == 1:
            shared.append(tokens[0])
        elif all(token.isdigit() for token in tokens):
            shared.append(_ranges(int(token) for token in tokens))
        else:
            break
    if shared and not listed:
        return f"{PLURALS[kind]} of {'.'.join(shared)}"
    if kind == "hidden" and not listed:
        return f"{PLURALS[kind]} of the model"
    names = [".".join(path) or "the model" for path in paths]
    return f"{PLURALS[kind]} of {', '.join(names[:3])}" + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
