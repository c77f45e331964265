"""Whole blocks taken out of a model: fewer parameters, fewer operations, and plain `from_pretrained` still loads it.

A block of a transformer adds to a stream that runs past it, so a model without it is a model. The blocks go
physically; numbers inside of blocks (`layer_idx`), sizes beside their list and the counts and lists of the config
(`num_hidden_layers`, `n_layer`, `layer_types` ...) follow. What the config cannot say is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.depth import Edits, Which, chosen, take_out_
from secateur.core.example import example_of, main_output
from secateur.core.misfit import MisfitError
from secateur.core.passage import hidden
from secateur.core.stacks import Block, Stack
from secateur.core.statistics import evaluating
from secateur.deploy.twin import misfits
from secateur.errors import UsageError

__all__ = ["bypassed", "drop_blocks", "drop_blocks_"]

TOLERANCE = 1e-5  # of the largest output


def drop_blocks_(
    model: nn.Module, which: Which, *, stack: Stack | None = None, example: Any = None
) -> nn.Module:
    """Take whole blocks out of a model, in place.

    Args:
        model: any model with a `ModuleList` or `Sequential` of repeated blocks.
        which: running numbers of blocks (negative ones count from the end), or their paths.
        stack: "encoder" or "decoder", for numbers in a model that has both.
        example: one batch; the model is then accepted only if it gives on it what the whole model gives when these
            blocks hand on what they read.

    Returns:
        The model.

    Raises:
        UsageError: an unknown block, the last block of a list, a model that its config cannot describe without these
            blocks (so that `from_pretrained` would build another one), or an output that differs. The model is
            then as it was.

    Cost: a copy of no tensor; a model of transformers is built twice on the meta device to compare. With `example`,
        two forward passes.
    """
    _drop(model, which, stack, example)
    return model


def drop_blocks(
    model: nn.Module, which: Which, *, stack: Stack | None = None, example: Any = None
) -> nn.Module:
    """A copy of a model without some of its blocks; see `drop_blocks_`.

    Cost: a copy of what is kept.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
        >>> len(drop_blocks(nn.Sequential(*layers), 1))
        2
    """
    edits = _drop(model, which, stack, example)
    try:
        return copy.deepcopy(model)
    finally:
        edits.undo()


def _drop(model: nn.Module, which: Which, stack: Stack | None, example: Any) -> Edits:
    blocks = chosen(model, which, stack)
    expected: list[Tensor] = []
    if example is not None:
        with bypassed(model, blocks):
            expected = _run(model, blocks, example)
    fitted = not misfits(model)
    edits = take_out_(model, blocks)
    try:
        said = misfits(model) if fitted else ()
        if said:
            raise UsageError(
                f"{type(model).__name__} without {_names(blocks)} is nothing that its config can describe, so "
                f"from_pretrained would build another model: {said[0]}. Choose other blocks"
            )
        if example is not None:
            _check_equal(blocks, expected, _run(model, blocks, example))
    except BaseException:
        edits.undo()
        raise
    return edits


@contextmanager
def bypassed(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """Blocks that compute, and hand on what they read all the same: what dropping them has to equal."""

    def hand_on(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        stream = hidden(args, kwargs)
        if isinstance(output, Tensor):
            return stream
        return type(output)((stream, *output[1:]))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_hook(hand_on, with_kwargs=True).remove)
        yield model


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point tensors of what matters in the model's answer."""
    given = example_of(model, example)
    with evaluating(model):
        leaves = pytree.tree_leaves(main_output(given.run(model)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _run(model: nn.Module, blocks: Sequence[Block], example: Any) -> list[Tensor]:
    try:
        return _outputs(model, example)
    except (MisfitError, RuntimeError, IndexError, KeyError, TypeError, AttributeError) as error:
        reason = error.reason if isinstance(error, MisfitError) else " ".join(str(error).split())[:200]
        raise UsageError(
            f"without {_names(blocks)} the model does not run ({reason}): one of them changes the shape of the stream, "
            "or others need it. Choose other blocks"
        ) from error


def _check_equal(blocks: Sequence[Block], expected: list[Tensor], found: list[Tensor]) -> None:
    difference = max((_difference(*pair) for pair in zip_longest(expected, found)), default=0.0)
    if not difference <= TOLERANCE:
        raise UsageError(
            f"without {_names(blocks)} the output is not that of a model in which they hand on what they read "
            f"(relative difference {difference:.1e}, expected at most {TOLERANCE:.0e}); something else depends on "
            "them or on the numbers of the blocks behind. Choose other blocks"
        )


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    """The largest, relative to the largest value; infinite where shapes differ."""
    if one is None or other is None or one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max()) / max(float(one.abs().max()), 1e-30) if one.numel() else 0.0


def _names(blocks: Sequence[Block]) -> str:
    return ", ".join(block.path for block in blocks[:4]) + (" and more" if len(blocks) > 4 else "")
