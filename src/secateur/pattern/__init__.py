"""What shape is cut? `pool(scores "out in") -> "competition unit"`, `spread(kept, shape) -> mask "out in"`.

Patterns of coupled units, which run through several tensors, give `sites` instead.
"""

from secateur.pattern.coupled import (
    Axes,
    Channels,
    Coupled,
    Experts,
    Heads,
    Hidden,
    KVGroups,
    Neurons,
    QueryHeads,
    Together,
)
from secateur.pattern.layers import Layers
from secateur.pattern.shapes import NM, Blocks, Columns, Rows, Weights

__all__ = [
    "NM",
    "Axes",
    "Blocks",
    "Channels",
    "Columns",
    "Coupled",
    "Experts",
    "Heads",
    "Hidden",
    "KVGroups",
    "Layers",
    "Neurons",
    "QueryHeads",
    "Rows",
    "Together",
    "Weights",
]
