"""A threshold inside the training loop: every step ends with small weights set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.allocate import Percentile, Threshold
from secateur.core.hold import hold_, unwrapped
from secateur.core.masks import Masks
from secateur.core.select import smallest
from secateur.core.where import Layer, Only, select
from secateur.errors import NumericError, UsageError
from secateur.training.resume import check_same, masks_of

__all__ = ["Thresholding"]


class Thresholding:
    """Every step sets the weights of magnitude at most tau to zero; shaped like an lr_scheduler.

    Call `step()` once after every step of the optimizer.

    Args:
        model: the model that trains, bare or wrapped, see `hold_`.
        tau: the threshold, at least 0; a mapping of globs over parameter names to thresholds gives each layer its own.
        percentile: instead of a threshold, the percentage of each layer's weights that becomes zero at every step,
            the smallest first, counted exactly.
        relative: tau counts in root mean squares of the layer's weights, as they are at that step.
        regrow: whether a weight may come back. With it, a zero is a weight like any other, and stays away from zero
            once a step carries it beyond tau. Without it, what was zeroed once is held at zero.
        optimizer: one or several; then zeros are written right after each of their steps, too, and the running means
            of pruned weights' gradients are zero. Only without `regrow`.
        only, skip: as for `prune_`.

    Attributes:
        steps: calls of `step()` so far.
        masks: what the last step left above zero; with `regrow` it may grow again.

    Raises:
        UsageError: neither or both of tau and percentile, or out of range; and what `select` and `hold_` refuse.
        NumericError: by `step()`: NaN or Inf in a weight, naming the layer. Nothing has changed then.

    Cost: two passes over the chosen weights a step, and a selection for a percentile.

    Example:
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> pruner = Thresholding(model, tau=0.05, optimizer=optimizer)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 10)).square().mean().backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> int((model.weight == 0).sum()) == pruner.masks.zeros
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tau: float | Mapping[str, float] | None = None,
        *,
        percentile: float | None = None,
        relative: bool = False,
        regrow: bool = False,
        optimizer: Any = None,
        only: Only = None,
        skip: Only = None,
    ) -> None:
        if (tau is None) == (percentile is None):
            raise UsageError("give either tau, a threshold on |w|, or percentile=, how many become zero")
        if regrow and optimizer is not None:
            raise UsageError(
                "with regrow=True no zero is held, so there is nothing to do for an optimizer; leave it out"
            )
        self.rule: Threshold | Percentile
        if percentile is not None:
            self.rule = Percentile(float(percentile))
        else:
            self.rule = Threshold(tau if isinstance(tau, Mapping) else float(tau or 0.0), relative)
        self.regrow, self.steps = regrow, 0
        self._layers = select(unwrapped(model), only, skip).chosen
        self._hold = hold_(model, Masks({}), optimizer)
        if isinstance(self.rule, Threshold):
            self._taus = {layer.name: self.rule.of(layer.name) for layer in self._layers}

    @property
    def masks(self) -> Masks:
        """What the last step left above zero; empty before the first."""
        return self._hold.masks

    def step(self) -> None:
        """Count one step of the optimizer and zero what is small now."""
        with torch.no_grad():
            sizes = {layer.name: layer.values.abs() for layer in self._layers}
        self._check_finite(sizes)
        kept = {layer.name: self._kept(layer, sizes[layer.name]) for layer in self._layers}
        if not self.regrow:
            kept = {
                name: mask & self.masks[name] if name in self.masks else mask for name, mask in kept.items()
            }
        self._hold.masks = Masks(kept)
        self.steps += 1

    def remove(self) -> None:
        """Stop; the zeros of now stay until training moves them."""
        self._hold.remove()

    def __enter__(self) -> Thresholding:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        back = ", may grow back" if self.regrow else ""
        return f"Thresholding({self.rule!r}{back}; step {self.steps}, {self.masks!r})"

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model and the optimizer."""
        return {"steps": self.steps, "masks": dict(self.masks), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken; masks are applied.

        Raises:
            UsageError: the state of another kind of object, threshold or model, naming what differs.
        """
        check_same("Thresholding", self._identity(), state)
        self._hold.masks = masks_of(state)
        self.steps = int(state["steps"])

    def _identity(self) -> dict[str, Any]:
        layers = {layer.name: list(layer.weight.shape) for layer in self._layers}
        return {"kind": "Thresholding", "rule": repr(self.rule), "regrow": self.regrow, "layers": layers}

    def _kept(self, layer: Layer, size: Tensor) -> Tensor:
        if isinstance(self.rule, Percentile):
            cut = torch.tensor([round(size.numel() * self.rule.q / 100)])
            return smallest(size.float().reshape(1, -1), cut).logical_not_().reshape(size.shape)
        tau = self._taus[layer.name]
        if self.rule.relative:
            tau *= float(size.square().mean(dtype=torch.float64).sqrt())
        return size > tau

    def _check_finite(self, sizes: Mapping[str, Tensor]) -> None:
        """A NaN is above no threshold and would be pruned in silence."""
        largest = torch.stack([size.max().float() for size in sizes.values()])
        if not bool(largest.isfinite().all()):
            ill = next(name for name, size in sizes.items() if not bool(size.isfinite().all()))
            raise NumericError(
                f"{ill}: NaN or Inf among its weights after step {self.steps + 1}; go back to the last good state and "
                "train with a lower learning rate"
            )
