"""Multiply-accumulates of a graph from its labels: what is left of each product when some units are gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import fx

from secateur.core.axes.atoms import Label
from secateur.core.axes.layout import Kept, extent
from secateur.core.axes.step import Dims, Trace, arguments, operator

__all__ = ["macs"]


class _Count:
    """Products of the widths that labels have when only the kept units remain."""

    def __init__(self, trace: Trace, kept: Kept) -> None:
        self.trace, self.kept = trace, kept

    def size(self, labels: Sequence[Label]) -> int:
        """Number of positions of dimensions with these labels."""
        return prod(extent(self.trace.axes, label, self.kept) for label in labels)

    def of(self, node: fx.Node) -> int:
        """Number of elements of a node's tensor."""
        return self.size(self.trace.dims[node])

    def contracted(self, node: fx.Node) -> int:
        """Width of what is summed over."""
        return self.size([label for label, _ in self.trace.records[node].contracted])


def macs(trace: Trace, graph: fx.Graph, kept: Kept) -> int:
    """Multiply-accumulates of all matrix products, convolutions, attention, experts and recurrent layers.

    Attention counts over the full square even where it is causal, as torch's counter does with the eager
    kernel; element-wise work, norms and look-ups do not count.

    Cost: arithmetic on labels, no tensor is touched.
    """
    count = _Count(trace, kept)
    total = 0
    for node in graph.nodes:
        if node.op == "call_function" and node in trace.records:
            formula = _FORMULAS.get(operator(node))
            total += formula(count, node) if formula else 0
    return total


def _product(count: _Count, node: fx.Node) -> int:
    return count.of(node) * count.contracted(node)


def _added(count: _Count, node: fx.Node) -> int:
    first, second = [v for v in arguments(node).values() if isinstance(v, fx.Node)][1:3]
    x, y = count.trace.dims[first], count.trace.dims[second]
    return count.size(x[:-1]) * count.size(y[-1:] if len(y) > 1 else ()) * count.contracted(node)


def _convolution(count: _Count, node: fx.Node) -> int:
    given = arguments(node)
    kernel = prod(given["weight"].meta["val"].shape[2:])
    if "transpose" in operator(node):  # every input position meets all outputs of its group
        weight = count.trace.dims[given["weight"]]
        return count.of(given["input"]) * count.size(weight[1:2]) * kernel
    return count.of(node) * count.contracted(node) * kernel


def _attention(count: _Count, node: fx.Node) -> int:
    given = arguments(node)
    q, k, v = (count.trace.dims[given[name]] for name in ("query", "key", "value"))
    result: Dims = count.trace.dims[node]
    return count.size(result[:-1]) * count.size(k[-2:-1]) * (count.size(q[-1:]) + count.size(v[-1:]))


def _einsum(count: _Count, node: fx.Node) -> int:
    return _product(count, node) if len(list(arguments(node)["tensors"])) > 1 else 0


def _recurrent(count: _Count, node: fx.Node) -> int:
    given = arguments(node)
    dims = count.trace.dims[given["input"]]
    matrices = [n for n in given["params"] if n.meta["val"].dim() == 2]
    return count.size(dims[:-1]) * sum(map(count.of, matrices))


def _cell(count: _Count, node: fx.Node) -> int:
    given = arguments(node)
    dims = count.trace.dims[given["input"]]
    return count.size(dims[:-1]) * sum(count.of(given[name]) for name in ("w_ih", "w_hh"))


def _table(names: str, formula: Callable[[_Count, fx.Node], int]) -> dict[str, Any]:
    return {f"aten.{name}": formula for name in names.split()}


_FORMULAS: dict[str, Callable[[_Count, fx.Node], int]] = {
    **_table("linear matmul mm bmm mv dot vdot", _product),
    **_table("addmm baddbmm addmv baddbmm_ addmm_", _added),
    **_table(
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d", _convolution
    ),
    **_table("scaled_dot_product_attention", _attention),
    **_table("einsum", _einsum),
    **_table("_grouped_mm", _product),
    "transformers.grouped_mm_fallback": _product,
    **_table("lstm gru rnn_tanh rnn_relu", _recurrent),
    **_table("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", _cell),
}
