"""Visit the layers of a block stage by stage, a part of the calibration data at a time.

`core.visit` lets all data flow at once, so what lies between two layers is in memory for all of them. Here each part
of the data runs up to the next layers that share an input, which are then pruned; then all parts run again, up
to those behind them. Memory holds one part; a block runs as often as it has stages, four in a Llama, each time
further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import Tensor

from secateur.core.met import is_shareable, version_of
from secateur.core.shrinkage import lean_on_the_layer
from secateur.core.statistics import LayerLike, Padding, Sums, evaluating, forward, observe
from secateur.core.visit import TOKENS, At, merge, split, unreached
from secateur.stream.walk import Running

__all__ = ["AT_ONCE", "in_parts", "visit_in_stages"]

AT_ONCE = 8192  # tokens in a part


def in_parts(batches: Iterable[Any], most: int = AT_ONCE) -> list[Any]:
    """All batches as one, as `prune_` sees them; cut into parts of whole sequences where there are more tokens."""
    whole = merge(batches)
    ids = whole.get("input_ids") if isinstance(whole, Mapping) else whole
    if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.numel() <= most:
        return [whole]
    return split(whole, max(1, most // (ids.numel() // len(ids))))


def visit_in_stages(
    block: Running, layers: Sequence[LayerLike], names: Sequence[str], data: Iterable[Any], at: At
) -> None:
    """Call `at(layer, statistics)` for every layer once everything that meets it is counted; see `core.visit`.

    Args:
        block: run once a stage for each of its batches.
        layers: layers to visit, each once, in the order in which the block uses them.
        names: statistics wanted.
        data: batches, iterated once a stage.
        at: may change the layer's weight in place.

    Raises:
        UsageError: a layer that the data never reach.
        NumericError: NaN or Inf in a layer's input.
    """
    left = {layer.name: layer for layer in layers}
    with block.silent():
        while left:
            stage = _Stage(names)
            with ExitStack() as stack:
                stack.enter_context(evaluating(block))
                padding = Padding(block, stack)
                for layer in left.values():
                    observe(layer, padding, partial(stage.see, layer), stack)
                for batch in data:
                    padding.look_at(batch)
                    stage.begin()
                    with suppress(_StageOverError):
                        forward(block, batch)
            if stage.sums is None or not any(stage.sums.tokens):
                raise unreached(next(iter(left)))
            lean_on_the_layer(stage.sums)
            known, stage.sums = stage.sums.values(), None
            for layer in stage.layers:
                at(left.pop(layer.name), known)
            del known  # with all that was factorised, before the next is counted


class _StageOverError(Exception):
    """Ends the forward pass at the first layer with an input of its own."""


class _Stage:
    """The layers that share one input, and what is known of it so far."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.layers: list[LayerLike] = []
        self.sums: Sums | None = None

    def begin(self) -> None:
        """A new batch comes."""
        self.inputs: tuple[Tensor, int] | None = None

    def see(self, layer: LayerLike, inputs: Tensor, rows: Callable[[], list[Tensor]]) -> None:
        """A layer is about to compute."""
        if self.sums is None:
            self.sums, self.layers = Sums(self.names, layer), [layer]
        if layer is self.layers[0] and self.inputs is None:
            self.inputs = inputs, version_of(inputs)
            _count(self.sums, rows())
        elif any(layer is known for known in self.layers):
            return
        elif self._shared(layer, inputs):
            self.layers.append(layer)
        elif self.inputs is not None:
            raise _StageOverError

    def _shared(self, layer: LayerLike, inputs: Tensor) -> bool:
        if self.inputs is None or not (is_shareable(layer) and is_shareable(self.layers[0])):
            return False
        return self.inputs[0] is inputs and self.inputs[1] == version_of(inputs)


def _count(sums: Sums, rows: list[Tensor]) -> None:
    for start in range(0, max(len(part) for part in rows), TOKENS):
        sums.add([part[start : start + TOKENS] for part in rows])
