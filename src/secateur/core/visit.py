"""Visit layers while the calibration data flow through the model: each is met by the already pruned stream.

All calibration data run as one batch. Right before a layer computes, everything that meets it is known and every
layer before it is already pruned; so its weight may be changed there and then, and one forward pass of the model
calibrates every layer on what will really reach it, with no knowledge of blocks or architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.statistics import LayerLike, Padding, Sums, evaluating, forward, observe
from secateur.errors import UsageError

__all__ = ["merge", "visit"]

At = Callable[[Any, Mapping[str, Float[Tensor, "part ..."]]], None]


def visit(
    model: nn.Module, layers: Sequence[LayerLike], names: Sequence[str], data: Iterable[Any], at: At
) -> None:
    """Run the data once; call `at(layer, statistics)` right before each layer is used for the first time.

    Args:
        layers: layers to visit, each once, in the order in which the model uses them.
        names: statistics wanted, keys of `STATISTICS`. Layers that share their input (q, k and v) share one
            computation.
        data: batches, joined into one; see `merge`.
        at: may change the layer's weight in place.

    Raises:
        UsageError: no data, batches that cannot be joined, a layer that the data never reach.

    Cost: one forward pass; memory for the activations of all calibration data between two layers.
    """
    batch = merge(list(data))
    reached: set[str] = set()
    last: dict[int, tuple[Tensor, Mapping[str, Tensor]]] = {}  # the newest input and its statistics

    def see(layer: LayerLike, inputs: Tensor, rows: Callable[[], list[Tensor]]) -> None:
        if layer.name in reached:
            return
        reached.add(layer.name)
        shared = layer.layout.shape[0] == 1 and inputs.dim() <= 3
        if not shared or id(inputs) not in last:
            sums = Sums(names, layer)
            sums.add(rows())
            last.clear()
            last[id(inputs)] = (inputs, sums.values())
        at(layer, last[id(inputs)][1])
        if not shared:
            last.clear()

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        padding = Padding(model, stack)
        padding.look_at(batch)
        for layer in layers:
            observe(layer, padding, partial(see, layer), stack)
        forward(model, batch)
    for layer in layers:
        if layer.name not in reached:
            raise UsageError(
                f"{layer.name}: no calibration token reached this layer. Skip it with "
                f'skip="{layer.name}", or give data that use it'
            )


def merge(batches: list[Any]) -> Any:
    """Join batches along their first dimension; token rows of different lengths are padded at the right.

    A mapping with `input_ids` gets an `attention_mask` that marks the padding; other tensors must agree in all
    dimensions but the first.

    Example:
        >>> joined = merge([{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}])
        >>> joined["input_ids"].tolist(), joined["attention_mask"].tolist()
        ([[1, 2], [3, 0]], [[1, 1], [1, 0]])
    """
    if not batches:
        raise UsageError("data holds no batch; calibration needs at least one")
    first = batches[0]
    if isinstance(first, Mapping):
        marked = [dict(b) for b in batches]
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if ids in first:
                marked = [{mask: torch.ones_like(b[ids]), **b} for b in marked]
        keys = [key for key in marked[0] if key != "labels"]
        return {key: _join([b[key] for b in marked], key) for key in keys}
    return _join([b[0] if isinstance(b, tuple | list) else b for b in batches], "inputs")


def _join(tensors: list[Tensor], key: str) -> Any:
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors[0]
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    if all(tensor.dim() == 2 and not tensor.is_floating_point() for tensor in tensors):
        longest = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([nn.functional.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])
    shapes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
    raise UsageError(f"calibration batches differ in shape, {key}: {shapes}; give them one size")
