"""Sub-module reconstruction: with the masks frozen, attention and feed-forward learn to answer like the dense model's.

After pruning, each attention and each feed-forward of a block is trained for a few epochs, first to last, so
that on the inputs it now gets it gives what its dense original gives on the dense model's inputs. Only one
sub-module is trained at a time, so memory and time are far below those of training the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.core.masks import check_fits
from secateur.core.statistics import evaluating, forward
from secateur.core.visit import merge, split
from secateur.core.where import layers
from secateur.errors import NumericError, UsageError

__all__ = ["Rebuilt", "reconstruct_"]


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
class _Recipe:
    epochs: int
    rate: float
    patience: int
    generator: torch.Generator


# arguments of a module, what it is to answer, and which positions of the answer count
_Example = tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None]


def reconstruct_(
    model: nn.Module,
    dense: nn.Module,
    masks: Mapping[str, Tensor],
    data: Iterable[Any],
    *,
    epochs: int = 10,
    rate: float = 0.03,
    batch: int = 4,
    held_out: float = 0.125,
    patience: int = 2,
    seed: int = 0,
    tell: Callable[[str, int, int], None] | None = None,
) -> list[Rebuilt]:
    """Train each pruned attention and feed-forward, masks frozen, to give what the dense model's gives.

    Sub-modules are found by structure: in every repeated block the smallest module around all pruned layers of
    one role (a block whose feed-forward has no module of its own is trained as a whole, after its attention).
    What is trained: kept weights of masked parameters, and the biases and norms inside. The best epoch by
    held-out error is taken; a sub-module whose held-out error does not fall is left as it was, bit for bit.

    Args:
        model: pruned; changed in place.
        dense: the model before pruning.
        masks: kept weights, True = kept; pruned ones stay exactly zero.
        data: calibration batches, joined and cut anew.
        epochs: at most, over each sub-module's own data.
        rate: Adam's first step, as a fraction of the root mean square of each parameter's kept weights; it
            falls to zero along a cosine.
        batch: sequences a step.
        held_out: fraction of the sequences that judge and are never trained on; at least one batch.
        patience: epochs without a lower held-out error before a sub-module is given up.
        seed: of the order of batches.
        tell: called with a label, the sub-modules done and their number.

    Returns:
        One entry for each sub-module, in the order in which the model uses them; the same values for the same
        seed, machine and number of threads.

    Raises:
        UsageError: no repeated block with a masked layer, less than two batches of data, or masks of another
            model.
        NumericError: NaN or Inf in the outputs of a sub-module.

    Cost: per sub-module two forward passes of the data up to it (one dense, one pruned), and `epochs` forward
        and backward passes of itself; memory for its inputs and outputs on all data.

    Source: EBFT (Guo et al. 2024) with the windows of "A Free Lunch in LLM Compression" (attention and
        feed-forward apart). Deviations: rates relative to each parameter, stopping by held-out error.
    """
    _check(masks, model, dense, epochs, rate, held_out)
    pieces = split(merge(list(data)), batch)
    if len(pieces) < 2:
        raise UsageError(
            f"reconstruction needs at least two batches of {batch} sequences, one of them to judge by; got "
            f"{len(pieces)}. Give more calibration data, or a smaller batch="
        )
    recipe = _Recipe(epochs, rate, patience, torch.Generator().manual_seed(seed))
    judged = max(1, round(held_out * len(pieces)))
    found = []
    with evaluating(model), evaluating(dense), _without_cache(model), _without_cache(dense):
        paths = _in_order(model, _submodules(model, masks), pieces[0])
        for done, path in enumerate(paths):
            if tell is not None:
                tell("reconstruction", done, len(paths))
            examples = _examples(model, dense, path, pieces)
            own = {n: m for n, m in masks.items() if n.startswith(f"{path}.")}
            found.append(_fit_(model, path, own, examples[:-judged], examples[-judged:], recipe))
        if tell is not None:
            tell("reconstruction", len(paths), len(paths))
    return found


def _check(masks: Mapping[str, Tensor], *given: Any) -> None:
    model, dense, epochs, rate, held_out = given
    for each in (model, dense):
        parameters = dict(each.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            check_fits(name, mask, parameters)
    if epochs < 1 or not 0 < rate < 1 or not 0 < held_out < 1:
        raise UsageError(
            f"expected epochs of at least 1 and rate and held_out between 0 and 1; got epochs={epochs}, "
            f"rate={rate:g}, held_out={held_out:g}"
        )
    if any(p.device != q.device for p, q in zip(model.parameters(), dense.parameters(), strict=False)):
        raise UsageError("the model and its dense original are on different devices; move one of them")


def _submodules(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Paths of the smallest modules around the masked layers of one role in one block."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer in layers(model):
        if layer.name in masks and layer.block is not None:
            groups.setdefault((layer.stack, layer.block, layer.role), []).append(layer.path)
    if not groups:
        raise UsageError(
            "no masked layer stands in a repeated block (transformer layers, stages of a network), so there is "
            "no sub-module to reconstruct; mend the layers one by one instead (secateur.recover)"
        )
    return list(dict.fromkeys(_around(paths) for paths in groups.values()))


def _around(paths: Sequence[str]) -> str:
    """The path of the smallest module that holds all of these; of a single layer, the layer itself."""
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), len(parts))
        common = common[:same]
    return ".".join(common)


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its work
    pass


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A cache of keys and values would grow with every step of training; switched off where a model has one."""
    found: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = [config for config in found.values() if hasattr(config, "use_cache")]
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, used in zip(configs, before, strict=True):
            config.use_cache = used


def _in_order(model: nn.Module, paths: Sequence[str], piece: Any) -> list[str]:
    """The modules in the order in which they finish; those called never or more than once are left out."""
    finished: list[str] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: finished.append(path))
        for path in paths
    ]
    try:
        forward(model, piece)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in finished if finished.count(path) == 1]


def _examples(model: nn.Module, dense: nn.Module, path: str, pieces: Sequence[Any]) -> list[_Example]:
    """What the module gets in the pruned model, and what its original gives in the dense one."""
    found: list[_Example] = []
    for piece in pieces:
        got: list[Any] = []

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], got: list = got) -> None:
            got.append((args, dict(kwargs)))
            raise _Reached

        def answer(module: nn.Module, args: tuple, output: Any, got: list = got) -> None:
            got.append(_tensor(output, path))
            raise _Reached

        _run(model, piece, model.get_submodule(path).register_forward_pre_hook(see, with_kwargs=True))
        _run(dense, piece, dense.get_submodule(path).register_forward_hook(answer))
        (args, kwargs), target = got
        found.append((args, kwargs, target, _real(piece, target)))
    return found


def _run(model: nn.Module, piece: Any, handle: Any) -> None:
    try:
        forward(model, piece)
    except _Reached:
        pass
    finally:
        handle.remove()


def _tensor(output: Any, path: str) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        raise UsageError(
            f"{path}: it returns {type(first).__name__}; expected a tensor, or a tuple that starts with one"
        )
    return first


def _real(piece: Any, target: Tensor) -> Tensor | None:
    """Which positions of the output are no padding; None where all of them count."""
    mask = piece.get("attention_mask") if isinstance(piece, Mapping) else None
    if mask is None or mask.shape != target.shape[:2] or bool(mask.bool().all()):
        return None
    return mask.bool().to(target.device)


def _error(output: Tensor, target: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared error and the target's own square, summed over real positions."""
    if real is not None:
        output, target = output[real], target[real]
    target = target.float()
    return (output.float() - target).square().sum(), target.square().sum()


def _fit_(
    model: nn.Module,
    path: str,
    masks: Mapping[str, Tensor],
    train: Sequence[_Example],
    judge: Sequence[_Example],
    recipe: _Recipe,
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
            sums = [_error(_tensor(functional_call(module, now, a, k), path), t, r) for a, k, t, r in judge]
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
    train: Sequence[_Example],
    recipe: _Recipe,
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
                error, _ = _error(_tensor(functional_call(module, current(), args, kwargs), path), target, real)
                (error / (target.numel() * scale)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        yield


def _rms(value: Tensor) -> float:
    """Root mean square of the entries that are not zero."""
    alive = value.detach()[value.detach() != 0]
    return float(alive.square().mean().sqrt()) if alive.numel() else 0.0
