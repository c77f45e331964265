"""Compressed weights, and kernels that multiply with them: smaller files, faster models on a CPU."""

from secateur.deploy.sparse.convert import Sparsified, sparsify_
from secateur.deploy.sparse.packed import Packed, pack
from secateur.deploy.sparse.store import load_sparse_, save_sparse

__all__ = ["Packed", "Sparsified", "load_sparse_", "pack", "save_sparse", "sparsify_"]
