"""`secateur verify`: a run's folder is what it was when it was written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from secateur.checkpoint import headers
from secateur.compact import is_compact, open_compact, read_compact
from secateur.core.masks import Masks, named_parameters
from secateur.deploy.packed import dense_weights, quantized_header
from secateur.errors import SecateurError, UsageError
from secateur.folder import MANIFEST, verify

__all__ = ["checked", "problems"]

MASKS = Path("run", "masks.safetensors")


def problems(folder: str | Path) -> list[str]:
    """What is wrong with a run's folder; an empty list when nothing is.

    Every file is compared with the manifest. A compact folder is loaded. Of any other the masks are read; every weight
    that a mask prunes must be stored as exactly zero. Weights are read one at a time, unless the files hold them in a
    form that only transformers can put together.

    Raises:
        UsageError: this is no folder, or none that secateur wrote.
    """
    folder = Path(folder)
    found = verify(folder)
    path = folder / MASKS
    if not (os.path.lexists(folder / MANIFEST) or is_compact(folder) or path.is_file()):
        raise UsageError(_strange(folder))
    if is_compact(folder):
        return found + _misfits(folder)
    if not path.is_file():
        return found
    try:
        masks = Masks.load(path)
        wrong, missing = _compared(masks, _stored(folder))
        for path in folder.glob("*.safetensors"):
            if missing and quantized_header(path) is not None:
                left = Masks({name: masks[name] for name in missing})
                more, missing = _compared(left, _integers(path, left))
                wrong += more
        if missing and (folder / "config.json").is_file() and not (found or wrong):
            for weights in (_in_pieces, _in_model):
                if missing:
                    more, missing = _compared(
                        Masks({name: masks[name] for name in missing}), weights(folder, missing)
                    )
                    wrong += more
    except SecateurError as error:
        return [*found, str(error)]
    lost = [f"run/masks.safetensors: {name} has a mask, but no file holds its weight" for name in missing]
    return [*found, *wrong, *lost]


def checked(folder: Path) -> str:
    """What was found in order beside the files of a folder without problems."""
    if is_compact(folder):
        return ", and its parts belong together"
    return (
        ", and every pruned weight is zero" if (folder / MASKS).is_file() else "; it holds no masks to compare"
    )


def _strange(folder: Path) -> str:
    """What to say of a folder that holds nothing of ours."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    more = f"; in it are {', '.join(inside[:5])}{' and more' if len(inside) > 5 else ''}" if inside else ""
    return (
        f"{folder} is no folder that secateur wrote: {MANIFEST}, the list of its files, is not in it. Give the folder "
        f"that --out named{more}"
    )


def _misfits(folder: Path) -> list[str]:
    """What keeps a compact folder from being loaded; of a module of one's own only the files are looked at."""
    try:
        opened = open_compact(folder)
        if opened.pretrained:
            read_compact(opened)
    except SecateurError as error:
        return [str(error)]
    return []


def _compared(masks: Masks, weights: Iterator[tuple[str, str, Tensor]]) -> tuple[list[str], list[str]]:
    """Pruned weights that are not zero, one line a tensor; and the masks for which there is no weight."""
    found, seen = [], set()
    for place, name, weight in weights:
        if name not in masks:
            continue
        seen.add(name)
        mask = masks[name]
        if weight.shape != mask.shape:
            found.append(f"{place}: {name} has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}")
        elif count := int((weight[~mask] != 0).sum()):
            found.append(f"{place}: {name} holds {count:,} pruned weights that are not zero")
    return found, [name for name in masks if name not in seen]


def _stored(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """File, name and weight of everything that is stored, under every name it has."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        headers(path)
        with safe_open(str(path), "pt") as file:
            aliases = _aliases((file.metadata() or {}).get("tied", "{}"))
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                weight = file.get_tensor(name)
                for called in (name, *(alias for alias, kept in aliases.items() if kept == name)):
                    yield path.name, called, weight


def _integers(path: Path, masks: Masks) -> Iterator[tuple[str, str, Tensor]]:
    """Weights that are stored as integers, laid out as their masks: upright, or transposed as in GPT-2's layers."""
    for name, matrices in dense_weights(path):
        if name not in masks:
            continue
        mask = masks[name]
        if matrices.numel() != mask.numel():
            yield path.name, name, matrices
            continue
        laid = [matrices.reshape(mask.shape), matrices.transpose(-1, -2).reshape(mask.shape)]
        yield path.name, name, min(laid, key=lambda weight: int((weight[~mask] != 0).sum()))


def _aliases(text: str) -> dict[str, str]:
    """Other name -> name of tied tensors; garbled ones are the manifest's business."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_pieces(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    """The same, put together from where transformers finds their parts: one tensor in memory at a time."""
    from secateur.checkpoint import read_checkpoint
    from secateur.stream.architecture import build_empty
    from secateur.stream.places import find_places
    from secateur.stream.shards import open_shards

    checkpoint = read_checkpoint(folder)
    shards = open_shards(checkpoint)
    places = find_places(build_empty(checkpoint, shards), shards)
    for name in names:
        if name in places.pieces and name not in places.unclear:
            yield places.pieces[name][0].name, name, places.read(name)


def _in_model(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    """The same of the model that the folder makes."""
    from secateur.model import load

    loaded = load(folder, dtype="auto", offline=True)
    for name, parameter in named_parameters(loaded.model).items():
        if name in names:
            yield folder.name, name, parameter.detach()
