"""Who pays how much? `(units by layer, weights kept) -> kept units by competition`; totals are exact."""

from secateur.allocate.normalised import Normalised, PerCost
from secateur.allocate.outliers import OWL
from secateur.allocate.share import globally, per_layer, per_row
from secateur.allocate.shares import Shares, Slope
from secateur.allocate.threshold import Percentile, Threshold

__all__ = [
    "OWL",
    "Normalised",
    "PerCost",
    "Percentile",
    "Shares",
    "Slope",
    "Threshold",
    "globally",
    "per_layer",
    "per_row",
]
