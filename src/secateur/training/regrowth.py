"""A sparse model that also grows: weak weights make room for those that the gradient asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.hold import hold_, plain_optimizers, unwrapped
from secateur.core.masks import Masks, check_fits, named_parameters
from secateur.core.select import smallest
from secateur.core.sharded import whole
from secateur.core.trained import gradient_of
from secateur.errors import NumericError, UsageError
from secateur.schedule import Due
from secateur.training.agreement import agreed
from secateur.training.resume import check_same, masks_of

__all__ = ["RigL"]


class RigL:
    """Move the zeros while training at constant sparsity: drop by magnitude, grow by gradient.

    After step `begin` and every `every` steps from there to `end`, each layer drops a fraction of its kept weights,
    the smallest first, and keeps as many of the others instead, those with the largest gradient. The fraction falls
    along a cosine, from `fraction` to zero. Grown weights start at zero, without momentum. Call `step()` once after
    every step of the optimizer.

    Args:
        model: bare or wrapped, see `hold_`.
        masks: where to start; `prune_(model, 0.9, random)` of a model at initialisation is the usual choice.
        optimizer: one or several, whose gradients are looked at.
        begin, end, every: in steps; `every` must divide `end - begin`.
        fraction: of the kept weights, replaced at the first update, in (0, 1].

    Attributes:
        steps: calls of `step()` so far.
        masks: what is kept now; each layer always keeps equally many.
        grown: weights that the last update gave back, beside those dropped and taken again at once.

    Raises:
        UsageError: masks of another model or without zeros, no optimizer, an interval that misses its end.
        NumericError: by `step()`, at an update: NaN or Inf in a weight or gradient, naming the layer. Nothing has
            changed then.

    Cost: see `hold_`; before an update one copy of the gradients; an update selects twice in every layer.

    Source: Evci, Gale, Menick, Castro, Elsen 2020, "Rigging the Lottery", section 3 and algorithm 1. Deviations: the
        step before an update also moves the weights, where the paper's update replaces it; a second moment of Adam
        stays, for it is the running mean of that very weight's squared gradient: from zero, its first step
        would be several times too long.

    Example:
        >>> from secateur import prune_, random
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> pruner = RigL(model, prune_(model, 0.9, random), optimizer, begin=2, end=8, every=2)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 10)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> pruner.masks.nonzeros
        10
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        optimizer: Any,
        begin: int,
        end: int,
        every: int,
        *,
        fraction: float = 0.3,
    ) -> None:
        if not 0 < fraction <= 1:
            raise UsageError(
                f"fraction {fraction:g} is not in (0, 1]: of the kept weights, replaced at the first update"
            )
        if not masks.zeros:
            raise UsageError(
                "the masks prune nothing, so nothing can grow; start from prune_(model, 0.9, random)"
            )
        optimizers = plain_optimizers(optimizer)
        if not optimizers:
            raise UsageError("growing looks at the gradients of the optimizer's steps; pass the optimizer")
        self.due, self.fraction = Due(begin, end, every), fraction
        self.steps, self.updates, self.grown = 0, 0, 0
        self._outer = model
        self._weights = named_parameters(unwrapped(model))
        for name, mask in masks.items():
            check_fits(name, mask, self._weights)
        self._hold = hold_(model, masks, optimizers)
        self._gradients: dict[str, Tensor] = {}
        self._handles = [each.register_step_pre_hook(self._before_step) for each in optimizers]

    @property
    def masks(self) -> Masks:
        """What is kept now."""
        return self._hold.masks

    @property
    def done(self) -> bool:
        """Whether the last update has happened."""
        return self.updates > self.due.updates

    def step(self) -> bool:
        """Count one step of the optimizer, drop and grow if that is due, hold the zeros; True after an update.

        An update whose step was skipped, as a GradScaler does, waits for the next step.
        """
        number = self.due.update(self.steps + 1)
        moved = number >= self.updates and len(self._gradients) == len(self.masks)
        if moved:
            self._move(self.fraction * (1 + math.cos(math.pi * number / self.due.updates)) / 2)
            self.updates = number + 1
        else:
            self._hold.step()
        self._gradients = {}
        self.steps += 1
        return moved

    def remove(self) -> None:
        """Stop moving and holding; the zeros of now stay until training moves them."""
        self._hold.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> RigL:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        due = self.due
        return (
            f"RigL({self.masks!r}; fraction {self.fraction:g} from step {due.begin} to {due.end} every {due.every}; "
            f"step {self.steps})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model and the optimizer."""
        return {"steps": self.steps, "updates": self.updates, "masks": dict(self.masks), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken; masks are applied.

        Raises:
            UsageError: the state of another kind of object, interval or model, naming what differs.
        """
        check_same("RigL", self._identity(), state)
        self._hold.masks = masks_of(state)
        self.steps, self.updates = int(state["steps"]), int(state["updates"])

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "RigL",
            "due": [self.due.begin, self.due.end, self.due.every],
            "fraction": self.fraction,
            "kept": {name: int(torch.count_nonzero(mask)) for name, mask in self.masks.items()},
        }

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.due.update(self.steps + 1) < self.updates:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in self.masks:
            weight = self._weights[name]
            gradient = gradient_of(weight, optimizer) if id(weight) in stepped else None
            if gradient is not None:
                self._gradients[name] = gradient.clone()

    @torch.no_grad()
    def _move(self, fraction: float) -> None:
        moved = {name: self._moved(name, mask, fraction) for name, mask in self.masks.items()}
        masks = agreed(Masks(moved), self._outer)
        before = self.masks
        self._hold.masks = masks
        self.grown = sum(int(torch.count_nonzero(mask & ~before[name])) for name, mask in masks.items())

    def _moved(self, name: str, mask: Tensor, fraction: float) -> Tensor:
        """One layer's new mask: as many kept as before."""
        size = whole(self._weights[name].detach()).float().abs().reshape(-1)
        slope = whole(self._gradients[name]).abs().reshape(-1)
        for values, what in ((size, "weights"), (slope, "gradients")):
            if not bool(values.max().isfinite()):
                raise NumericError(
                    f"{name}: NaN or Inf among its {what} after step {self.steps + 1}; its masks stay"
                )
        kept = mask.to(size.device).reshape(-1)
        count = round(fraction * int(torch.count_nonzero(kept)))
        left = kept & ~_lowest(size.masked_fill(~kept, math.inf), count)
        grown = _lowest(slope.neg().masked_fill_(left, math.inf), count)
        return (left | grown).reshape(mask.shape)


def _lowest(scores: Tensor, count: int) -> Tensor:
    return smallest(scores[None], torch.tensor([count]))[0]
