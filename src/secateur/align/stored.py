"""Maps on the disk: safetensors, no pickle; what a file says is looked up in a table or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ResourceError, UsageError
from .maps import Affine, Concatenation, Joint

__all__ = ["load", "save"]

FORMAT = "secateur.align.v1"
Map = Affine | Joint | Concatenation
_ROLES = {"affine": ("map",), "joint": ("first", "second", "across")}


def save(map: Map, path: str | Path) -> Path:
    """Write a map; the file takes its name when it is whole.

    Args:
        map: what a fit returned.
        path: ends in .safetensors; its folder exists.

    Returns:
        The path.

    Raises:
        UsageError: another ending, or no such folder.
        ResourceError: the disk is full or read-only.
    """
    from safetensors.torch import save as packed

    target = Path(path)
    if target.suffix != ".safetensors" or not target.parent.is_dir():
        raise UsageError(f"{target}: expected the name of a .safetensors file in a folder that exists")
    kind, parts, more = _apart(map)
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {"kind": kind, "parts": [], **more}
    for role, part in parts.items():
        tensors[f"{role}.matrix"], tensors[f"{role}.shift"] = part.matrix.contiguous(), part.shift.contiguous()
        told["parts"].append(
            {"role": role, "source": part.source, "target": part.target, "settings": dict(part.settings)}
        )
    if isinstance(map, Joint):
        tensors["correlations"] = map.correlations
    # one entry only: safetensors writes several in an order that changes from process to process
    content = packed(tensors, {FORMAT: json.dumps(told)})
    beside = target.with_name(f".{target.name[:100]}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, target)
    except OSError as error:
        raise ResourceError(f"{target}: the map could not be written ({error.strerror or error})") from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def load(path: str | Path) -> Map:
    """Read what `save` wrote.

    Raises:
        InputError: no such file, no map, or one that was altered so that its parts do not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable map ({error})") from None
    if FORMAT not in header:
        raise InputError(f"{path}: not a map; expected the format {FORMAT} in its header")
    try:
        told = json.loads(header[FORMAT])
        kind, parts = told["kind"], {str(entry["role"]): entry for entry in told["parts"]}
        roles = _ROLES.get(kind, tuple(str(at) for at in range(len(parts))))
        if kind not in (*_ROLES, "concatenation") or tuple(parts) != roles or not parts:
            raise ValueError(f"a map of kind {kind!r} with the parts {list(parts)}")
        names = {f"{role}.{each}" for role in roles for each in ("matrix", "shift")}
        names |= {"correlations"} if kind == "joint" else set()
        if set(tensors) != names:
            raise ValueError(f"the tensors {sorted(tensors)}, expected {sorted(names)}")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} of {tensor.dtype}, expected finite numbers of torch.float64")
        return _together(kind, [_affine(parts[role], role, tensors) for role in roles], tensors, told)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: this map was altered or is damaged: {str(error)[:300]}") from None


def _apart(map: Map) -> tuple[str, dict[str, Affine], dict[str, Any]]:
    if isinstance(map, Affine):
        return "affine", {"map": map}, {}
    if isinstance(map, Joint):
        return "joint", {"first": map.first, "second": map.second, "across": map.across}, {}
    if isinstance(map, Concatenation):
        more = {"unit": map.unit, "weights": list(map.weights), "target": map.target}
        return "concatenation", {str(at): part for at, part in enumerate(map.parts)}, more
    raise UsageError(f"{type(map).__name__} is no map of secateur.align; save what a fit returned")


def _affine(told: Mapping[str, Any], role: str, tensors: Mapping[str, Tensor]) -> Affine:
    settings = dict(told["settings"])
    for key, value in settings.items():
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"the setting {key} is {type(value).__name__}")
    names = told["source"], told["target"]
    if not all(name is None or (isinstance(name, str) and name) for name in names):
        raise ValueError(f"the spaces are {names!r:.100}")
    return Affine(tensors[f"{role}.matrix"], tensors[f"{role}.shift"], *names, settings)


def _together(kind: str, parts: list[Affine], tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Map:
    if kind == "affine":
        return parts[0]
    if kind == "joint":
        if tensors["correlations"].shape != (parts[0].matrix.shape[1],) or not len(tensors["correlations"]):
            raise ValueError("the correlations do not belong to the axes")
        return Joint(parts[0], parts[1], parts[2], tensors["correlations"])
    weights = tuple(float(weight) for weight in told["weights"])
    if len(weights) != len(parts) or type(told["unit"]) is not bool or not isinstance(told["target"], str):
        raise ValueError("its weights do not belong to its parts")
    return Concatenation(tuple(parts), told["unit"], weights, told["target"])
