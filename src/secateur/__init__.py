"""Prune a neural network and keep the gain.

The names below are loaded when they are first used, so that `secateur --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it; a subpackage is defined by this one
_HOME = {
    "ADMM": "secateur.recover",
    "ALPS": "secateur.recover",
    "Adapters": "secateur.recover",
    "Best": "secateur.best",
    "Blocks": "secateur.pattern",
    "Columns": "secateur.pattern",
    "Gradual": "secateur.training",
    "IntoBias": "secateur.recover",
    "Layers": "secateur.pattern",
    "LeastSquares": "secateur.recover",
    "LightningCallback": "secateur.training",
    "Masks": "secateur.core.masks",
    "Measurement": "secateur.evaluate",
    "NM": "secateur.pattern",
    "OWL": "secateur.allocate",
    "Percentile": "secateur.allocate",
    "Plan": "secateur.prune",
    "Quantized": "secateur.deploy",
    "RIA": "secateur.score",
    "Recipe": "secateur.recipes",
    "RigL": "secateur.training",
    "Rows": "secateur.pattern",
    "Shares": "secateur.allocate",
    "Slope": "secateur.allocate",
    "SparseGPT": "secateur.recover",
    "Swaps": "secateur.recover",
    "Threshold": "secateur.allocate",
    "Thresholding": "secateur.training",
    "Tuned": "secateur.recover",
    "Weights": "secateur.pattern",
    "activation": "secateur.recipes",
    "admm": "secateur.recipes",
    "align": "secateur",
    "alps": "secateur.recipes",
    "angular_distance": "secateur.recipes",
    "best_": "secateur.best",
    "block_influence": "secateur.recipes",
    "choose_blocks": "secateur.depth",
    "constant": "secateur.schedule",
    "cubic": "secateur.schedule",
    "distill_": "secateur.recover",
    "drop_blocks": "secateur.deploy",
    "drop_blocks_": "secateur.deploy",
    "exponential": "secateur.schedule",
    "finetune_": "secateur.recover",
    "fisher": "secateur.recipes",
    "geometric": "secateur.schedule",
    "global_magnitude": "secateur.recipes",
    "globally": "secateur.allocate",
    "hold_": "secateur.core.hold",
    "last_blocks": "secateur.recipes",
<<<<<<< HEAD
    "linear": "secateur.schedule",
=======
    "load_quantized_": "secateur.deploy",
>>>>>>> recover
    "lora_": "secateur.recover",
    "loss_without": "secateur.recipes",
    "magnitude": "secateur.recipes",
    "mend_units_": "secateur.recover",
    "merge_": "secateur.recover",
    "merge_blocks": "secateur.deploy",
    "merge_blocks_": "secateur.deploy",
    "movement": "secateur.recipes",
    "per_layer": "secateur.allocate",
    "per_row": "secateur.allocate",
    "percentile": "secateur.recipes",
    "plan": "secateur.prune",
    "points": "secateur.schedule",
    "prune_": "secateur.prune",
<<<<<<< HEAD
    "prune_checkpoint": "secateur.stream",
=======
    "quantize_": "secateur.deploy",
>>>>>>> recover
    "random": "secateur.recipes",
    "random_blocks": "secateur.recipes",
    "recalibrate_": "secateur.recover",
    "reconstruct_": "secateur.recover",
    "rescale_norms_": "secateur.recover",
    "rewind_": "secateur.recover",
    "ria": "secateur.recipes",
<<<<<<< HEAD
    "shrink": "secateur.deploy",
    "shrunk": "secateur.deploy",
    "slice_like_": "secateur.deploy",
    "slice_optimizer_": "secateur.deploy",
    "snip": "secateur.recipes",
=======
    "save_quantized": "secateur.deploy",
>>>>>>> recover
    "sparsegpt": "secateur.recipes",
    "sparsity": "secateur.core.counts",
    "taylor": "secateur.recipes",
    "threshold": "secateur.recipes",
    "trainer_callback": "secateur.training",
    "undo_": "secateur.core.masks",
    "wanda": "secateur.recipes",
    "wanda_l1": "secateur.recipes",
    "wanda_mended": "secateur.recipes",
}

__all__ = [
    "ADMM",
    "ALPS",
    "NM",
    "OWL",
    "RIA",
    "Adapters",
    "Best",
    "Blocks",
    "Columns",
    "Gradual",
    "IntoBias",
    "Layers",
    "LeastSquares",
    "LightningCallback",
    "Masks",
    "Measurement",
    "Percentile",
    "Plan",
    "Quantized",
    "Recipe",
    "RigL",
    "Rows",
    "Shares",
    "Slope",
    "SparseGPT",
    "Swaps",
    "Threshold",
    "Thresholding",
    "Tuned",
    "Weights",
    "__version__",
    "activation",
    "admm",
    "align",
    "alps",
    "angular_distance",
    "best_",
    "block_influence",
    "choose_blocks",
    "constant",
    "cubic",
    "distill_",
    "drop_blocks",
    "drop_blocks_",
    "exponential",
    "finetune_",
    "fisher",
    "geometric",
    "global_magnitude",
    "globally",
    "hold_",
    "last_blocks",
<<<<<<< HEAD
    "linear",
=======
    "load_quantized_",
>>>>>>> recover
    "lora_",
    "loss_without",
    "magnitude",
    "mend_units_",
    "merge_",
    "merge_blocks",
    "merge_blocks_",
    "movement",
    "per_layer",
    "per_row",
    "percentile",
    "plan",
    "points",
    "prune_",
<<<<<<< HEAD
    "prune_checkpoint",
=======
    "quantize_",
>>>>>>> recover
    "random",
    "random_blocks",
    "recalibrate_",
    "reconstruct_",
    "rescale_norms_",
    "rewind_",
    "ria",
<<<<<<< HEAD
    "shrink",
    "shrunk",
    "slice_like_",
    "slice_optimizer_",
    "snip",
=======
    "save_quantized",
>>>>>>> recover
    "sparsegpt",
    "sparsity",
    "taylor",
    "threshold",
    "trainer_callback",
    "undo_",
    "wanda",
    "wanda_l1",
    "wanda_mended",
]

if TYPE_CHECKING:
    from secateur import align
    from secateur.allocate import OWL, Percentile, Shares, Slope, Threshold, globally, per_layer, per_row
    from secateur.best import Best, best_
    from secateur.core.counts import sparsity
    from secateur.core.hold import hold_
    from secateur.core.masks import Masks, undo_
    from secateur.deploy import (
<<<<<<< HEAD
        drop_blocks,
        drop_blocks_,
        merge_blocks,
        merge_blocks_,
        shrink,
        shrunk,
        slice_like_,
        slice_optimizer_,
=======
        Quantized,
        drop_blocks,
        drop_blocks_,
        load_quantized_,
        merge_blocks,
        merge_blocks_,
        quantize_,
        save_quantized,
>>>>>>> recover
    )
    from secateur.depth import choose_blocks
    from secateur.evaluate import Measurement
    from secateur.pattern import NM, Blocks, Columns, Layers, Rows, Weights
    from secateur.prune import Plan, plan, prune_
    from secateur.recipes import (
        Recipe,
        activation,
        admm,
        alps,
        angular_distance,
        block_influence,
        fisher,
        global_magnitude,
        last_blocks,
        loss_without,
        magnitude,
        movement,
        percentile,
        random,
        random_blocks,
        ria,
        snip,
        sparsegpt,
        taylor,
        threshold,
        wanda,
        wanda_l1,
        wanda_mended,
    )
    from secateur.recover import (
        ADMM,
        ALPS,
        Adapters,
        IntoBias,
        LeastSquares,
        SparseGPT,
        Swaps,
        Tuned,
        distill_,
        finetune_,
        lora_,
        mend_units_,
        merge_,
        recalibrate_,
        reconstruct_,
        rescale_norms_,
        rewind_,
    )
    from secateur.schedule import constant, cubic, exponential, geometric, linear, points
    from secateur.score import RIA
    from secateur.stream import prune_checkpoint
    from secateur.training import Gradual, LightningCallback, RigL, Thresholding, trainer_callback


def __getattr__(name: str) -> Any:
    if name in _HOME:
        home = _HOME[name]
        return import_module(f"{home}.{name}") if home == __name__ else getattr(import_module(home), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
