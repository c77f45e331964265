"""Prune a neural network and keep the gain.

The names below are loaded when they are first used, so that `secateur --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it; a subpackage is defined by this one
_HOME = {
    "Adapters": "secateur.recover",
    "Blocks": "secateur.pattern",
    "Columns": "secateur.pattern",
    "Masks": "secateur.core.masks",
    "Measurement": "secateur.evaluate",
    "NM": "secateur.pattern",
    "Percentile": "secateur.allocate",
    "Plan": "secateur.prune",
    "Recipe": "secateur.recipes",
    "Rows": "secateur.pattern",
    "Threshold": "secateur.allocate",
    "Tuned": "secateur.recover",
    "Weights": "secateur.pattern",
    "activation": "secateur.recipes",
    "admm": "secateur.recipes",
    "align": "secateur",
    "alps": "secateur.recipes",
    "distill_": "secateur.recover",
    "finetune_": "secateur.recover",
    "fisher": "secateur.recipes",
    "global_magnitude": "secateur.recipes",
    "globally": "secateur.allocate",
    "hold_": "secateur.core.hold",
    "lora_": "secateur.recover",
    "magnitude": "secateur.recipes",
    "merge_": "secateur.recover",
    "per_layer": "secateur.allocate",
    "per_row": "secateur.allocate",
    "percentile": "secateur.recipes",
    "plan": "secateur.prune",
    "prune_": "secateur.prune",
    "random": "secateur.recipes",
    "ria": "secateur.recipes",
    "sparsegpt": "secateur.recipes",
    "sparsity": "secateur.core.counts",
    "taylor": "secateur.recipes",
    "threshold": "secateur.recipes",
    "undo_": "secateur.core.masks",
    "wanda": "secateur.recipes",
    "wanda_l1": "secateur.recipes",
    "wanda_mended": "secateur.recipes",
}

__all__ = [
    "NM",
    "Adapters",
    "Blocks",
    "Columns",
    "Masks",
    "Measurement",
    "Percentile",
    "Plan",
    "Recipe",
    "Rows",
    "Threshold",
    "Tuned",
    "Weights",
    "__version__",
    "activation",
    "admm",
    "align",
    "alps",
    "distill_",
    "finetune_",
    "fisher",
    "global_magnitude",
    "globally",
    "hold_",
    "lora_",
    "magnitude",
    "merge_",
    "per_layer",
    "per_row",
    "percentile",
    "plan",
    "prune_",
    "random",
    "ria",
    "sparsegpt",
    "sparsity",
    "taylor",
    "threshold",
    "undo_",
    "wanda",
    "wanda_l1",
    "wanda_mended",
]

if TYPE_CHECKING:
    from secateur import align
    from secateur.allocate import Percentile, Threshold, globally, per_layer, per_row
    from secateur.core.counts import sparsity
    from secateur.core.hold import hold_
    from secateur.core.masks import Masks, undo_
    from secateur.evaluate import Measurement
    from secateur.pattern import NM, Blocks, Columns, Rows, Weights
    from secateur.prune import Plan, plan, prune_
    from secateur.recipes import (
        Recipe,
        activation,
        admm,
        alps,
        fisher,
        global_magnitude,
        magnitude,
        percentile,
        random,
        ria,
        sparsegpt,
        taylor,
        threshold,
        wanda,
        wanda_l1,
        wanda_mended,
    )
    from secateur.recover import Adapters, Tuned, distill_, finetune_, lora_, merge_


def __getattr__(name: str) -> Any:
    if name in _HOME:
        home = _HOME[name]
        return import_module(f"{home}.{name}") if home == __name__ else getattr(import_module(home), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
