"""Blocks with many outlying scores keep more: OWL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.allocate.share import Counts
from secateur.allocate.shares import block_of, share_out
from secateur.core.select import Candidates
from secateur.errors import NumericError, UsageError

__all__ = ["OWL"]


@dataclass(frozen=True)
class OWL:
    """Outlier-weighed layer-wise sparsity: the more outlying scores a block has, the more it keeps.

    `D_l` is the share of a block's scores above `multiple` times their mean; the density of block l is
    `2 spread (D_l - min D) / (max D - min D)` plus a constant that makes the total exact. With the score of
    Wanda this is the published method. It helps weak methods at high sparsity and can hurt strong ones, so judge
    it on held-out data (`secateur.search`).

    Args:
        multiple: how many times the mean makes an outlier, above 0; the authors use 5 or 7 (3 by default in their
            code).
        spread: densities lie within this of their middle, in [0, 0.5].
        rows: whether the rows of a layer compete each for itself, as in Wanda, or the layer as a whole.

    Cost: two passes over the scores, one layer's scores at a time.

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)", section 3. Deviations: the constant is
        found with the sizes of the blocks, so that the total is exact for unequal ones; densities are cut off to
        [0, 1]; blocks with equal shares of outliers are pruned alike (the authors' code divides by zero).

    Example:
        >>> flat = Candidates((1, 8), 1, lambda: torch.ones(1, 8))
        >>> spiked = Candidates((1, 8), 1, lambda: torch.tensor([[99.0, 1, 1, 1, 1, 1, 1, 1]]))
        >>> OWL(spread=0.25)({"h.0.weight": flat, "h.1.weight": spiked}, 8)
        {'h.0.weight': tensor([2]), 'h.1.weight': tensor([6])}
    """

    multiple: float = 5.0
    spread: float = 0.08
    rows: bool = False

    def __post_init__(self):
        if not 0 < self.multiple < float("inf"):
            raise UsageError(f"multiple of OWL is {self.multiple:g}; expected a finite number above 0")
        if not 0 <= self.spread <= 0.5:
            raise UsageError(f"spread of OWL is {self.spread:g}; expected a density in [0, 0.5]")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer."""
        share = self.outliers(layers)
        low, high = min(share.values()), max(share.values())
        width = (high - low) or 1.0
        extra = [2 * self.spread * (share[block_of(name)] - low) / width for name in layers]
        return share_out(layers, lambda level: [level + each for each in extra], keep, self.rows)

    def outliers(self, layers: Mapping[str, Candidates]) -> dict[str, float]:
        """The share of outliers in each block; what is pruned already (score -inf) is left out."""
        blocks: dict[str, list[tuple[str, Candidates]]] = {}
        for name, layer in layers.items():
            blocks.setdefault(block_of(name), []).append((name, layer))
        found = {}
        for block, members in blocks.items():
            total, count = 0.0, 0
            for name, layer in members:
                scores = _alive(name, layer)
                total, count = total + float(scores.sum(dtype=torch.float64)), count + scores.numel()
            bound = self.multiple * total / max(1, count)
            above = sum(int(torch.count_nonzero(_alive(name, layer) > bound)) for name, layer in members)
            found[block] = above / max(1, count)
        return found


def _alive(name: str, layer: Candidates) -> Tensor:
    scores = layer.scores().reshape(-1)
    scores = scores[scores > -float("inf")]
    if scores.numel() and float(scores.min()) < 0:
        raise NumericError(f"{name}: OWL compares scores with their mean and needs them to be at least 0")
    return scores
