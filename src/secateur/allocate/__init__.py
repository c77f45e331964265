"""Who pays how much? `(units by layer, weights kept) -> kept units by competition`; totals are exact."""

from secateur.allocate.share import globally, per_layer, per_row
from secateur.allocate.threshold import Percentile, Threshold

__all__ = ["Percentile", "Threshold", "globally", "per_layer", "per_row"]
