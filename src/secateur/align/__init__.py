"""Do two models mean the same by a vector? Maps from one embedding space to another, and what they are good for.

map = align.ridge(pruned_vectors, original_vectors)      # fitted on a few thousand texts
align.neighbours(map(query_vectors), original_index)     # the index of the original model, not rebuilt
"""

from .advice import Advice, advise
from .embeddings import Embeddings
from .fits import cca, concatenate, procrustes, ridge
from .fold import fold_
from .maps import Affine, Concatenation, Joint
from .search import neighbours, overlap, similarity
from .stored import load, save

__all__ = [
    "Advice",
    "Affine",
    "Concatenation",
    "Embeddings",
    "Joint",
    "advise",
    "cca",
    "concatenate",
    "fold_",
    "load",
    "neighbours",
    "overlap",
    "procrustes",
    "ridge",
    "save",
    "similarity",
]
