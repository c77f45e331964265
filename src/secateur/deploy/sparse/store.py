"""A model with packed weights as one safetensors file: tensors alone, and in the header which names are tied.

What a weight is lies beside it as whole numbers, `NAME:packed`: format, form, kind, block, rows, columns. A form or
a kind is a place in a table here; nothing in a file is looked up by name. All is checked before a kernel sees it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.matrix import Layout
from secateur.core.stored import save_tensors
from secateur.deploy.quantize import layouts_of
from secateur.deploy.sparse.choice import CACHES, Choice, Kind, choose, kind_of
from secateur.deploy.sparse.convert import can_hold, can_look_up, install_sparse_, packed_of
from secateur.deploy.sparse.kernels import bits_of
from secateur.deploy.sparse.packed import (
    BLOCKS,
    DTYPES,
    KINDS,
    PADDING,
    SIDE,
    SPAN,
    WORD,
    Packed,
    pack,
    reformed,
)
from secateur.errors import InputError, UsageError, nearest

__all__ = ["FORMAT", "checked", "load_sparse_", "read_sparse", "save_sparse", "sparse_header"]

FORMAT = "secateur.sparse.v1"
STORED = ("bitmask", "index", "dense", "squares")  # forms of a file, by number
NEWEST = 3  # version of the format
NUMBERS = "packed"
_PARTS = ("values", "mask", "negative", "counts", "index", "scale", "codebook")
_NEEDED = {"bitmask": ("mask",), "index": ("counts", "index"), "dense": (), "squares": ("mask",)}
PREFERENCES = ("speed", "memory")
LARGEST = 1 << 40  # weights of a matrix


def save_sparse(model: nn.Module, path: str | Path, *, pack_rest: bool = True) -> None:
    """Write a model, each matrix in the smallest form: what `sparsify_` packed as it is, others bit for bit.

    Args:
        model: not changed.
        path: a file; written beside and renamed. N:M is a form in memory alone: in a file it is a bitmask.
        pack_rest: also pack floating-point matrices that `sparsify_` left, where that is smaller.
    """
    held = packed_of(model)
    inside = {f"{name.removesuffix('weight')}{part}" for name in held for part in _PARTS}
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in inside}
    tied: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, layer in held.items():
        first = seen.setdefault(layer.values.data_ptr(), name)
        if first != name:
            tied[name] = first
        else:
            tensors |= named(name, layer.packed)
    places = layouts_of(model) if pack_rest else {}
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else (name,)
        groups[place].append(name)
    for name, *aliases in groups.values():
        tied |= dict.fromkeys(aliases, name)
        tensors |= _smallest(name, state[name].detach().cpu(), places.get(name))
    header = json.dumps({"format": FORMAT, "tied": tied}, sort_keys=True)
    save_tensors(path, tensors, {"secateur": header})


def version_of(form: str, kind: str) -> int:
    """Since which version of the format there is a form of a kind: squares, then dense 4-bit codes, came later."""
    return 3 if (form, kind) == ("dense", "int4") else 1 + (form == "squares")


def named(name: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors that stand for one weight, under their names in a file."""
    if packed.form not in STORED:
        packed = reformed(packed.to("cpu"), None)
    if packed.form not in STORED:
        raise UsageError(f"{name}: N:M of a codebook of its own cannot be stored")
    numbers = [
        version_of(packed.form, packed.kind),
        STORED.index(packed.form),
        KINDS.index(packed.kind),
        packed.block,
        packed.rows,
        packed.columns,
    ]
    found = {f"{name}:{part}": tensor.contiguous() for part, tensor in packed.tensors().items()}
    return {f"{name}:{NUMBERS}": torch.tensor(numbers), **found}


def sparse_header(path: str | Path) -> dict[str, str] | None:
    """Alias -> name of tied tensors in a file that `save_sparse` wrote; None for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            found = json.loads((file.metadata() or {}).get("secateur", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    tied = found.get("tied")
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise InputError(f"{path}: the table of tied names in its header was altered")
    return tied


def read_sparse(path: str | Path) -> tuple[dict[str, Packed], dict[str, Tensor], dict[str, str]]:
    """Packed weights, other tensors, and tied names, each checked.

    Packed weights keep pointing into the memory-mapped file where its numbers are aligned.

    Raises:
        InputError: no such file, or one whose content was altered; names the tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tied = sparse_header(path)
    if tied is None:
        raise InputError(f"{path}: no file of packed weights ({FORMAT}), or one whose header is damaged")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a sound safetensors file ({' '.join(str(error).split())[:200]})"
        ) from error
    names = [name.removesuffix(f":{NUMBERS}") for name in tensors if name.endswith(f":{NUMBERS}")]
    packed = {name: checked(f"{path}: {name}", _taken(name, tensors)) for name in names}
    strange = [name for name in tensors if ":" in name]
    if strange:
        raise InputError(f"{path}: {strange[0]} belongs to no packed weight")
    for alias, kept in tied.items():
        if (kept not in packed and kept not in tensors) or alias in packed or alias in tensors:
            raise InputError(f"{path}: {alias} is said to be {kept}; one is missing, or both are there")
    return packed, tensors, tied


@torch.no_grad()
def load_sparse_(
    model: nn.Module, path: str | Path, *, dense: bool = False, prefer: str | None = None
) -> nn.Module:
    """Fill a model of the same architecture, as it is built, with what `save_sparse` wrote; returns the model.

    Args:
        model: whatever its weights.
        path: the file.
        dense: give every layer an ordinary weight; otherwise linear layers, convolutions and embeddings that were
            packed run packed.
        prefer: "speed" takes for each layer the fastest form and ways on this machine, measured once, with the dense
            weight kept beside, or alone, for batches at which that is faster; "memory" keeps no dense weights and no
            form that takes more than what is stored, and takes the fastest packed ways; None measures nothing and takes
            the usual ways.

    Raises:
        InputError: no such file, altered content, or another architecture.
        UsageError: an unknown preference.
    """
    if prefer not in (None, *PREFERENCES):
        raise UsageError(f"prefer is {prefer!r}; expected {' or '.join(PREFERENCES)}")
    packed, tensors, tied = read_sparse(path)
    for alias, kept in tied.items():
        if kept in packed:
            packed[alias] = packed[kept]
        else:
            tensors[alias] = tensors[kept]
    places = layouts_of(model)
    state = model.state_dict(keep_vars=True)
    for words, names in {
        "missing in the file": state.keys() - packed.keys() - tensors.keys(),
        "unknown to the model": (packed.keys() | tensors.keys()) - state.keys(),
    }.items():
        if names:
            raise InputError(f"{path} does not fit the model: {words}: {', '.join(sorted(names)[:5])}")
    for name, each in packed.items():
        _check_fits(path, name, each, places)
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{path} does not fit the model: {name} is {tuple(tensor.shape)} in the file, "
                f"{tuple(state[name].shape)} in the model"
            )
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    cold = sum(each.rows * each.columns for each in packed.values()) * 4 > CACHES
    done: dict[tuple[int, Kind], Choice] = {}
    for name, each in packed.items():
        module = model.get_submodule(name.rpartition(".")[0])
        looks_up = can_look_up(module, each)
        how = Choice(None, ())
        if not dense and (can_hold(module) or looks_up) and name.endswith("weight"):
            how = Choice(each, ())
            if prefer is not None and not looks_up:
                kind = kind_of(module, state[name].dtype, cold)
                key = id(each), kind
                how = done.get(key) or choose(each, kind, keep_dense=True, always=prefer == "memory")
                done[key] = how
        if how.keeps_dense:
            state[name].copy_(places[name].from_matrices(each.dense().view(places[name].shape)))
        if how.packed is not None:
            install_sparse_(model, (name,), how.packed, how.ways or None)
    return model


def checked(name: str, packed: Packed) -> Packed:
    """A packed weight as a file gives it, if kernels can trust it.

    Raises:
        InputError: parts that contradict each other; names the weight.
    """
    rows, columns, block, units = packed.rows, packed.columns, packed.block, packed.units
    extra = PADDING // packed.values.element_size()
    groups = -(-rows // block)
    wrong = ""
    if packed.mask is not None and _wants(packed.mask, torch.int64, (groups, -(-units // WORD))):
        wrong = "the mask has another shape or type"
    elif packed.mask is not None and _beyond(packed.mask, units):
        wrong = "bits are set behind the last column"
    elif packed.counts is not None and packed.index is not None:
        wrong = _wrong_index(packed.counts, packed.index, groups, columns)
    if not wrong:
        size = -(-int(packed.offsets[-1]) // 2) if packed.kind == "int4" else int(packed.offsets[-1])
        if _wants(packed.values, DTYPES[packed.kind], (size + extra,)):
            wrong = f"{packed.nonzeros:,} weights are kept, and the stream of values has another length or type"
        elif packed.negative is not None and (
            _wants(packed.negative, torch.int64, (rows, -(-columns // WORD)))
            or _beyond(packed.negative, columns)
        ):
            wrong = "the signs of zeros have another shape or type, or stand behind the last column"
        else:
            wrong = _wrong_scale(packed)
    if wrong:
        raise InputError(f"{name}: {wrong}; the file was altered")
    return packed


def _taken(name: str, tensors: dict[str, Tensor]) -> Packed:
    """The parts of one weight, taken out of `tensors`."""
    numbers = tensors.pop(f"{name}:{NUMBERS}")
    if numbers.dtype != torch.int64 or numbers.shape != (6,):
        raise InputError(f"{name}: what it is stands in no 6 whole numbers; the file was altered")
    version, form, kind, block, rows, columns = numbers.tolist()
    if not 0 < version <= NEWEST:
        raise InputError(
            f"{name}: packed in version {version} of the format; this secateur reads up to {NEWEST}"
        )
    known = 0 <= form < len(STORED) and 0 <= kind < len(KINDS) and block in BLOCKS
    known = known and version == version_of(STORED[form], KINDS[kind])
    if not known or not (0 < rows < LARGEST and 0 < columns < LARGEST and rows * columns < LARGEST):
        raise InputError(f"{name}: numbers {numbers.tolist()} name no matrix; the file was altered")
    parts = {part: tensors.pop(f"{name}:{part}") for part in _PARTS if f"{name}:{part}" in tensors}
    needed = {"values", *_NEEDED[STORED[form]]}
    needed |= {"scale"} if KINDS[kind].startswith("int") else set()
    needed |= {"codebook"} if KINDS[kind] == "int4" else set()
    simple = {
        "bitmask": True, "index": block == 1, "dense": block == 1 and KINDS[kind].startswith("int"),
        "squares": block == SIDE and KINDS[kind] == "int8",
    }[STORED[form]]  # fmt: skip
    optional = {"negative"} if not KINDS[kind].startswith("int") else set()
    if not simple or not needed <= parts.keys() <= needed | optional:
        raise InputError(f"{name}: parts {', '.join(sorted(parts))} make no {STORED[form]} of {KINDS[kind]}")
    return Packed(STORED[form], KINDS[kind], block, rows, columns, **parts)


def _wants(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return tensor.dtype != dtype or tuple(tensor.shape) != shape


def _beyond(mask: Tensor, columns: int) -> bool:
    last = mask[:, -1].numpy().view(np.uint64)
    return columns % WORD != 0 and bool((last >> np.uint64(columns % WORD)).any())


def _wrong_index(counts: Tensor, index: Tensor, groups: int, columns: int) -> str:
    spans = -(-columns // SPAN)
    if _wants(counts, torch.int16, (groups, spans)) or bool((counts < 0).any()) or bool((counts > SPAN).any()):
        return "the counts have another shape or type, or are more than a span holds"
    each = counts.long().flatten()
    if _wants(index, torch.uint8, (int(each.sum()),)):
        return "the columns have another number or type than the counts say"
    places = torch.repeat_interleave(torch.arange(len(each)), each)
    where = places % spans * SPAN + index.long()
    rising = (where[1:] > where[:-1]) | (places[1:] // spans != places[:-1] // spans)
    inside = not len(where) or int(where.max()) < columns
    return "" if inside and bool(rising.all()) else "columns are out of range or out of order"


def _wrong_scale(packed: Packed) -> str:
    scale, codebook = packed.scale, packed.codebook
    if scale is None:
        return ""
    groups = scale.shape[1] if scale.dim() == 2 else 0
    wide = packed.columns // groups if groups and packed.columns % groups == 0 else 0
    if _wants(scale, torch.float32, (packed.rows, groups)) or not wide or (groups > 1 and wide % WORD):
        return "the scales have another shape or type"
    if packed.kind == "int8" and groups != 1:
        return "8-bit integers have one scale a row"
    if not bool(((scale > 0) & scale.isfinite()).all()):
        return "scales are not positive numbers"
    if packed.kind == "int8" and packed.nonzeros and int(packed.values.min()) < -127:
        return "an integer is below -127"
    if codebook is not None and (
        _wants(codebook, torch.int8, (16,)) or int(codebook[0]) or int(codebook.min()) < -127
    ):
        return "the codebook is no 16 integers of which the first is 0"
    return ""


def _check_fits(path: str | Path, name: str, packed: Packed, places: Mapping[str, Layout]) -> None:
    if name not in places:
        raise InputError(f"{path} does not fit the model: it has no matrix {name}; {nearest(name, places)}")
    part, out, columns = places[name].shape
    if (part * out, columns) != (packed.rows, packed.columns):
        raise InputError(
            f"{path} does not fit the model: {name} is {packed.rows} x {packed.columns} in the file, "
            f"{part * out} x {columns} in the model"
        )


def _smallest(name: str, tensor: Tensor, place: Layout | None) -> dict[str, Tensor]:
    """A tensor as it is, or packed where it is a matrix with enough zeros."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if place is not None and kind in KINDS[:3] and tensor.numel():
        packed = pack(place.to_matrices(tensor).reshape(-1, place.shape[2]))
        if packed.nbytes < tensor.nbytes:
            return named(name, packed)
    if tensor.layout != torch.strided:
        raise UsageError(f"{name} is no dense tensor; it cannot be stored")
    return {name: tensor.contiguous().clone()}


def kept_of(packed: Packed) -> Tensor:
    """Which weights are in the stream of a bitmask, as booleans."""
    assert packed.mask is not None
    return torch.from_numpy(bits_of(packed.mask, packed.units))
