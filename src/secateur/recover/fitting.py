"""One sub-module trained, masks frozen, to answer as its dense original does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.errors import NumericError, UsageError

__all__ = ["Example", "Fitting", "Rebuilt", "fit_", "tensor_of"]


@dataclass(frozen=True)
class Rebuilt:
    """What reconstruction did to one sub-module.

    Attributes:
        path: path of the module.
        before, after: held-out squared error of its outputs as a fraction of the dense outputs' square; equal
            where it was left as it was.
        epochs: epochs that were run, those after the best included.
    """

    path: str
    before: float
    after: float
    epochs: int


@dataclass(frozen=True)
class Fitting:
    """How long and how fast."""

    epochs: int
    rate: float
    patience: int
    generator: torch.Generator


# arguments of a module, what it is to answer, and which positions of the answer count
Example = tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None]


def tensor_of(output: Any, path: str) -> Tensor:
    """The answer of a module: a tensor, or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise UsageError(
            f"{path}: it returns {type(first).__name__}; expected a tensor, or a tuple that starts with one"
        )
    return first


def _error(output: Tensor, target: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared error and the target's own square, summed over real positions."""
    if real is not None:
        output, target = output[real], target[real]
    target = target.float()
    return (output.float() - target).square().sum(), target.square().sum()


def fit_(
    model: nn.Module,
    path: str,
    masks: Mapping[str, Tensor],
    train: Sequence[Example],
    judge: Sequence[Example],
    recipe: Fitting,
) -> Rebuilt:
    """Train one sub-module and take its best epoch."""
    module = model.get_submodule(path)
    kept = {name.removeprefix(f"{path}."): mask for name, mask in masks.items()}
    names = _trained(model, module, kept)
    plain = dict(module.named_parameters())
    # trained in float32 whatever the model's own format: small steps would be lost in half precision
    values = {name: plain[name].detach().float().clone().requires_grad_() for name in names}
    keep = {name: kept[name].to(values[name].device).float() for name in names if name in kept}

    def current() -> dict[str, Tensor]:
        return {n: (v * keep[n] if n in keep else v).to(plain[n].dtype) for n, v in values.items()}

    def judged() -> float:
        with torch.no_grad():
            now = current()
            sums = [_error(tensor_of(functional_call(module, now, a, k), path), t, r) for a, k, t, r in judge]
        return float(sum(s[0] for s in sums)) / max(float(sum(s[1] for s in sums)), 1e-30)

    before = best = judged()
    if not math.isfinite(before):
        raise NumericError(f"{path}: NaN or Inf among its outputs; look at the data and at the weights")
    chosen, since, epoch = None, 0, 0
    for _ in _epochs(module, path, values, current, train, recipe):
        error = judged()
        epoch, since = epoch + 1, since + 1
        if error < best:
            best, since = error, 0
            chosen = {name: value.detach().clone() for name, value in current().items()}
        if since > recipe.patience or not math.isfinite(error):
            break
    if chosen is not None:
        with torch.no_grad():
            for name, value in chosen.items():
                plain[name].copy_(value.masked_fill(~kept[name].to(value.device), 0) if name in kept else value)
    return Rebuilt(path, before, best, epoch)


def _trained(model: nn.Module, module: nn.Module, kept: Mapping[str, Tensor]) -> list[str]:
    """Masked parameters, and the vectors beside them; nothing that other modules share."""
    inside = dict(module.named_parameters())
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    return [
        name
        for name, parameter in inside.items()
        if parameter.is_floating_point()
        and places[id(parameter)] == 1
        and (name in kept or parameter.dim() == 1)
    ]


def _epochs(
    module: nn.Module,
    path: str,
    values: dict[str, Tensor],
    current: Any,
    train: Sequence[Example],
    recipe: Fitting,
) -> Iterator[None]:
    """Adam over the training pieces in a new random order each epoch; yields after each epoch."""
    whole = max((_rms(value) for value in values.values() if value.dim() > 1), default=1.0)
    groups = [
        {"params": [value], "rate": recipe.rate * (_rms(value) if value.dim() > 1 else whole)}
        for value in values.values()
    ]
    optimizer = torch.optim.Adam([{**group, "lr": group["rate"]} for group in groups], betas=(0.9, 0.95))
    scale = max(float(sum(t.float().square().mean() for _, _, t, _ in train)) / len(train), 1e-30)
    step, steps = 0, recipe.epochs * len(train)
    for _ in range(recipe.epochs):
        for place in torch.randperm(len(train), generator=recipe.generator).tolist():
            args, kwargs, target, real = train[place]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.enable_grad():
                error, _ = _error(
                    tensor_of(functional_call(module, current(), args, kwargs), path), target, real
                )
                (error / (target.numel() * scale)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        yield


def _rms(value: Tensor) -> float:
    """Root mean square of the entries that are not zero."""
    alive = value.detach()[value.detach() != 0]
    return float(alive.square().mean().sqrt()) if alive.numel() else 0.0
