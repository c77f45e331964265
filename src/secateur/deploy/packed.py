"""A quantized model as one safetensors file: packed integers, scales, and what they are as JSON in the header.

torchao's tensors are never stored themselves: only bytes and numbers are, so that reading needs no pickle and
runs no code.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.matrix import Layout
from secateur.core.stored import save_tensors
from secateur.deploy.grid import Grid, from_grid
from secateur.deploy.packing import pack, unpack
from secateur.deploy.quantize import SCHEMES, find_integers, install_, layouts_of
from secateur.errors import InputError, UsageError, nearest

__all__ = ["FORMAT", "dense_weights", "load_quantized_", "quantized_header", "save_quantized"]

FORMAT = "secateur.quantized.v1"
_PARTS = ("values", "kept", "scale")


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a model that `quantize_` has worked on: integers packed, everything else as it is, tied weights once.

    Integers take their bits, or one bit each and those of the non-zeros alone, whichever is smaller. Scales are
    stored as float16 where that holds them exactly. Written beside and renamed.

    Raises:
        UsageError: the model holds no integers.
    """
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    seen: dict[int, str] = {}
    for name, scheme, grid, shared in find_integers(model):
        first = seen.setdefault(id(shared), name)
        if first != name:
            weights[first]["names"].append(name)
            continue
        bits = SCHEMES[scheme][0]
        for part, content in {**pack(grid.integers, bits), "scale": _short(grid.scale)}.items():
            tensors[f"{name}:{part}"] = content.cpu().contiguous()
        weights[name] = {"scheme": scheme, "shape": list(grid.integers.shape), "names": [name]}
    if not weights:
        raise UsageError("the model holds no integers; quantize_ it first, or save it as any other model")
    plain, tied = _plain(model, [name for entry in weights.values() for name in entry["names"]])
    header = json.dumps({"format": FORMAT, "weights": weights, "tied": tied}, sort_keys=True)
    save_tensors(path, {**tensors, **plain}, {"secateur": header})


def quantized_header(path: str | Path) -> dict[str, Any] | None:
    """What the header of a file that `save_quantized` wrote says; None for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            found = json.loads((file.metadata() or {}).get("secateur", "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def dense_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every name and tensor in a file of a quantized model; integers as matrices of the weights that they stand for.

    Raises:
        InputError: no such file, or altered content.
    """
    path = Path(path)
    weights, tied, tensors = _opened(path)
    for name, entry in weights.items():
        matrices = from_grid(_read(path, name, entry, tensors))
        for each in entry["names"]:
            yield each, matrices
    for name, tensor in tensors.items():
        for each in (name, *(alias for alias, kept in tied.items() if kept == name)):
            yield each, tensor


@torch.no_grad()
def load_quantized_(model: nn.Module, path: str | Path, *, dense: bool = False) -> nn.Module:
    """Fill a model of the same architecture, as it is built, with what `save_quantized` wrote; returns the model.

    Args:
        model: with floating-point weights, whatever their values.
        path: the file.
        dense: give it ordinary weights, rounded as the integers say, instead of integers; needs no torchao.

    Raises:
        InputError: no such file, altered content, or another architecture.
        UsageError: torchao is missing.
    """
    path = Path(path)
    weights, tied, tensors = _opened(path)
    grids = {name: _read(path, name, entry, tensors) for name, entry in weights.items()}
    places = layouts_of(model)
    for entry in weights.values():
        for each in entry["names"]:
            _check_place(path, each, entry, places)
    _fill(path, model, tensors, tied, [each for entry in weights.values() for each in entry["names"]])
    for name, entry in weights.items():
        if dense:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            for each in entry["names"]:
                parameters[each].copy_(places[each].from_matrices(from_grid(grids[name])))
        else:
            install_(model, {each: places[each] for each in entry["names"]}, entry["scheme"], grids[name])
    return model


def _opened(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, Tensor]]:
    """What the header says of integers and of tied tensors, and everything in the file."""
    from safetensors.torch import load_file

    header = quantized_header(path)
    if header is None:
        raise InputError(f"{path}: no file of a quantized model ({FORMAT})")
    try:
        weights = {str(name): _entry(path, name, entry) for name, entry in header["weights"].items()}
        tied = {str(alias): str(kept) for alias, kept in header["tied"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: the header was altered ({type(error).__name__}: {error})") from None
    return weights, tied, load_file(path)


def _entry(path: Path, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One weight of the header, checked."""
    shape, names, scheme = entry["shape"], entry["names"], entry["scheme"]
    whole = isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)
    named = isinstance(names, list) and names[:1] == [name] and all(isinstance(each, str) for each in names)
    if scheme not in SCHEMES or not whole or not named:
        raise InputError(f"{path}: what the header says of {name} was altered: {json.dumps(entry)[:200]}")
    return {"scheme": scheme, "shape": tuple(shape), "names": names}


def _read(path: Path, name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Grid:
    """The integers and scales of one weight; taken out of `tensors`."""
    held = {part: tensors.pop(f"{name}:{part}") for part in _PARTS if f"{name}:{part}" in tensors}
    if "values" not in held or "scale" not in held:
        raise InputError(f"{path}: {name} has no {'values' if 'values' not in held else 'scale'}")
    scale = held.pop("scale").float()
    part, out, columns = entry["shape"]
    fits = (
        scale.dim() == 3 and scale.shape[:2] == (part, out) and scale.shape[2] and columns % scale.shape[2] == 0
    )
    if not fits or not bool(((scale > 0) & scale.isfinite()).all()):
        raise InputError(
            f"{path}: the scales of {name} were altered; expected positive numbers for {entry['shape']}"
        )
    bits = SCHEMES[entry["scheme"]][0]
    return Grid(unpack(held, bits, entry["shape"], f"{path}: {name}"), scale)


def _check_place(path: Path, name: str, entry: dict[str, Any], places: dict[str, Layout]) -> None:
    if name not in places:
        raise InputError(f"{path} does not fit the model: it has no weight {name}; {nearest(name, places)}")
    if places[name].shape != entry["shape"]:
        raise InputError(
            f"{path} does not fit the model: {name} is {entry['shape']} in the file, {places[name].shape} in the model"
        )


def _fill(
    path: Path, model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], integers: list[str]
) -> None:
    """Copy what is no integers; every name and shape must fit."""
    for alias, kept in tied.items():
        if kept not in tensors:
            raise InputError(f"{path}: {alias} is said to be {kept}, which is not in the file")
        tensors[alias] = tensors[kept]
    wanted = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in integers}
    gaps = {"missing in the file": wanted.keys() - tensors.keys(), "unknown": tensors.keys() - wanted.keys()}
    for words, names in gaps.items():
        if names:
            raise InputError(f"{path} does not fit the model: {words}: {', '.join(sorted(names)[:5])}")
    for name, tensor in wanted.items():
        found = tensors[name]
        if found.shape != tensor.shape:
            raise InputError(
                f"{path} does not fit the model: {name} is {tuple(found.shape)} in the file, {tuple(tensor.shape)} in "
                "the model"
            )
        tensor.copy_(found)


def _plain(model: nn.Module, integers: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything that is no integers, tied tensors once; their other names."""
    starts = tuple(_inside(name) for name in integers)
    groups: dict[Any, list[str]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name not in integers and not name.startswith(starts):
            groups[id(tensor)].append(name)
    tensors = {names[0]: state[names[0]].detach().cpu().clone().contiguous() for names in groups.values()}
    return tensors, {alias: names[0] for names in groups.values() for alias in names[1:]}


def _inside(name: str) -> str:
    path, _, attribute = name.rpartition(".")
    return f"{path}.parametrizations.{attribute}." if path else f"parametrizations.{attribute}."


def _short(scale: Tensor) -> Tensor:
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale
