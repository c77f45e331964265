"""Sub-module reconstruction: with the masks frozen, attention and feed-forward learn to answer like the dense model's.

After pruning, each attention and each feed-forward of a block is trained for a few epochs, first to last, so
that on the inputs it now gets it gives what its dense original gives on the dense model's inputs. Only one
sub-module is trained at a time, so memory and time are far below those of training the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.masks import check_fits
from secateur.core.statistics import evaluating, forward
from secateur.core.visit import merge, split
from secateur.core.where import layers
from secateur.errors import UsageError
from secateur.recover.chain import Reached, chained
from secateur.recover.fitting import Example, Fitting, Rebuilt, fit_, tensor_of

__all__ = ["Rebuilt", "around", "examples_of", "reconstruct_", "without_cache"]


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

    Cost: for each block a forward pass of the data in either model, and up to each of its sub-modules one more;
        then `epochs` forward and backward passes of each sub-module. Memory for hidden states of all data four
        times over: what stands before the block in either model, and inputs and outputs of the sub-module; and for
        the masks and positions that blocks are called with. A model whose blocks are no simple chain
        (`secateur.recover.chain`) is run from its start to each sub-module instead, so time grows with the square
        of its depth; the values are the same, and only inputs and outputs are kept.

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
    recipe = Fitting(epochs, rate, patience, torch.Generator().manual_seed(seed))
    judged = max(1, round(held_out * len(pieces)))
    found = []
    with evaluating(model), evaluating(dense), without_cache(model), without_cache(dense):
        paths = _in_order(model, _submodules(model, masks), pieces[0])
        walks = chained(model, dense, paths, pieces)
        for done, path in enumerate(paths):
            if tell is not None:
                tell("reconstruction", done, len(paths))
            for walk in walks or ():
                walk.to(path)
            examples = examples_of(model, dense, path, pieces, walks)
            own = {n: m for n, m in masks.items() if n.startswith(f"{path}.")}
            found.append(fit_(model, path, own, examples[:-judged], examples[-judged:], recipe))
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
    return list(dict.fromkeys(around(paths) for paths in groups.values()))


def around(paths: Sequence[str]) -> str:
    """The path of the smallest module that holds all of these; of a single layer, the layer itself."""
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), len(parts))
        common = common[:same]
    return ".".join(common)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
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


def examples_of(
    model: nn.Module,
    dense: nn.Module,
    path: str,
    pieces: Sequence[Any],
    through: tuple[Callable[[int], Any], Callable[[int], Any]] | None = None,
) -> list[Example]:
    """What the module gets in the pruned model, and what its original gives in the dense one.

    Args:
        model: the pruned one.
        dense: the other one.
        path: of the module in both.
        pieces: of data.
        through: runs the piece of a number through the module, in the one model and in the other; both whole models
            where left out.
    """
    pruned, whole = through or [partial(_from_start, each, pieces) for each in (model, dense)]
    found: list[Example] = []
    for number, piece in enumerate(pieces):
        got: list[Any] = []

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any], got: list = got) -> None:
            got.append((args, dict(kwargs)))
            raise Reached

        def answer(module: nn.Module, args: tuple, output: Any, got: list = got) -> None:
            got.append(tensor_of(output, path))
            raise Reached

        _run(pruned, number, model.get_submodule(path).register_forward_pre_hook(see, with_kwargs=True))
        _run(whole, number, dense.get_submodule(path).register_forward_hook(answer))
        (args, kwargs), target = got
        found.append((args, kwargs, target, _real(piece, target)))
    return found


def _from_start(model: nn.Module, pieces: Sequence[Any], number: int) -> None:
    forward(model, pieces[number])


def _run(through: Callable[[int], Any], number: int, handle: Any) -> None:
    try:
        through(number)
    except Reached:
        pass
    finally:
        handle.remove()


def _real(piece: Any, target: Tensor) -> Tensor | None:
    """Which positions of the output are no padding; None where all of them count."""
    mask = piece.get("attention_mask") if isinstance(piece, Mapping) else None
    if mask is None or mask.shape != target.shape[:2] or bool(mask.bool().all()):
        return None
    return mask.bool().to(target.device)
