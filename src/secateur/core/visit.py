"""Visit layers while the calibration data flow through the model: each is met by the already pruned stream.

All calibration data run as one batch. Right before a layer computes, everything that meets it is known and every
layer before it is already pruned; so its weight may be changed there and then, and one forward pass of the model
calibrates every layer on what will really reach it, with no knowledge of blocks or architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.met import Met
from secateur.core.shrinkage import lean_on_the_layer
from secateur.core.statistics import LayerLike, Padding, Sums, evaluating, forward, observe
from secateur.errors import UsageError

__all__ = ["TOKENS", "At", "merge", "split", "unreached", "visit"]

At = Callable[[Any, Mapping[str, Float[Tensor, "part ..."]]], None]

TOKENS = 16384  # counted in one go: a copy in float32 of so many inputs is made

# a batch's token ids -> the mask that says which of them are real
MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
MASKS = {*MASK_OF.values(), "src_key_padding_mask"}


def visit(
    model: nn.Module,
    layers: Sequence[LayerLike],
    names: Sequence[str],
    data: Iterable[Any],
    at: At,
    *,
    to_the_end: bool = False,
) -> None:
    """Run the data once; call `at(layer, statistics)` right before each layer is used for the first time.

    Args:
        layers: layers to visit, each once, in the order in which the model uses them.
        names: statistics wanted, keys of `STATISTICS`. Layers that share their input (q, k and v) share one
            computation; experts that meet few tokens lean on the layer's mean.
        data: batches, joined into one; see `merge`.
        at: may change the layer's weight in place.
        to_the_end: go on behind the last layer, for whoever wants the model's output.

    Raises:
        UsageError: no data, batches that cannot be joined, a layer that the data never reach.
        NumericError: NaN or Inf in a layer's input.

    Cost: one forward pass, which ends at the last layer; memory for the activations of all calibration data
        between two layers, and for the statistics of one layer.
    """
    batch = merge(data)
    left = {layer.name for layer in layers}
    newest = Met()

    def see(layer: LayerLike, inputs: Tensor, rows: Callable[[], list[Tensor]]) -> None:
        if layer.name not in left:
            return
        left.remove(layer.name)
        if not newest.again(layer, inputs):
            newest.forget()  # before the new is made
            newest.remember(layer, inputs, _statistics(names, layer, rows()))
        at(layer, newest.found)
        if not left:
            newest.forget()
        if not left and not to_the_end:
            raise _AllVisitedError

    with ExitStack() as stack:
        stack.enter_context(suppress(_AllVisitedError))
        stack.enter_context(evaluating(model))
        padding = Padding(model, stack)
        padding.look_at(batch)
        for layer in layers:
            observe(layer, padding, partial(see, layer), stack)
        if left:
            forward(model, batch)
    for layer in layers:
        if layer.name in left:
            raise unreached(layer.name)


class _AllVisitedError(Exception):
    """Ends the forward pass once nothing is left to visit."""


def _statistics(names: Sequence[str], layer: LayerLike, rows: list[Tensor]) -> Mapping[str, Tensor]:
    sums = Sums(names, layer)
    for start in range(0, max(len(part) for part in rows), TOKENS):
        sums.add([part[start : start + TOKENS] for part in rows])
    if not any(sums.tokens):
        raise unreached(layer.name)
    lean_on_the_layer(sums)
    return sums.values()


def unreached(name: str) -> UsageError:
    """The error of a layer that the calibration data never reach."""
    return UsageError(
        f'{name}: no calibration token reached this layer. Skip it with skip="{name}", or give data that use it'
    )


def merge(data: Iterable[Any]) -> Any:
    """Join batches along their first dimension; shorter rows of tokens are padded at the right.

    Rows of different lengths need to say which tokens are real: a mapping with `input_ids` gets an `attention_mask`,
    and whatever has the mask's shape (token ids, embeddings) is padded with it. All other tensors must agree
    in all dimensions but the first. Labels are left out.

    Raises:
        UsageError: no batch, one batch instead of several, batches that differ in their keys or shapes.

    Example:
        >>> joined = merge([{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}])
        >>> joined["input_ids"].tolist(), joined["attention_mask"].tolist()
        ([[1, 2], [3, 0]], [[1, 1], [1, 0]])
    """
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    batches = list(data)
    if not batches:
        raise UsageError("data holds no batch; calibration needs at least one")
    if len({isinstance(batch, Mapping) for batch in batches}) > 1:
        raise UsageError("some calibration batches are mappings and some are not; give them one form")
    if not isinstance(batches[0], Mapping):
        return _join([b[0] if isinstance(b, tuple | list) else b for b in batches], "inputs")
    marked = [_marked(batch) for batch in batches]
    if len({frozenset(batch) for batch in marked}) > 1:
        keys = sorted({tuple(sorted(batch)) for batch in marked})
        raise UsageError(f"calibration batches differ in what they hold: {keys}; give them the same keys")
    lengths = {key: max(batch[key].shape[1] for batch in marked) for key in MASKS & {*marked[0]}}
    padded = [_padded(batch, lengths) for batch in marked]
    return {key: _join([batch[key] for batch in padded], key) for key in marked[0]}


def split(batch: Any, size: int) -> list[Any]:
    """Cut a batch, a tensor or a mapping of tensors, into pieces of `size` rows, the last one possibly smaller.

    Example:
        >>> [piece["input_ids"].shape[0] for piece in split({"input_ids": torch.zeros(5, 2)}, 2)]
        [2, 2, 1]
    """
    if not isinstance(batch, Mapping):
        return list(batch.split(size))
    cut = {k: v.split(size) if isinstance(v, Tensor) else v for k, v in batch.items()}
    count = max((len(v) for v in cut.values() if isinstance(v, tuple)), default=0)
    return [{k: v[i] if isinstance(v, tuple) else v for k, v in cut.items()} for i in range(count)]


def _marked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with the masks of its token ids, and without labels."""
    found = {key: value for key, value in batch.items() if key != "labels"}
    for ids, mask in MASK_OF.items():
        if ids in found and found.get(mask) is None:
            found[mask] = torch.ones_like(found[ids])
    return found


def _padded(batch: dict[str, Any], lengths: Mapping[str, int]) -> dict[str, Any]:
    """Every tensor that starts with the shape of a mask, padded to the length of the longest batch."""
    found = dict(batch)
    for mask, length in lengths.items():
        shape = batch[mask].shape[:2]
        missing = length - shape[1]
        for key, value in batch.items():
            if missing and isinstance(value, Tensor) and value.shape[:2] == shape:
                filler = value.new_full((shape[0], missing, *value.shape[2:]), key == "src_key_padding_mask")
                found[key] = torch.cat([value, filler], dim=1)
    return found


def _join(values: list[Any], key: str) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        if any(isinstance(value, Tensor) for value in values) or any(value != values[0] for value in values):
            raise UsageError(f"calibration batches differ in {key!r}, which is no tensor; give them one value")
        return values[0]
    shapes = sorted({tuple(value.shape[1:]) for value in values})
    if len(shapes) > 1:
        raise UsageError(
            f"calibration batches differ in shape, {key}: {shapes}; give them one size, or rows of tokens with an "
            "attention_mask"
        )
    return values[0] if len(values) == 1 else torch.cat(values)
