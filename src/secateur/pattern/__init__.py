"""What shape is cut? `pool(scores "out in") -> "competition unit"`, `spread(kept, shape) -> mask "out in"`."""

from secateur.pattern.layers import Layers
from secateur.pattern.shapes import NM, Blocks, Columns, Rows, Weights

__all__ = ["NM", "Blocks", "Columns", "Layers", "Rows", "Weights"]
