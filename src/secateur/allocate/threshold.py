"""Allocators that decide for themselves how much is cut: a threshold, a percentile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from secateur.allocate.share import Counts, globally, per_layer
from secateur.core.select import Candidates
from secateur.errors import UsageError, nearest

__all__ = ["Percentile", "Threshold"]


@dataclass(frozen=True)
class Threshold:
    """Cut every unit whose score is at most tau.

    Args:
        tau: one threshold for the whole model, or a mapping of globs over parameter names to thresholds (the
            first glob that matches counts).
        relative: tau is a multiple of the root mean square score of the layer; for magnitude this is the
            standard deviation of its weights (Han et al. 2015, section 3: "quality parameter").

    Example:
        >>> layer = Candidates((1, 4), 1, lambda: torch.tensor([[0.1, 0.4, 0.5, 2.0]]))
        >>> Threshold(0.4)({"fc.weight": layer}, 0)
        {'fc.weight': tensor([2])}
    """

    tau: float | Mapping[str, float]
    relative: bool = False
    decides = True

    def __post_init__(self):
        for tau in self.tau.values() if isinstance(self.tau, Mapping) else [self.tau]:
            if not 0 <= tau < float("inf"):
                raise UsageError(f"threshold tau is {tau}; expected a finite number of at least 0")

    def of(self, name: str) -> float:
        """The threshold that applies to a layer."""
        if not isinstance(self.tau, Mapping):
            return self.tau
        for pattern, tau in self.tau.items():
            if fnmatchcase(name, pattern):
                return tau
        raise UsageError(f"{name}: no threshold is given for it; add one, or a last pattern '*'")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer; `keep` plays no part."""
        for pattern in self.tau if isinstance(self.tau, Mapping) else ():
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise UsageError(
                    f"the threshold for {pattern!r} matches none of the {len(layers)} layers; "
                    f"{nearest(pattern, layers)}"
                )
        return {name: torch.tensor([self._kept(name, layer.scores())]) for name, layer in layers.items()}

    def _kept(self, name: str, scores: Tensor) -> int:
        tau = self.of(name)
        if self.relative:
            finite = scores[scores.isfinite()]
            tau *= float(finite.square().mean(dtype=torch.float64).sqrt()) if finite.numel() else 0.0
        return int(torch.count_nonzero(scores > tau))


@dataclass(frozen=True)
class Percentile:
    """Cut the lowest `q` percent, counted exactly, of each layer or of the whole model."""

    q: float
    scope: Literal["layer", "model"] = "layer"
    decides = True

    def __post_init__(self):
        if not 0 <= self.q <= 100:
            raise UsageError(f"percentile {self.q} is not in [0, 100]")
        if self.scope not in ("layer", "model"):
            raise UsageError(f"scope of a percentile is 'layer' or 'model', got {self.scope!r}")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer; `keep` plays no part."""
        weights = sum(layer.weights for layer in layers.values())
        share = per_layer if self.scope == "layer" else globally
        return share(layers, weights - round(weights * self.q / 100))
