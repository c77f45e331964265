"""One cut through the whole model after the scores of every layer or axis are brought to one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur.allocate.share import Counts, globally
from secateur.core.select import Candidates
from secateur.errors import UsageError

__all__ = ["Normalised", "PerCost"]


@dataclass(frozen=True)
class Normalised:
    """All units compete, each by its score as compared with others of its layer or axis.

    Scores of different layers, and even more those of heads and of neurons, differ in scale for reasons that say
    nothing of their worth; compared as they are, one kind goes first and the others last.

    Args:
        by: "mean" divides by the mean of the layer's scores, "standard" takes the distance from the mean in standard
            deviations, "rank" takes the share of the layer's units that score lower, which is nearly the same
            sparsity everywhere.

    Source: FLAP (An et al. 2024) compares heads and neurons by "standard".

    Cost: two more passes over the scores than `globally`.

    Example:
        >>> soft = Candidates((1, 2), 1, lambda: torch.tensor([[1.0, 2.0]]))
        >>> loud = Candidates((1, 2), 1, lambda: torch.tensor([[500.0, 4500.0]]))
        >>> Normalised()({"a": soft, "b": loud}, 2)
        {'a': tensor([1]), 'b': tensor([1])}
    """

    by: str = "mean"

    def __post_init__(self):
        if self.by not in ("mean", "standard", "rank"):
            raise UsageError(f"scores are normalised by 'mean', 'standard' or 'rank', got {self.by!r}")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer."""
        scaled = {
            name: replace(layer, scores=partial(_scaled, layer, self.by), magnitudes=None)
            for name, layer in layers.items()
        }
        return globally(scaled, keep)


@dataclass(frozen=True)
class PerCost:
    """All units compete by what they are worth for what they cost: by their score over the cost of one unit.

    The cost is that of the target: multiply-accumulates or bytes, parameters otherwise. Channels of early layers, which
    are computed at many places, then go before those of late ones, which hold many parameters and are cheap to compute.

    Args:
        by: how scores of different layers are brought to one scale first: "mean" and "rank" as in `Normalised`, or
            "none" where the scores can be compared as they are, as losses can.
        power: of the cost; 0 is no cost, 1 the greedy answer to "which units lose least for what they free". The root
            in between is the default, because it was best on a ResNet-56 by both scores tried (docs/results.md): scores
            over a layer's mean say less of layers against each other than the whole ratio asks of them.

    Source: the ratio is the greedy rule of the knapsack problem (Dantzig 1957). Molchanov et al. 2017 (arXiv
        1611.06440) take a multiple of the cost off the score instead. A unit's cost is counted in the
        dense model and not again when others are gone.

    Raises:
        UsageError: an unknown scale, or a negative power.

    Cost: as `Normalised`.

    Example:
        >>> cheap = Candidates((1, 2), 1, lambda: torch.tensor([[1.0, 2.0]]), cost=lambda: 1.0)
        >>> dear = Candidates((1, 2), 1, lambda: torch.tensor([[1.0, 2.0]]), cost=lambda: 9.0)
        >>> PerCost()({"a": cheap, "b": dear}, 2)
        {'a': tensor([2]), 'b': tensor([0])}
    """

    by: str = "mean"
    power: float = 0.5

    def __post_init__(self):
        if self.by not in ("mean", "rank", "none"):
            raise UsageError(f"scores over costs are compared by 'mean', 'rank' or 'none', got {self.by!r}")
        if not self.power >= 0:
            raise UsageError(f"power is {self.power:g}; expected a number of at least 0")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer."""
        costs = {
            name: float(layer.cells) if layer.cost is None else layer.cost() for name, layer in layers.items()
        }
        least = torch.finfo(torch.float32).tiny  # what frees nothing stays
        dearest = max(least, *costs.values())
        scaled = {
            name: replace(
                layer, scores=partial(self._worth, layer, max(costs[name] / dearest, least)), magnitudes=None
            )
            for name, layer in layers.items()
        }
        return globally(scaled, keep)

    def _worth(self, layer: Candidates, cost: float) -> Tensor:
        scores = layer.scores() if self.by == "none" else _scaled(layer, self.by)
        return scores / cost**self.power


def _scaled(layer: Candidates, by: str) -> Tensor:
    """Finite scores on the common scale; what is pruned already, or has to stay, keeps its infinity."""
    scores = layer.scores()
    finite = scores.isfinite()
    known = scores[finite].double()
    if not known.numel():
        return scores
    if by == "rank":
        _, place, counts = torch.unique(known, return_inverse=True, return_counts=True)
        new = (counts.cumsum(0) - counts).double()[place] / known.numel()
    elif by == "mean":
        new = known / known.abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
    else:
        spread = known.std(correction=0)
        new = (known - known.mean()) / spread if spread > 0 else torch.zeros_like(known)
    out = scores.clone()
    out[finite] = new.float()
    return out
