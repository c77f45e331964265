"""Neighbouring blocks merged: their feed-forwards averaged, in place or with the blocks between them gone.

The blocks of each list are cut into groups of `n` from the first on; a rest is a smaller group, and a block alone
stays as it is. `merged` puts the average into every block of its group: same size, and the measure of what
averaging costs. `compressed` deletes the blocks of a group but one, which keeps its own attention and norms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.depth import series
from secateur.core.feedforward import feed_forwards
from secateur.core.stacks import Block, Stack
from secateur.deploy.align import Align, orders
from secateur.deploy.depth import drop_blocks_
from secateur.errors import UsageError

__all__ = ["groups_of", "merge_blocks", "merge_blocks_"]

How = Literal["mean", "differences"]
Stays = Literal["first", "middle", "last"]
Parts = Literal["ffn", "block"]


def merge_blocks_(
    model: nn.Module,
    n: int,
    *,
    compress: bool = True,
    how: How = "mean",
    parts: Parts = "ffn",
    align: Align | None = None,
    data: Iterable[Any] | None = None,
    stays: Stays = "first",
    stack: Stack | None = None,
) -> nn.Module:
    """Merge every `n` consecutive blocks, in place.

    Args:
        model: any model with repeated blocks.
        n: blocks in a group.
        compress: delete the blocks of a group but one; False puts the merged parameters into all of them.
        how: "mean", or "differences": the first block plus its differences to all others.
        parts: "ffn" merges the feed-forwards (matrices and biases; experts with their routers), "block" all
            parameters of the blocks.
        align: put the neurons of a group in the order of the block that stays before they are merged: by "weights",
            or by "activations", the correlation of the neurons on data. Needs scipy.
        data: batches, for "activations".
        stays: which block of a group keeps its attention and norms.
        stack: "encoder" or "decoder"; None merges in both where there are both.

    Returns:
        The model.

    Raises:
        UsageError: blocks of different shapes in a group, no feed-forward, a model that its config cannot describe
            afterwards. The model is then as it was.

    Cost: a copy of one group's parameters; with `align` an assignment problem a block, O(neurons^3).

    Source: differences: Yang et al. 2024 (LaCo), equation 1, with `parts="block"`. Alignment before averaging:
        Ainsworth et al. 2023 (Git Re-Basin); for neighbouring feed-forwards Verma et al. 2025, who tie the merged
        layers where here the blocks between them go.
    """
    cut = [group for group in groups_of(model, n, stack) if len(group) > 1]
    staying = {id(group): _staying(group, stays) for group in cut}
    with torch.no_grad():
        found = _in_order(model, cut, parts, align, data, stays)
        merged = [_merged(group, found, how) for group in cut]
    gone = [b.path for group in cut for b in group if compress and b is not staying[id(group)]]
    if gone:
        drop_blocks_(model, gone)
    with torch.no_grad():
        for group, values in zip(cut, merged, strict=True):
            for block in [staying[id(group)]] if compress else group:
                parameters = dict(block.module.named_parameters())
                for name, value in values.items():
                    parameters[name].copy_(value)
    return model


def merge_blocks(model: nn.Module, n: int, **options: Any) -> nn.Module:
    """A copy of a model with every `n` consecutive blocks merged; see `merge_blocks_`.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(5)]
        >>> len(merge_blocks(nn.Sequential(*layers), 2))
        3
    """
    return merge_blocks_(copy.deepcopy(model), n, **options)


def groups_of(model: nn.Module, n: int, stack: Stack | None = None) -> list[tuple[Block, ...]]:
    """Every `n` consecutive blocks of each list, from the first on; the last group may be smaller.

    Raises:
        UsageError: n below 2.
    """
    if n < 2:
        raise UsageError(f"groups of {n} blocks have nothing to merge; expected at least 2")
    return [
        each.blocks[start : start + n]
        for each in series(model)
        if stack in (None, each.stack)
        for start in range(0, len(each.blocks), n)
    ]


def _staying(group: Sequence[Block], stays: Stays) -> Block:
    return group[{"first": 0, "middle": len(group) // 2, "last": -1}[stays]]


def _in_order(
    model: nn.Module,
    cut: Sequence[Sequence[Block]],
    parts: Parts,
    align: Align | None,
    data: Iterable[Any] | None,
    stays: Stays,
) -> dict[str, dict[str, Tensor]]:
    """For every block what is to be merged, by names inside the block, its neurons in the order of the staying one."""
    blocks = [block for group in cut for block in group]
    found: dict[str, dict[str, Tensor]] = {block.path: {} for block in blocks}
    if parts == "block":
        for block in blocks:
            found[block.path] |= {name: p.detach() for name, p in block.module.named_parameters()}
    if parts == "ffn" or align is not None:
        feeds = {feed.block.path: feed for feed in feed_forwards(model, blocks)}
        pairs = {
            block.path: (feeds[_staying(group, stays).path], feeds[block.path])
            for group in cut
            for block in group
        }
        order = {} if align is None else orders(model, list(pairs.values()), align, data)
        for path, feed in feeds.items():
            same = {name: p.detach() for name, p in feed.parameters.items()}
            found[path] |= feed.ordered(order[path]) if path in order else same
    _check_alike(cut, found)
    return found


def _check_alike(cut: Sequence[Sequence[Block]], found: Mapping[str, Mapping[str, Tensor]]) -> None:
    for group in cut:
        first = {name: tuple(t.shape) for name, t in found[group[0].path].items()}
        for block in group[1:]:
            own = {name: tuple(t.shape) for name, t in found[block.path].items()}
            odd = next((name for name in {**first, **own} if first.get(name) != own.get(name)), None)
            if odd is not None:
                raise UsageError(
                    f"{group[0].path} and {block.path} cannot be merged: {odd} has shape {first.get(odd)} and "
                    f"{own.get(odd)}; drop blocks instead, or choose groups of another size"
                )


def _merged(group: Sequence[Block], found: Mapping[str, Mapping[str, Tensor]], how: How) -> dict[str, Tensor]:
    """What the group's blocks become, computed in float32."""
    values = {}
    for name, base in found[group[0].path].items():
        stacked = torch.stack([found[block.path][name].float() for block in group])
        if how == "differences":
            values[name] = (stacked[0] + (stacked[1:] - stacked[0]).sum(0)).to(base.dtype)
        else:
            values[name] = stacked.mean(0).to(base.dtype)
    return values
