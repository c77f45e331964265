"""How is it mended? `(weight "out in", choose, <statistics by parameter name>) -> Updated(weight, mask, damping)`."""

from secateur.recover.quadratic import loss
from secateur.recover.swaps import Swaps
from secateur.recover.update import ADMM, ALPS, LeastSquares, SparseGPT, Updated

__all__ = ["ADMM", "ALPS", "LeastSquares", "SparseGPT", "Swaps", "Updated", "loss"]
