"""Tables that several modules share: rotary angles, a relative bias, slopes.

Such a table ties the heads or rotary pairs of all layers into one axis, because every layer reads the same
positions of it. Read through a gather instead, each layer may keep its own units: the table stays whole, and
the program selects from it what the layer kept.
"""

from __future__ import annotations

from torch import fx

from secateur.core.axes.step import operator

__all__ = ["shared_tables"]

CASTS = {"aten.to", "aten._to_copy", "aten.alias", "aten.detach", "aten.contiguous", "aten.clone", "getitem"}


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def shared_tables(graph: fx.Graph) -> set[fx.Node]:
    """Nodes computed from parameters and constants alone, and read in at least two modules.

    A parameter itself is none, nor is a cast of it: shared weights stay tied.
    """
    tables: set[fx.Node] = set()
    shared: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            tables.add(node)
        elif node.op == "call_function" and all(n in tables for n in node.all_input_nodes):
            tables.add(node)
            above = node.all_input_nodes
            computed = not (operator(node) in CASTS and above and above[0].op == "get_attr")
            readers = {_module(user) for user in node.users}
            if any(n in shared for n in above) or (computed and len(readers) > 1):
                shared.add(node)
    return shared
