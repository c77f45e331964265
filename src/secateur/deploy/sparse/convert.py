"""`sparsify_`: a pruned model's layers are replaced by ones that store and multiply without the zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.where import Layer, Only, layers, select
from secateur.deploy.quantize import put_
from secateur.deploy.sparse.choice import CACHES, Choice, choose, kind_of
from secateur.deploy.sparse.modules import SparseConv2d, SparseEmbedding, SparseLayer, SparseLinear
from secateur.deploy.sparse.ops import DENSE
from secateur.deploy.sparse.packed import KINDS, Block, Packed, pack, shape_of
from secateur.errors import UsageError, nearest

__all__ = ["Sparsified", "SparsifiedLayer", "install_sparse_", "sparsify_"]

OUTER = ("embedding", "head")
INTEGERS = ("int8", "int4")


@dataclass(frozen=True)
class SparsifiedLayer:
    """One weight that is packed.

    Attributes:
        name: of the parameter, as it was.
        form, kind, block: see `Packed`.
        sparsity: share of weights that are left out.
        dense_bytes, packed_bytes: what the weight took and takes.
        keeps_dense: whether the dense weight is kept beside, for batches at which it is faster.
    """

    name: str
    form: str
    kind: str
    block: int
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    keeps_dense: bool = False


@dataclass(frozen=True)
class Sparsified:
    """What `sparsify_` did.

    Attributes:
        layers: every weight that is packed now.
        left_out: layers that are not, each with the reason.
    """

    layers: tuple[SparsifiedLayer, ...]
    left_out: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        before = sum(layer.dense_bytes for layer in self.layers)
        after = sum(layer.packed_bytes for layer in self.layers)
        kinds = ", ".join(sorted({layer.kind for layer in self.layers}))
        return f"{len(self.layers)} weights packed as {kinds}: {before:,} bytes are {after:,}"


@torch.no_grad()
def sparsify_(
    model: nn.Module,
    kind: str | None = None,
    *,
    outer: str | None = None,
    block: Block = 1,
    only: Only = None,
    skip: Only = None,
    measure: bool = True,
    keep_dense: bool = False,
) -> Sparsified:
    """Replace linear layers and convolutions by ones that leave zeros out, in place; for inference on a CPU.

    Args:
        model: pruned; its masks do not apply to the packed weights any more.
        kind: how kept weights are held: float32, bfloat16, float16, int8 (a scale for each row; at most 4 tokens
            are multiplied in integers) or int4 (a scale for each 128 columns). None: as they are.
        outer: "int8" or "int4" holds embeddings and output heads as integers, zeros and all, tied ones once; int4 takes
            4.25 bits a weight; None leaves them alone.
        block: what `Blocks` pruned: 1, 4 or 16 rows that share an index, or (4, 4), for int8.
        only, skip: which layers, as for `prune_`; default every `nn.Linear`, `Conv1D` and `nn.Conv2d` of one group.
        measure: choose for each layer the fastest form and ways on this machine, and leave layers dense that would be
            slower in every way; the measurements are kept for the next time. False: the usual ways, every layer.
        keep_dense: with measure, keep the dense weight beside the packed one where only some batches are faster packed:
            speed for memory.

    Returns:
        What was packed, what was left, and the bytes.

    Raises:
        UsageError: an unknown kind, or nothing to pack.
        NumericError: NaN or Inf among weights that should become integers.

    Cost: two passes over the weights; a second or two for each new combination of size, kind and sparsity that is
        measured.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        >>> model[0].weight.data[:, ::2] = 0
        >>> print(sparsify_(model, measure=False))
        1 weights packed as float32: 8,192 bytes are 4,416
    """
    for given, known in ((kind, KINDS), (outer, INTEGERS)):
        if given is not None and given not in known:
            raise UsageError(f"{given!r} is not known here; {nearest(given, known)}")
    shape_of(block)
    left: list[tuple[str, str]] = []
    chosen = _chosen(model, only, skip, left)
    cold = sum(layer.weight.nbytes for layer in chosen) > CACHES
    plan: list[tuple[Layer, Packed, Choice, float]] = []
    for layer in chosen:
        found = _planned(layer, kind, outer, block)
        if isinstance(found, str):
            left.append((layer.name, found))
            continue
        how = Choice(found, ())
        if measure and not isinstance(layer.module, nn.Embedding):
            how = choose(found, kind_of(layer.module, layer.weight.dtype, cold), keep_dense=keep_dense)
        if how.packed is None:
            left.append((layer.name, f"{1 - found.density:.0%} zeros: slower without them than with them"))
        else:
            plan.append((layer, how.packed, how, 1 - found.density))
    if not plan:
        reasons = "".join(f"; {name}: {why}" for name, why in left[:-4:-1])
        raise UsageError(f"no layer to pack{reasons}. Prune first, or choose others")
    done = tuple(_report(*each) for each in plan)
    for layer, packed, how, _ in plan:
        install_sparse_(model, (layer.name, *layer.tied), packed, how.ways or None)
    return Sparsified(done, tuple(left))


def _planned(layer: Layer, kind: str | None, outer: str | None, block: Block) -> Packed | str:
    """A layer's weight packed, or why it is not."""
    reason = _reason(layer, outer)
    if reason:
        return reason
    matrix = layer.layout.to_matrices(layer.weight.detach())[0]
    if layer.role in OUTER and outer is not None:
        return pack(matrix, outer, form="dense")
    wanted = kind or str(layer.weight.dtype).removeprefix("torch.")
    if wanted not in KINDS:
        return f"its type is {wanted}"
    packed = pack(matrix, wanted, block=block)
    if packed.nbytes >= matrix.nbytes:
        return f"{1 - packed.density:.0%} zeros: larger without them than with them"
    return packed


def install_sparse_(
    model: nn.Module, names: tuple[str, ...], packed: Packed, ways: tuple[int, ...] | None = None
) -> None:
    """Put a packed weight into the place of one parameter, under every name it has.

    Args:
        model: changed.
        names: of the parameter.
        packed: the weight.
        ways: None for the usual ones; where one is DENSE, the module's own weight is kept for it.
    """
    for name in names:
        path = name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        kept = None
        if DENSE in (ways or ()) and not isinstance(module, nn.Embedding):
            kept = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
        if isinstance(module, nn.Embedding):
            put_(model, path, SparseEmbedding(packed, module)).train(module.training)
        elif isinstance(module, nn.Conv2d):
            put_(model, path, SparseConv2d(packed, module, ways, kept)).train(module.training)
        else:
            made = SparseLinear(packed, module.bias, module.weight.dtype, ways, kept)
            put_(model, path, made).train(module.training)


def can_look_up(module: nn.Module, packed: Packed) -> bool:
    """Whether an embedding can find its rows in a packed weight."""
    single = packed.form == "bitmask" and packed.block == 1
    return _looks_up(module) and (packed.form == "dense" or (packed.kind == "int4" and single))


def can_hold(module: nn.Module) -> bool:
    """Whether a packed weight can stand in for this module's own."""
    if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
        return not getattr(module, "parametrizations", None)
    return type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"


def packed_of(model: nn.Module) -> Mapping[str, SparseLayer]:
    """Every packed weight of a model by the name of the parameter that it replaces."""
    return {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if isinstance(module, SparseLayer)
    }


def _chosen(model: nn.Module, only: Only, skip: Only, left: list[tuple[str, str]]) -> list[Layer]:
    if only is None and skip is None:
        return list(layers(model))
    selection = select(model, only or _any, skip)
    left += [(layer.name, reason) for layer, reason in selection.left_out]
    return list(selection.chosen)


def _any(path: str, module: nn.Module) -> bool:
    return True


def _reason(layer: Layer, outer: str | None) -> str:
    """Why a layer is not packed; empty where it can be."""
    if layer.weight.device.type != "cpu":
        return f"it lies on {layer.weight.device}"
    if layer.role in OUTER and outer is not None and (can_hold(layer.module) or _looks_up(layer.module)):
        return ""
    if isinstance(layer.module, nn.Embedding) or (layer.tied and layer.role in OUTER):
        return "outer=None leaves embeddings and what is tied to them"
    if layer.tied:
        return f"it is shared with {layer.tied[0]}"
    return "" if can_hold(layer.module) else f"{type(layer.module).__name__} is not one that can be packed"


def _looks_up(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None


def _report(layer: Layer, packed: Packed, how: Choice, sparsity: float) -> SparsifiedLayer:
    weight: Tensor = layer.weight
    return SparsifiedLayer(
        layer.name,
        packed.form,
        packed.kind,
        packed.block,
        sparsity,
        weight.numel() * weight.element_size(),
        packed.nbytes,
        how.keeps_dense,
    )
