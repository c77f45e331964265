"""How is it mended? Layer by layer while pruning, or by training the whole model with the masks held.

An update is `(weight "out in", choose, <statistics by parameter name>) -> Updated(weight, mask, damping, shift)`. What
trains takes a model, batches and masks, and gives the history of what was measured.
"""

from secateur.recover.constants import IntoBias
from secateur.recover.distill import distill_
from secateur.recover.finetune import finetune_
from secateur.recover.lora import Adapters, lora_, merge_
from secateur.recover.losses import LOSSES, language_model, multi_label, regression, single_label
from secateur.recover.norms import recalibrate_, rescale_norms_
from secateur.recover.quadratic import loss
from secateur.recover.reconstruct import Rebuilt, reconstruct_
from secateur.recover.rewind import rewind_
from secateur.recover.swaps import Swaps
from secateur.recover.training import Epoch, Training, Tuned
from secateur.recover.units import MendedUnits, TakeOver, mend_units_
from secateur.recover.update import ADMM, ALPS, LeastSquares, SparseGPT, Updated

__all__ = [
    "ADMM",
    "ALPS",
    "LOSSES",
    "Adapters",
    "Epoch",
    "IntoBias",
    "LeastSquares",
    "MendedUnits",
    "Rebuilt",
    "SparseGPT",
    "Swaps",
    "TakeOver",
    "Training",
    "Tuned",
    "Updated",
    "distill_",
    "finetune_",
    "language_model",
    "lora_",
    "loss",
    "mend_units_",
    "merge_",
    "multi_label",
    "recalibrate_",
    "reconstruct_",
    "regression",
    "rescale_norms_",
    "rewind_",
    "single_label",
]
