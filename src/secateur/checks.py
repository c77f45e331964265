"""What has to hold before anything is pruned, and what must have been reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.core.feasible import coarsest
from secateur.core.masks import Masks, check_fits
from secateur.core.select import Candidates
from secateur.core.site import Site
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError
from secateur.scoring import finite

if TYPE_CHECKING:
    from secateur.prune import Plan

__all__ = ["bias_name", "check_masks", "check_nonzero", "check_stays_pruned", "check_total", "check_weights"]


def bias_name(layer: Layer) -> str:
    """The parameter name of a layer's own bias."""
    return f"{layer.path}.{layer.layout.bias}" if layer.path else str(layer.layout.bias)


def check_masks(masks: Masks | None, sites: Iterable[Site], parameters: Mapping[str, nn.Parameter]) -> None:
    """Earlier masks are of what is pruned now, and fit."""
    known = {name for site in sites for name in site.parameters}
    for name, mask in (masks or {}).items():
        if name not in known:
            raise UsageError(
                f"the earlier masks prune {name}, which is not chosen now; choose it too, or leave masks out"
            )
        check_fits(name, mask, {name: parameters[name]})


def check_weights(layers: Iterable[Layer]) -> None:
    """Before the data run through the model, so that the layer named is the one that is ill."""
    for layer in layers:
        if layer.weight.is_meta:
            raise UsageError(f"{layer.name} is on the meta device and has no values; load the weights first")
        if not finite(layer.values.float()):
            raise NumericError(
                f"{layer.name}: NaN or Inf among its weights, read as float32; it cannot be pruned. "
                "Mend it, or the step that made it, or leave the layer out (skip)"
            )


def check_total(todo: Plan, candidates: Mapping[str, Candidates], counts: Mapping[str, Tensor]) -> None:
    """Exactly what was asked, or an error before anything is changed."""
    kept = sum(int(counts[name].sum()) * layer.cells for name, layer in candidates.items())
    if todo.keep is None:
        if kept == todo.size:
            raise UsageError(f"{todo.recipe}: no weight is pruned by it; every score lies above. Raise it")
        return
    if abs(kept - todo.keep) >= max(coarsest(candidates), 1):
        raise UsageError(
            f"{todo.recipe}: sparsity {todo.sparsity:.4f} cannot be reached in whole units; "
            f"nearest {1 - kept / todo.size:.4f}"
        )


def check_stays_pruned(kept: Mapping[str, Tensor], masks: Masks | None) -> None:
    """A lower share than the earlier masks took, or units that hold pruned and kept weights, would bring some back."""
    for name, mask in (masks or {}).items():
        back = int(torch.count_nonzero(kept[name] & ~mask.to(kept[name].device)))
        if back:
            raise UsageError(
                f"{name}: {back:,} of the weights that the earlier masks prune would be kept again; ask for a higher "
                "sparsity with the pattern and allocation of before, or leave masks out"
            )


def check_nonzero(parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor], nonzero: int) -> None:
    """Kept weights that happen to be zero would fall short of the promised number."""
    for name, mask in kept.items():
        idle = int(torch.count_nonzero(mask & (parameters[name] == 0)))
        if idle:
            raise UsageError(
                f"{name}: {idle:,} of the weights it would keep are already zero, so {nonzero:,} non-zeros cannot be "
                "reached with equal shares; use a global allocation"
            )
