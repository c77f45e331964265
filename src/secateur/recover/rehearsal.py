"""What reconstruction takes on this machine, measured on one block of the model with nothing pruned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.forward import undisturbed
from secateur.core.visit import split
from secateur.core.where import Layer
from secateur.recover.chain import is_chain
from secateur.recover.fitting import Fitting, fit_
from secateur.recover.reconstruct import around, examples_of, without_cache

__all__ = ["Clock", "Rehearsed", "rehearse", "timed"]

Clock = Callable[[], float]

SHORT = 0.05  # seconds; what is shorter is measured again


@dataclass(frozen=True)
class Rehearsed:
    """Seconds that one block takes with one piece of data.

    Attributes:
        forward: a forward pass of the block.
        judged: a forward pass of its sub-modules with the weights being trained.
        step: forward, backward and a step of Adam of its sub-modules, one after the other.
        submodules: how many these are.
        shared: its layers, those together that read the same input.
        chain: whether the data walk from block to block, or are run from the model's start to each sub-module.
    """

    forward: float
    judged: float
    step: float
    submodules: int
    shared: tuple[tuple[Layer, ...], ...]
    chain: bool


def rehearse(
    model: nn.Module, block: str, layers: Sequence[Layer], piece: Any, *, clock: Clock = time.perf_counter
) -> Rehearsed:
    """Time one block, and its reconstruction with nothing pruned, which changes nothing.

    Args:
        model: not changed.
        block: path of the block.
        layers: what is to be pruned in it.
        piece: as many sequences as a step of reconstruction takes.
        clock: what time is told by.

    Cost: two forward passes of the piece up to the block and through it for each sub-module, a handful of
        forward and backward passes of the block, and two forward passes of one sequence through the model.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.role, []).append(layer)
    paths = list(dict.fromkeys(around([layer.path for layer in group]) for group in groups.values()))
    module = model.get_submodule(block)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with undisturbed(model), without_cache(model):
        ((args, kwargs, _, _),) = examples_of(model, model, block, [piece])
        chain = is_chain(model, paths, split(piece, 1)[0])
        shared = _shared(module, layers, args, kwargs)
        forward = timed(lambda: module(*args, **kwargs), clock)
        judged = step = 0.0
        for path in paths:
            own = {
                layer.name: torch.ones_like(layer.weight, dtype=torch.bool)
                for layer in layers
                if layer.name.startswith(f"{path}.")
            }
            (example,) = examples_of(model, model, path, [piece])

            def fitted(steps: int, path: str = path, own: Any = own, example: Any = example) -> Any:
                how = Fitting(1, 1e-9, 0, torch.Generator())
                return lambda: fit_(model, path, own, [example] * steps, [example], how)

            one, three = (timed(fitted(steps), clock) for steps in (1, 3))
            taken = max(0.0, (three - one) / 2)
            judged, step = judged + max(0.0, one - taken) / 2, step + taken
    with torch.no_grad():
        for parameter, old in zip(module.parameters(), before, strict=True):
            parameter.copy_(old)
    return Rehearsed(forward, judged, step, len(paths), shared, chain)


def timed(what: Callable[[], Any], clock: Clock) -> float:
    """Seconds of one call; the least of five where it is short."""
    found: list[float] = []
    while not found or (len(found) < 5 and found[0] < SHORT):
        start = clock()
        what()
        found.append(clock() - start)
    return min(found)


def _shared(
    module: nn.Module, layers: Iterable[Layer], args: Any, kwargs: Any
) -> tuple[tuple[Layer, ...], ...]:
    """The layers in the order in which the block uses them, those together that read the very same tensor."""
    seen: list[tuple[Tensor, list[Layer]]] = []
    by_module = {id(layer.module): layer for layer in layers}

    def see(owner: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        layer = by_module.pop(id(owner), None)
        first = next((each for each in (*given, *named.values()) if isinstance(each, Tensor)), None)
        if layer is None or first is None:
            return
        for tensor, found in seen:
            if tensor is first and found[0].layout.shape[2] == layer.layout.shape[2]:
                found.append(layer)
                return
        seen.append((first, [layer]))

    handles = [layer.module.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return (*(tuple(found) for _, found in seen), *((layer,) for layer in by_module.values()))
