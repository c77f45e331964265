"""Pruned weights stay zero while a model trains: held by mask, not by value.

Gradients that are zeroed where a weight is zero stop neither momentum nor decoupled weight decay, and a weight that
merely happens to be zero is not a pruned one. So every step of the optimizer is followed by writing zero bits where
the mask says so, into the weights and into the optimizer's running means of their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.forward import unwrapped
from secateur.core.masks import Masks, check_fits, named_parameters, zero_
from secateur.core.sharded import local, same_order, shard_like
from secateur.errors import UsageError

__all__ = ["Hold", "hold_", "plain_optimizers", "unwrapped"]

# What an optimizer calls a running mean of gradients or of updates; second moments are not among them: left to
# follow the gradients, they are what a weight needs on the day it is released.
MOMENTA = ("momentum_buffer", "exp_avg", "ax", "prev")


class Hold:
    """Keeps the pruned weights of one model at zero until it is removed; made by `hold_`.

    Attributes:
        masks: what is held. Assigning new masks holds those from now on; weights that they keep again start at
            zero, with no momentum.
    """

    def __init__(
        self, model: nn.Module, masks: Masks, optimizers: tuple[Optimizer, ...], gradients: bool
    ) -> None:
        self._model = unwrapped(model)
        self._optimizers = optimizers
        self._gradients = gradients
        self._held: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._on_gradients: list[Any] = []
        self.masks = masks
        self._on_steps = [each.register_step_post_hook(lambda *_: self.step()) for each in optimizers]

    @property
    def masks(self) -> Masks:
        """What is held."""
        return self._masks

    @masks.setter
    def masks(self, masks: Masks) -> None:
        parameters = named_parameters(self._model)
        for name, mask in masks.items():
            check_fits(name, mask, parameters)
        held = {name: (parameters[name], _mask_of(parameters[name], mask)) for name, mask in masks.items()}
        _check_optimizers(self._optimizers, held)
        self._masks, self._held = masks, held
        if self._gradients:
            self._watch_gradients()
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Write the zeros; called by itself after every step of the optimizers that were given."""
        for name, (weight, mask) in self._held.items():
            values = local(weight.detach())
            if mask.device != values.device:  # the model has moved
                mask = mask.to(values.device)
                self._held[name] = weight, mask
            zero_(values, mask)
            for optimizer in self._optimizers:
                state = optimizer.state.get(weight, {})
                for key in MOMENTA:
                    mean = state.get(key)
                    if isinstance(mean, Tensor) and mean.shape == weight.shape:
                        zero_(local(mean), mask)

    def remove(self) -> None:
        """Let go: the weights keep their zeros of now and may move again. Removing twice does nothing."""
        for handle in (*self._on_steps, *self._on_gradients):
            handle.remove()
        self._on_steps, self._on_gradients = [], []
        self._held = {}

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Hold({self.masks!r})"

    def _watch_gradients(self) -> None:
        for handle in self._on_gradients:
            handle.remove()
        self._on_gradients = [
            weight.register_post_accumulate_grad_hook(self._mask_gradient(name))
            for name, (weight, _) in self._held.items()
            if weight.requires_grad
        ]

    def _mask_gradient(self, name: str) -> Any:
        def mask_gradient(weight: Tensor) -> None:
            if name in self._held and weight.grad is not None:
                values = local(weight.grad)
                zero_(values, self._held[name][1].to(values.device))

        return mask_gradient


def hold_(
    model: nn.Module,
    masks: Masks,
    optimizer: Any = None,
    *,
    gradients: bool = False,
) -> Hold:
    """Set the pruned weights to zero and keep them there, bit for bit, while the model trains.

    Args:
        model: the model, bare or inside DataParallel, DistributedDataParallel, `torch.compile` or `fully_shard`.
        masks: what `prune_` returned.
        optimizer: one optimizer or several; zeros are then written after each of their steps, whoever calls them
            (a GradScaler, a trainer). Without one, call `step()` of what is returned after each step.
        gradients: also zero the gradients of pruned weights as they are accumulated, so that clipping by the norm
            sees the kept weights alone. Leave it off where something wants to know them (growing back).

    Returns:
        The hold: a context manager with `masks`, `step()` and `remove()`.

    Raises:
        UsageError: masks of another model; an optimizer that trains none of the masked parameters.

    Cost: after a step, one pass over the masked weights and one over each running mean of their gradients; a copy of
        the masks, one byte a weight, where they lie on another device or in another order than the weights.

    Example:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> masks = Masks({"weight": torch.tensor([[True, False, True, False]])})
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> with hold_(model, masks, optimizer):
        ...     model(torch.ones(4)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == 0).tolist()
        [[False, True, False, True]]
    """
    return Hold(model, masks, plain_optimizers(optimizer), gradients)


def plain_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """The optimizers themselves, out of wrappers that step an inner one (accelerate's)."""
    if optimizer is None:
        return ()
    given = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    found = []
    for each in given:
        while isinstance(getattr(each, "optimizer", None), Optimizer):
            each = each.optimizer
        if not isinstance(each, Optimizer):
            raise UsageError(
                f"optimizer is {each!r}; expected a torch.optim.Optimizer, several of them, or None"
            )
        found.append(each)
    return tuple(found)


def _mask_of(weight: nn.Parameter, mask: Tensor) -> Tensor:
    """The mask where the weight is, sharded as it is, in its order of memory."""
    return same_order(local(weight.detach()), shard_like(weight, mask))


def _check_optimizers(optimizers: tuple[Optimizer, ...], held: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    if optimizers and held and not any(id(weight) in trained for weight, _ in held.values()):
        raise UsageError(
            f"the optimizer trains none of the {len(held)} masked parameters ({next(iter(held))}, ...); it was made "
            "for another model, or before the model was wrapped. Make it from this model's parameters"
        )
