"""Other inputs like an example: fresh numbers, other batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from secateur.core.axes.step import operator
from secateur.core.example import Example

__all__ = ["fresh", "other_shapes", "vocabularies"]

SAME = {  # operators whose result holds the numbers of their first input
    "to", "_to_copy", "view", "reshape", "expand", "alias", "contiguous", "unsqueeze", "squeeze", "flatten", "clone",
    "type_as", "detach", "lift_fresh_copy",
}  # fmt: skip
ENOUGH = 8  # distinct integers from which a tensor of indices can be drawn again


def vocabularies(program: fx.GraphModule) -> dict[int, int]:
    """For inputs of an exported program that index an embedding, by position: the number of its rows."""
    out: dict[int, int] = {}
    holes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in program.graph.nodes:
        if "embedding" not in str(node.target) or node.op != "call_function":
            continue
        weight, indices = node.args[0], node.args[1]
        for _ in range(8):  # casts and views on the way
            if (
                operator(indices).removeprefix("aten.").partition(".")[0] not in SAME
                or not indices.all_input_nodes
            ):
                break
            indices = indices.all_input_nodes[0]
        if indices in holes and isinstance(weight.meta.get("val"), Tensor):
            at = holes.index(indices)
            out[at] = min(out.get(at, 2**31), int(weight.meta["val"].shape[0]))
    return out


def fresh(example: Example, rows: Mapping[int, int], generator: torch.Generator) -> Example:
    """The same shapes with other numbers.

    Indices are drawn from those of the example where there are enough, else from the embedding's rows; a tensor
    of two values, such as a mask, stays.

    Args:
        example: The inputs.
        rows: From `vocabularies`.
        generator: On the CPU.
    """
    names = [pytree.keystr(path) for path, leaf in _leaves(example)]
    order = {name: at for at, name in enumerate(names)}
    return example.map(lambda name, x: _fresh(x, rows.get(order[name]), generator))


def _leaves(example: Example) -> list[tuple[Any, Any]]:
    return [
        pair
        for pair in pytree.tree_flatten_with_path((example.args, dict(example.kwargs)))[0]
        if pair[1] is not None
    ]


def _fresh(x: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    if x.numel() == 0 or x.dtype == torch.bool or x.is_complex():
        return x
    values = x.unique().cpu()
    if x.is_floating_point():
        if len(values) == 2:
            return x
        scale = float(x.float().std()) if len(values) > 1 else 1.0
        noise = torch.randn(x.shape, generator=generator) * scale + float(x.float().mean())
        return noise.to(x)
    if len(values) < ENOUGH and rows is not None:
        return torch.randint(0, rows, x.shape, generator=generator).to(x)
    if len(values) <= 2:
        return x
    return values[torch.randint(0, len(values), x.shape, generator=generator)].to(x)


def other_shapes(example: Example) -> list[Example]:
    """Inputs of one row more and of shorter token sequences, where the shapes suggest it; what changes most first."""
    tensors = [x for x in example.tensors() if x.dim()]
    if not tensors:
        return []
    batch = tensors[0].shape[0]
    rows = all(x.shape[0] == batch for x in tensors if x.dim() > 1)
    tokens = [x for x in tensors if x.dim() > 1 and not x.is_floating_point()]
    shorter = bool(tokens) and all(x.dim() == 2 and x.shape[1] > 2 for x in tokens)

    def longer(_: str, x: Tensor) -> Tensor:
        return torch.cat([x, x[:1]]) if x.dim() and x.shape[0] == batch else x

    def cut(_: str, x: Tensor) -> Tensor:
        return x[:, :-1] if x.dim() == 2 and not x.is_floating_point() else x

    changes = [[longer, cut]] if rows and shorter else []
    changes += [[longer]] if rows else [[cut]] if shorter else []
    out = []
    for steps in changes:
        changed = example
        for step in steps:
            changed = changed.map(step)
        out.append(changed)
    return out
