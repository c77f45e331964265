"""Whether a tensor is another plus something: then what is not added to stays as it was."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from secateur.core.axes.step import arguments, operator

__all__ = ["adds_to"]

ADDING = {"aten.add", "aten.add_"}
PASSING = {
    "aten.dropout",
    "aten.to",
    "aten._to_copy",
    "aten.clone",
    "aten.alias",
    "aten.contiguous",
    "aten.detach",
}


def adds_to(node: fx.Node, sources: Collection[fx.Node]) -> bool:
    """Whether a node is one of the sources with something added, through nothing but sums.

    Args:
        node: a tensor.
        sources: nodes that hold the other.
    """
    open_nodes, seen = [node], set()
    while open_nodes:
        here = open_nodes.pop()
        if here in sources:
            return True
        if here in seen or here.op != "call_function":
            continue
        seen.add(here)
        name, given = operator(here), arguments(here)
        if name in ADDING and given.get("alpha", 1) == 1:
            open_nodes += [x for x in (given["self"], given["other"]) if isinstance(x, fx.Node)]
        elif name in PASSING:
            open_nodes += here.all_input_nodes[:1]
    return False
