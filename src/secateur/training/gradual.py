"""Prune a little at a time while the model trains: the one object with a state and a `step()`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from secateur.core.hold import hold_, plain_optimizers, unwrapped
from secateur.core.masks import Masks, undo_
from secateur.core.trained import GATHERED, TRAINED, Gathering
from secateur.core.where import Only
from secateur.errors import UsageError
from secateur.prune import plan, prune_
from secateur.recipes import Recipe
from secateur.schedule import Due, Schedule, targets
from secateur.training.agreement import agreed, together
from secateur.training.resume import check_same, masks_of

__all__ = ["Gradual"]


class Gradual:
    """Prune to a schedule while training goes on, and hold every zero in between; shaped like an lr_scheduler.

    Call `step()` once after every step of the optimizer. After step `begin`, and every `every` steps from there to
    `end`, the masks grow to the sparsity that the schedule asks for; what is pruned stays pruned, so going from
    sparsity a to b removes (b - a) / (1 - a) of what remains, counted exactly.

    Args:
        model: the model that trains, bare or wrapped (DataParallel, DistributedDataParallel, `torch.compile`,
            `fully_shard`).
        recipe: as for `prune_`; one that follows a sparsity (no threshold, no N:M, no update of weights).
        schedule: progress in [0, 1] -> sparsity; `cubic(0.0, 0.9)`, `linear`, `exponential`, `constant`, `points`,
            or a function of your own.
        begin, end, every: in steps; `every` must divide `end - begin`. With `begin=0` the first update happens
            in the first `step()`.
        optimizer: one or several; then zeros are written right after each of their steps, and the running means of
            pruned weights' gradients are zero, too. Without it, `step()` writes the zeros.
        data, loss: for recipes that need them; calibration batches that can be gone through again at every update.
            Without them, scores that ask for `grad` or `grad_squared` get the mean over the steps since the last
            update, and those that ask for `movement` its sum over all steps; then an optimizer is needed.
        only, skip, seed: as for `prune_`.
        masks: of an earlier pruning, where the schedule goes on from.
        gradients: see `hold_`.

    Attributes:
        steps: calls of `step()` so far.
        masks: what is pruned now; empty before the first update.
        targets: the sparsity of every update.

    Raises:
        UsageError: a schedule that never reaches its end, falls, or starts below the masks given; a recipe that
            does not follow a sparsity; and what `prune_` and `hold_` refuse.
        NumericError: by `step()`, at an update: NaN or Inf in a weight, naming the layer. Nothing has changed then.

    Cost: see `hold_`; every update is a call of `prune_`.

    Source: Zhu and Gupta 2017, "To prune, or not to prune". Deviation: counts are exact, and masks are nested.

    Example:
        >>> import torch
        >>> from secateur.recipes import magnitude
        >>> from secateur.schedule import cubic
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = Gradual(model, magnitude, cubic(0.0, 0.9), begin=2, end=8, every=2, optimizer=optimizer)
        >>> for _ in range(10):
        ...     model(torch.randn(4, 10)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = pruner.step()
        >>> pruner.masks.zeros, int((model.weight == 0).sum()), pruner.done
        (90, 90, True)
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        schedule: Schedule,
        begin: int,
        end: int,
        every: int,
        *,
        optimizer: Any = None,
        data: Iterable[Any] | None = None,
        loss: Any = None,
        only: Only = None,
        skip: Only = None,
        seed: int = 0,
        masks: Masks | None = None,
        gradients: bool = False,
    ) -> None:
        _check_recipe(recipe)
        if data is not None and iter(data) is data:
            raise UsageError("data can be gone through only once; every update needs them, so give a list")
        self.due = Due(begin, end, every)
        self.targets = targets(schedule, self.due)
        self.recipe, self.schedule = recipe, schedule
        self.steps, self.updates = 0, 0
        self._outer, self._model = model, unwrapped(model)
        self._how = {"data": data, "loss": loss, "only": only, "skip": skip, "seed": seed}
        self._layers = plan(self._model, self.targets[-1], recipe, only=only, skip=skip)
        self._hold = hold_(model, masks or Masks({}), optimizer, gradients=gradients)
        self._check_start(masks)
        self._gathering = self._gather(plain_optimizers(optimizer))

    @property
    def masks(self) -> Masks:
        """What is pruned now; empty before the first update."""
        return self._hold.masks

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the chosen layers' weights, now."""
        return self.masks.zeros / self._layers.size

    @property
    def done(self) -> bool:
        """Whether the last update has happened."""
        return self.updates > self.due.updates

    def step(self) -> bool:
        """Count one step of the optimizer, prune if that is due, hold what is pruned; True after an update."""
        number = self.due.update(self.steps + 1)
        pruned = number >= self.updates
        if pruned:
            self._prune(self.targets[number])
            self.updates = number + 1
        else:
            self._hold.step()
        self.steps += 1
        return pruned

    def remove(self) -> None:
        """Stop pruning and holding; the zeros of now stay until training moves them."""
        self._hold.remove()
        if self._gathering is not None:
            self._gathering.remove()

    def __enter__(self) -> Gradual:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        due = self.due
        return (
            f"Gradual({self.recipe}; {self.schedule!r} from step {due.begin} to {due.end} every {due.every}; "
            f"step {self.steps}, sparsity {self.sparsity:.4f})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model and the optimizer: numbers, strings and tensors."""
        state = {"steps": self.steps, "updates": self.updates, "masks": dict(self.masks), **self._identity()}
        return state if self._gathering is None else state | {"gathered": self._gathering.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken, with the same recipe, schedule and layers; masks are applied.

        Raises:
            UsageError: the state of another kind of object, recipe, schedule or model, naming what differs.
        """
        check_same("Gradual", self._identity(), state)
        self._hold.masks = masks_of(state)
        self.steps, self.updates = int(state["steps"]), int(state["updates"])
        if self._gathering is not None:
            self._gathering.load_state_dict(state["gathered"])

    def _identity(self) -> dict[str, Any]:
        """What must be the same after a resume; schedules are compared by the sparsities that they ask for."""
        return {
            "kind": "Gradual",
            "recipe": self.recipe.describe(),
            "targets": list(self.targets),
            "due": [self.due.begin, self.due.end, self.due.every],
            "layers": {layer.name: list(layer.weight.shape) for layer in self._layers.layers},
            "seed": self._how["seed"],
        }

    def _prune(self, sparsity: float) -> None:
        known = None if self._gathering is None else self._gathering.values()
        own = self._how["data"] is not None and together(self._outer)  # other data in every process
        masks = prune_(
            self._model,
            sparsity,
            self.recipe,
            masks=self.masks or None,
            statistics=known,
            keep_originals=own,
            **self._how,
        )
        if own:
            undo_(self._model, masks)
            masks = agreed(masks, self._outer)
        self._hold.masks = masks
        if self._gathering is not None:
            self._gathering.renew()

    def _gather(self, optimizers: tuple[Any, ...]) -> Gathering | None:
        """What the recipe wants to know of training: everything of that kind, or only what data cannot give."""
        wanted = GATHERED if self._how["data"] is None else TRAINED
        names = [name for name in self._layers.statistics if name in wanted]
        if not names:
            return None
        if not optimizers:
            raise UsageError(
                f"{self.recipe.describe()['score']} needs {', '.join(names)} from the steps of training; pass "
                "optimizer="
            )
        return Gathering(self._layers.layers, names, optimizers)

    def _check_start(self, masks: Masks | None) -> None:
        chosen = {layer.name for layer in self._layers.layers}
        for name in masks or ():
            if name not in chosen:
                raise UsageError(
                    f"the masks given prune {name}, which is not chosen; choose it, or leave it out"
                )
        zeros = (masks or Masks({})).zeros
        if zeros > round(self._layers.size * self.targets[0]):
            raise UsageError(
                f"the schedule starts at sparsity {self.targets[0]:g}, but the masks given already prune "
                f"{zeros / self._layers.size:g} of the chosen weights; start it there"
            )


def _check_recipe(recipe: Any) -> None:
    """Recipes whose sparsity cannot be steered, or which change kept weights."""
    if not isinstance(recipe, Recipe):
        return  # `plan` says it better
    if recipe.fixed_by_pattern:
        raise UsageError(
            f"{recipe.pattern} fixes the sparsity, so it cannot grow; prune_ once and hold_ the masks"
        )
    if getattr(recipe.allocate, "decides", False):
        raise UsageError(
            f"{recipe.allocate!r} decides how much is cut, so no schedule can; take Thresholding, or a recipe that "
            "follows a sparsity"
        )
    if recipe.update is not None:
        raise UsageError(
            f"{recipe} finds its own masks in one shot; training mends the weights here, so take it without its update"
        )
