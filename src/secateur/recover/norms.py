"""Normalisation after units went: RMS norms made exact by rescaling, batch norms by new statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.statistics import evaluating, forward
from secateur.errors import UsageError

__all__ = ["recalibrate_", "rescale_norms_", "rms_norm"]

EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps")
Kind = Literal["plain", "offset"]  # multiplied by w, or by 1 + w


def rescale_norms_(small: nn.Module, model: nn.Module, masks: Masks) -> tuple[str, ...]:
    """Make RMS norms of a shrunk model compute what they compute in the masked model, where zeros still count.

    Over `D` features of which all but `D'` are zero an RMS norm computes, with `S` the sum of squares,
    `x w / sqrt(S / D + e)`, and that is `x w' / sqrt(S / D' + e')` with `w' = w sqrt(D / D')` and `e' = e D / D'`. So
    a norm over the survivors alone becomes exact. (A LayerNorm does not: its mean moves with D.)

    Args:
        small: what `shrink` made of `model`; changed in place.
        model: the masked model.
        masks: the masks.

    Returns:
        Paths of the norms that were rescaled, found by what they compute, not by their names.

    Raises:
        UsageError: a norm whose width in `small` is not what the masks leave.

    Cost: a forward pass of each norm on two random vectors.
    """
    modules, done = dict(small.named_modules()), []
    for path, module in model.named_modules():
        mask = masks.get(f"{path}.weight" if path else "weight")
        kind = None if mask is None or mask.dim() != 1 or bool(mask.all()) else rms_norm(module)
        if kind is None or mask is None:
            continue
        norm, left = modules.get(path), int(mask.sum())
        weight = getattr(norm, "weight", None)
        if not isinstance(norm, nn.Module) or not isinstance(weight, Tensor) or weight.shape != (left,):
            found = None if not isinstance(weight, Tensor) else tuple(weight.shape)
            raise UsageError(
                f"{path}: the masks leave {left} of {mask.numel()} features, but the shrunk model has shape {found}; "
                "give the model, its masks and what shrink made of them"
            )
        share = mask.numel() / left
        offset = 1.0 if kind == "offset" else 0.0
        with torch.no_grad():
            weight.copy_((weight.double() + offset) * share**0.5 - offset)
        name = _epsilon(norm)
        setattr(norm, name, _value(norm, name) * share)
        done.append(path)
    return tuple(done)


def rms_norm(module: nn.Module) -> Kind | None:
    """Whether a module is an RMS norm over its last dimension, told by what it computes; None for anything else.

    Example:
        >>> rms_norm(nn.RMSNorm(8)), rms_norm(nn.LayerNorm(8))
        ('plain', None)
    """
    weight = module._parameters.get("weight")
    name = _epsilon(module)
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or not name:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    try:
        with evaluating(module):
            found = module(x)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    normal = x.double() * (x.double().square().mean(-1, keepdim=True) + _value(module, name)).rsqrt()
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    options: dict[Kind, Tensor] = {"plain": weight.double(), "offset": 1 + weight.double()}
    for kind, factor in options.items():
        expected = normal * factor
        if bool(
            ((found.double() - expected).abs() <= tolerance * (expected.abs() + expected.abs().max())).all()
        ):
            return kind
    return None


def _epsilon(module: nn.Module) -> str:
    return next((name for name in EPSILONS if isinstance(vars(module).get(name, ""), float | None)), "")


def _value(module: nn.Module, name: str) -> float:
    value = getattr(module, name)
    weight: Any = module._parameters["weight"]
    return torch.finfo(weight.dtype).eps if value is None else value  # nn.RMSNorm's default


def recalibrate_(model: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Gather the running means and variances of batch norms anew, because what reaches them has changed.

    Args:
        model: changed in place; a model without batch norms is left as it is.
        data: batches; every batch counts the same, so give batches of one size.

    Returns:
        The model.

    Raises:
        UsageError: no data.

    Cost: one forward pass.
    """
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    every = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norms = [norm for norm in every if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    batches = 0
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over batches
                norm.train()
            for batch in data if norms else ():
                forward(model, batch)
                batches += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if norms and not batches:
        raise UsageError("data holds no batch; the statistics of batch norms need at least one")
    return model
