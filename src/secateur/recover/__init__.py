"""How is it mended? `(weight "out in", choose, <statistics by parameter name>) -> (weight, mask)`."""

from secateur.recover.quadratic import loss
from secateur.recover.update import ADMM, ALPS, LeastSquares, SparseGPT

__all__ = ["ADMM", "ALPS", "LeastSquares", "SparseGPT", "loss"]
