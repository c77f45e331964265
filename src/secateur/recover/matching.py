"""What a teacher shows beside its answers: outputs of its blocks and attention maps, paired with the student's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.forward import call
from secateur.core.matrix import layouts
from secateur.core.stacks import stacks
from secateur.errors import UsageError, nearest

__all__ = ["Seen", "Watched", "attention_gap", "hidden_gap", "pairs_of", "real_positions"]

Seen = dict[str, Tensor]


def pairs_of(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Blocks of the student and the teacher's that they should imitate: module path -> module path.

    Stacks (encoder, decoder) are paired with their like; where the student has fewer blocks, block i of n imitates
    block ceil(i m / n) of the teacher's m, so that the last imitates the last.

    Raises:
        UsageError: a model without repeated blocks, or stacks that the other has not.

    Example:
        >>> def net(depth):
        ...     return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(depth)))
        >>> pairs_of(net(2), net(4))
        {'0': '1', '1': '3'}
    """
    mine, theirs = _blocks(student), _blocks(teacher)
    if not mine or mine.keys() != theirs.keys():
        raise UsageError(
            f"blocks of the student ({_said(mine)}) and of the teacher ({_said(theirs)}) cannot be paired; give "
            "pairs={student's module path: teacher's module path}"
        )
    found = {}
    for stack, paths in mine.items():
        others = theirs[stack]
        for place, path in enumerate(paths, start=1):
            found[path] = others[-(-place * len(others) // len(paths)) - 1]
    return found


def _blocks(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    blocks, _ = stacks(model, [module for module in model.modules() if layouts(module)])
    for path, block in blocks.items():
        found.setdefault(block.stack, []).append(path)
    return found


def _said(blocks: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(paths)} in its {stack}" for stack, paths in blocks.items()) or "none"


class Watched:
    """A model whose modules' outputs are seen while it runs.

    Args:
        model: any model.
        paths: modules whose outputs are kept.
        attention: whether attention maps are wanted as well; then a transformers model computes them in the open
            ("eager").
    """

    def __init__(self, model: nn.Module, paths: Sequence[str] = (), *, attention: bool = False):
        self.model, self.paths, self.attention = model, list(dict.fromkeys(paths)), attention
        known = dict(model.named_modules())
        for path in self.paths:
            if path not in known:
                raise UsageError(
                    f"pairs: there is no module {path!r} in {type(model).__name__}; {nearest(path, known)}"
                )

    def __call__(self, inputs: Any) -> tuple[Any, Seen, list[Tensor]]:
        """The model's answer, the outputs of the watched modules, and its attention maps."""
        seen: Seen = {}
        with ExitStack() as stack:
            for path in self.paths:
                handle = self.model.get_submodule(path).register_forward_hook(_keep(seen, path))
                stack.callback(handle.remove)
            if not self.attention:
                output = call(self.model, inputs)
                return output, self._complete(seen), []
            stack.enter_context(_in_the_open(self.model))
            named = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
            try:
                output = self.model(**named, output_attentions=True)
            except TypeError as error:
                raise _no_maps(self.model) from error
        maps = getattr(output, "attentions", None) or getattr(output, "decoder_attentions", None)
        if not maps or any(each is None for each in maps):
            raise _no_maps(self.model)
        return output, self._complete(seen), list(maps)

    def _complete(self, seen: Seen) -> Seen:
        for path in self.paths:
            if path not in seen:
                raise UsageError(
                    f"pairs: module {path} was not used by {type(self.model).__name__} for this batch"
                )
        return seen


def _keep(seen: Seen, path: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor):
            raise UsageError(f"pairs: module {path} returns {type(first).__name__}; expected a tensor")
        seen[path] = first

    return keep


@contextmanager
def _in_the_open(model: nn.Module) -> Iterator[None]:
    """Attention that gives its maps; fused kernels never make them."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    change = getattr(model, "set_attn_implementation", None)
    if change is None or before in (None, "eager"):
        yield
        return
    change("eager")
    try:
        yield
    finally:
        change(before)


def _no_maps(model: nn.Module) -> UsageError:
    return UsageError(
        f"{type(model).__name__} gives no attention maps; leave attention= at 0, or give a transformers model loaded "
        'with attn_implementation="eager"'
    )


def real_positions(inputs: Any, shape: torch.Size) -> Tensor | None:
    """Which of the leading "batch tokens" positions are no padding; None where all of them count."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != shape[:2] or bool(mask.bool().all()):
        return None
    return mask.bool()


def hidden_gap(mine: Tensor, theirs: Tensor, map_: nn.Module | None, inputs: Any) -> Tensor:
    """Squared error of a block's outputs as a fraction of the teacher's own square, over real positions.

    Args:
        mine: "batch ... width", or "batch width height width" of a convolution.
        theirs: the same but for the width.
        map_: from the student's width to the teacher's; None where they agree.
        inputs: of the models, for their padding.

    Raises:
        UsageError: shapes that differ in more than the width.
    """
    mine, theirs = _features_last(mine), _features_last(theirs)
    if map_ is not None:
        mine = map_(mine.to(next(map_.parameters()).dtype))
    if mine.shape != theirs.shape:
        raise UsageError(
            f"paired outputs of shapes {tuple(mine.shape)} and {tuple(theirs.shape)} differ in more than their width"
        )
    real = real_positions(inputs, theirs.shape) if theirs.dim() == 3 else None
    if real is not None:
        mine, theirs = mine[real], theirs[real]
    theirs = theirs.float()
    return (mine.float() - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


def attention_gap(mine: Sequence[Tensor], theirs: Sequence[Tensor], inputs: Any) -> Tensor:
    """KL divergence of the student's attention from the teacher's, nats a query, mean over layers and heads.

    Heads are compared one by one where both have as many, else their means. Layers are paired as blocks are.
    """
    total = mine[0].new_zeros(())
    for place, own in enumerate(mine, start=1):
        other = theirs[-(-place * len(theirs) // len(mine)) - 1]
        if own.shape[1] != other.shape[1]:
            own, other = own.mean(1, keepdim=True), other.mean(1, keepdim=True)
        if own.shape != other.shape:
            raise UsageError(
                f"attention maps of shapes {tuple(own.shape)} and {tuple(other.shape)} do not compare"
            )
        own, other = own.float().clamp(min=1e-9), other.float()
        each = (torch.xlogy(other, other) - other * own.log()).sum(-1)  # "batch head query"
        real = real_positions(inputs, torch.Size((each.shape[0], each.shape[2])))
        total = total + (each.mean() if real is None else each.transpose(1, 2)[real].mean())
    return total / len(mine)


def _features_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1) if tensor.dim() >= 4 else tensor
