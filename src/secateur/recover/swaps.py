"""Refine a mask by trading kept weights for pruned ones, as long as the layer's loss falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.errors import UsageError
from secateur.recover.quadratic import pose
from secateur.recover.update import Choose, LeastSquares, Updated

__all__ = ["Swaps"]


@dataclass(frozen=True)
class Swaps:
    """Better places for the same number of weights: swap after swap, then another update on the mask found.

    A row that loses its weights P has the loss `w_P^T G_PP w_P`. With `c = G w_P`, pruning a kept u costs
    `2 w_u c_u + w_u^2 G_uu`, restoring a pruned p costs `-2 w_p c_p + w_p^2 G_pp`, and both together
    `-2 w_u w_p G_up` more. Every row makes its best swap while that lowers the loss; the counts of every row and of
    every N:M group stay.

    Args:
        then: the update that gets the refined mask; None leaves the kept weights as they are.
        limit: swaps of a row at most.
        candidates: weights of either kind that are tried against each other, the cheapest by themselves; at
            least the row's length makes every swap the best of all. Groups of N:M are always tried whole.

    Cost: `limit` times `out (candidates^2 + in)`; N:M `limit` times `out in m`.

    Source: arXiv 2512.10922, "SparseSwaps". Deviation: `candidates` instead of all pairs, which would
        cost `out in^2` a swap; the damped moment is used, for one and the same loss in all updates.
    """

    then: Callable[..., Any] | None = LeastSquares()  # noqa: RUF009 - frozen, so it may be shared
    limit: int = 100
    candidates: int = 32

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """Choose by the recipe's score, swap, then update."""
        if choose.swaps is None:
            raise UsageError("swaps trade single weights; use them with single weights or N:M as the pattern")
        problem = pose(weight, second_moment)
        known = problem.target.masked_fill(problem.dead, 0)  # a dead column costs nothing
        mask = self.refine(known, choose(), problem.moment, choose.swaps)
        if self.then is None:
            return Updated(weight * mask, mask, problem.damping)
        return Updated(*self.then(weight, Chosen(mask, choose), second_moment))

    def refine(
        self,
        weight: Float[Tensor, "out in"],
        mask: Bool[Tensor, "out in"],
        moment: Float[Tensor, "in in"],
        group: int,
    ) -> Bool[Tensor, "out in"]:
        """A mask with the same counts in every `group` columns of every row, and no higher loss."""
        mask = mask.clone()
        pull = (weight * ~mask) @ moment
        rows = torch.arange(weight.shape[0], device=weight.device)
        find = _best_of_row if group >= weight.shape[1] else _best_of_groups
        for _ in range(self.limit):
            size = group if find is _best_of_groups else min(self.candidates, group)
            leave, enter, gain = find(weight[rows], mask[rows], pull[rows], moment, size)
            better = gain < 0
            rows, leave, enter = rows[better], leave[better], enter[better]
            if not len(rows):
                break
            mask[rows, leave], mask[rows, enter] = False, True
            pull[rows] += weight[rows, leave, None] * moment[leave] - weight[rows, enter, None] * moment[enter]
        return mask


@dataclass(frozen=True)
class Chosen:
    """`choose` for an update that is to take a mask as it is."""

    mask: Bool[Tensor, "out in"]
    choose: Choose

    @property
    def bias(self) -> bool:
        """As before."""
        return self.choose.bias

    @property
    def swaps(self) -> int | None:
        """As before."""
        return self.choose.swaps

    def width(self, block: int) -> int:
        """As before."""
        return self.choose.width(block)

    def __call__(self, scores: Tensor | None = None, columns: slice | None = None) -> Bool[Tensor, "out in"]:
        """The mask, whatever the scores."""
        return self.mask if columns is None else self.mask[:, columns]


Swap = tuple[Int[Tensor, " row"], Int[Tensor, " row"], Float[Tensor, " row"]]


def _costs(
    weight: Float[Tensor, "row in"],
    mask: Bool[Tensor, "row in"],
    pull: Float[Tensor, "row in"],
    moment: Float[Tensor, "in in"],
) -> tuple[Float[Tensor, "row in"], Float[Tensor, "row in"]]:
    """What it costs to prune each kept weight and to restore each pruned one, by itself; infinite elsewhere."""
    own, cross = weight.square() * moment.diagonal(), 2 * weight * pull
    return (own + cross).masked_fill(~mask, float("inf")), (own - cross).masked_fill(mask, float("inf"))


def _best_of_row(weight: Tensor, mask: Tensor, pull: Tensor, moment: Tensor, size: int) -> Swap:
    """The best swap of each row among its `size` cheapest weights of either kind."""
    prune, restore = _costs(weight, mask, pull, moment)
    prune, leave = prune.topk(size, largest=False)
    restore, enter = restore.topk(size, largest=False)
    between = moment[leave[:, :, None], enter[:, None, :]]
    between = between * weight.gather(1, leave)[:, :, None] * weight.gather(1, enter)[:, None, :]
    best, first, second = _best(prune, restore, between)
    return leave.gather(1, first[:, None])[:, 0], enter.gather(1, second[:, None])[:, 0], best


def _best_of_groups(weight: Tensor, mask: Tensor, pull: Tensor, moment: Tensor, size: int) -> Swap:
    """The best swap of each row within one of its groups of `size` columns."""
    rows, columns = weight.shape
    prune, restore = (cost.reshape(rows, -1, size) for cost in _costs(weight, mask, pull, moment))
    blocks = (
        moment.reshape(columns // size, size, columns // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )
    grouped = weight.reshape(rows, -1, size)
    best, first, second = _best(prune, restore, blocks * grouped[..., :, None] * grouped[..., None, :])
    group = best.argmin(1, keepdim=True)
    start = group[:, 0] * size
    return (
        start + first.gather(1, group)[:, 0],
        start + second.gather(1, group)[:, 0],
        best.gather(1, group)[:, 0],
    )


def _best(prune: Tensor, restore: Tensor, between: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest change of the loss over all pairs, and which pair; what rounding could fake counts as none."""
    change = prune[..., :, None] + restore[..., None, :] - 2 * between
    best, pair = change.flatten(-2).min(-1)
    first, second = pair // change.shape[-1], pair % change.shape[-1]
    size = (
        prune.gather(-1, first[..., None])[..., 0].abs() + restore.gather(-1, second[..., None])[..., 0].abs()
    )
    noise = 16 * torch.finfo(change.dtype).eps * size
    return torch.where(best < -noise, best, torch.zeros_like(best)), first, second
