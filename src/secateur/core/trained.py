"""What a model's own training says about its weights: gathered from the gradients that its optimizer steps on.

These are the gradients as the optimizer sees them: accumulated, averaged over processes, unscaled, clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.matrix import Layout
from secateur.core.sharded import spread_like, whole
from secateur.core.where import Layer
from secateur.errors import UsageError

__all__ = ["GATHERED", "TRAINED", "Gathering", "gradient_of"]

# name -> whether it is a mean over the steps since the last update; otherwise a sum over all steps
GATHERED: Mapping[str, bool] = {"grad": True, "grad_squared": True, "movement": False}
# those of them that calibration data cannot give
TRAINED = ("movement",)


class Gathering:
    """Running sums over the steps of training, by layer and statistic.

    Args:
        layers: layers to watch.
        names: of `GATHERED`: `grad`, the mean gradient, and `grad_squared`, the mean of its squares, over the steps
            since the last `renew()`; `movement`, minus the sum over all steps of weight times gradient.
        optimizers: whose steps count.

    Cost: one pass over the watched weights a step and statistic; four bytes a weight and statistic.
    """

    def __init__(self, layers: Sequence[Layer], names: Iterable[str], optimizers: Sequence[Optimizer]) -> None:
        self.layers, self.names = tuple(layers), tuple(names)
        self._sums: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in layers}
        self._steps: dict[str, int] = dict.fromkeys(self._sums, 0)
        self._handles = [each.register_step_pre_hook(self._before_step) for each in optimizers]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            gradient = gradient_of(layer.weight, optimizer) if id(layer.weight) in stepped else None
            if gradient is None:
                continue
            self._steps[layer.name] += 1
            sums, weight = self._sums[layer.name], layer.weight.detach().float()
            for name in self.names:
                if name not in sums:
                    sums[name] = torch.zeros_like(weight)
                if name == "movement":
                    sums[name] -= weight * gradient
                else:
                    sums[name] += gradient if name == "grad" else gradient.square()

    def values(self) -> dict[str, dict[str, Float[Tensor, "part out in"]]]:
        """Each statistic of each layer, as `prune_` takes them.

        Raises:
            UsageError: a layer that no optimizer has stepped on since it is watched.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for layer in self.layers:
            if any(name not in self._sums[layer.name] for name in self.names):
                raise UsageError(
                    f"{layer.name}: no step of the optimizer has given it a gradient yet, so its {self.names[0]} is "
                    "not known; begin later, or skip it"
                )
            steps = max(1, self._steps[layer.name])
            found[layer.name] = {
                name: _matrices(layer.layout, total / steps if GATHERED[name] else total)
                for name, total in self._sums[layer.name].items()
            }
        return found

    def renew(self) -> None:
        """Start the means anew; sums over all of training go on."""
        for name in self._sums:
            self._steps[name] = 0
            self._sums[name] = {key: total for key, total in self._sums[name].items() if not GATHERED[key]}

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; where weights are shared out, every process must ask."""
        sums = {name: {key: whole(t).clone() for key, t in known.items()} for name, known in self._sums.items()}
        return {"sums": sums, "steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        weights = {layer.name: layer.weight for layer in self.layers}
        self._steps = {name: int(state["steps"][name]) for name in weights}
        self._sums = {
            name: {key: spread_like(weights[name], total.clone()) for key, total in state["sums"][name].items()}
            for name in weights
        }


def gradient_of(weight: Tensor, optimizer: Optimizer) -> Tensor | None:
    """The gradient that the optimizer is about to step on, float32; None where it has none or will not step.

    A GradScaler leaves unscaling to a fused optimizer, and says so on the optimizer.
    """
    if weight.grad is None:
        return None
    skipped, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if skipped is not None and bool(skipped):
        return None
    gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    gradient = gradient.detach().float()
    return gradient if scale is None else gradient / scale.to(gradient.device)


def _matrices(layout: Layout, values: Tensor) -> Tensor:
    return layout.to_matrices(whole(values))
