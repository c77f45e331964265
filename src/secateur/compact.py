"""A shrunk model whose widths no config can say, in files: safetensors, and what was cut as JSON.

`compact.json` names the class, the config before anything was cut, the positions that are kept of every tensor and
the integers that follow. A loader builds the original class on the meta device, where it costs no memory, cuts it
the same way and fills it. A class of transformers is looked up in the library's own tables; a module of the user's
own is built by the function that the user names. Nothing in the files is code or a name of code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import named_class, pretrained
from secateur.checkpoint import Checkpoint, look_through, read_object, read_state
from secateur.compact_modules import Build, built_of_code, built_of_config, cast_, places_of, refuse_gaps
from secateur.core.taps import taps_of
from secateur.deploy import Shrunk, load_quantized_, shrunk
from secateur.deploy.cuts import cut, from_json, to_json
from secateur.deploy.decoupling import check_indices, entries_of, restore_
from secateur.deploy.packed import quantized_header
from secateur.deploy.sparse import load_sparse_
from secateur.deploy.sparse.store import sparse_header
from secateur.deploy.twin import differences
from secateur.errors import InputError, UsageError
from secateur.manifest import sha256, write_json
from secateur.state import save_state

__all__ = [
    "COMPACT",
    "FORMAT",
    "Compact",
    "cast_",
    "compact_at",
    "compact_text",
    "is_compact",
    "open_compact",
    "read_compact",
    "write_compact",
    "write_instead",
]

COMPACT = "compact.json"
FORMAT = "secateur.compact.v1"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Compact:
    """A compact folder, looked through.

    Attributes:
        checkpoint: its files; `config` is that of the model before it was shrunk, empty for a module of one's own.
        cuts: what was cut, not checked yet.
        stored_apart: names of buffers that are in no state, and stored all the same.
        source: what is known of the model that was shrunk.
    """

    checkpoint: Checkpoint
    cuts: Any
    stored_apart: tuple[str, ...]
    source: Mapping[str, Any]

    @property
    def pretrained(self) -> bool:
        """Whether the class is one of transformers."""
        return bool(self.checkpoint.config)


def is_compact(folder: Path) -> bool:
    """Whether this is a folder that `write_compact` wrote."""
    return (folder / COMPACT).is_file()


def compact_at(place: Path) -> Path | None:
    """The compact folder that a place is, or whose weights it is; None for any other place."""
    if is_compact(place):
        return place
    if not place.is_file() or not is_compact(place.parent):
        return None
    weights = read_object(place.parent / COMPACT).get("weights")
    return place.parent if isinstance(weights, dict) and place.name in weights else None


def write_compact(
    model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None, source: Mapping[str, Any] | None = None
) -> None:
    """Write a shrunk model into a folder that is there, so that `read_compact` gives it back number for number.

    Args:
        model: what `shrink` made, trained further or not; not changed.
        folder: written into.
        dtype: type in which floating-point tensors are stored; None keeps theirs.
        source: what is known of the model it was made from, such as {"name": ..., "sha256": ...}.

    Raises:
        UsageError: it is not what `shrink` made; its state holds something that is no plain tensor; or a class of
            transformers that cannot be built again and cut to this very model, by the first difference.
    """
    cuts = to_json(shrunk(model))
    if taps := entries_of(taps_of(model)):
        cuts["decoupled"] = taps
    if cuts["config"] is not None and _known(model):
        _refuse_strange(model, cuts)
    else:
        cuts["config"] = None
    saved = model.state_dict(keep_vars=True)
    apart = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in saved}
    save_state(model, folder / WEIGHTS, dtype, apart)
    weights = {WEIGHTS: sha256(folder / WEIGHTS)}
    write_json(folder / COMPACT, _text(cuts, weights, sorted(apart), source or {}))
    generation: Any = getattr(model, "generation_config", None)
    if cuts["config"] is not None and generation is not None:
        with pretrained.quiet():
            generation.save_pretrained(folder)


def write_instead(folder: Path, file: Path) -> None:
    """Let a file of integers or of packed weights take the place of the weights in a compact folder.

    `read_compact` makes ordinary weights of either; buffers that are in no state stay in a file of their own.

    Args:
        folder: what `write_compact` wrote into.
        file: what `save_quantized` or `save_sparse` wrote of the same model, in the folder.
    """
    text = read_object(folder / COMPACT)
    names = text["stored_apart"]
    stored, tied = read_state(folder / WEIGHTS) if names else ({}, {})
    (folder / WEIGHTS).unlink()
    weights = {file.name: sha256(file)}
    if names:
        save_state(nn.Module(), folder / WEIGHTS, None, {name: stored[tied.get(name, name)] for name in names})
        weights[WEIGHTS] = sha256(folder / WEIGHTS)
    write_json(folder / COMPACT, {**text, "weights": weights})


def compact_text(
    note: Shrunk, weights: Mapping[str, str], apart: Sequence[str], source: Mapping[str, Any]
) -> dict[str, Any]:
    """What compact.json says of cuts and of files that are written.

    Args:
        note: what was cut.
        weights: file -> SHA-256.
        apart: names of buffers that are in no state.
        source: what is known of the model it was made from.
    """
    return _text(to_json(note), weights, apart, source)


def _text(
    cuts: Any, weights: Mapping[str, str], apart: Sequence[str], source: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": dict(source),
        "weights": dict(weights),
        "stored_apart": list(apart),
        "cuts": cuts,
        "cuts_sha256": _digest(cuts),
    }


def _digest(cuts: Any) -> str:
    return hashlib.sha256(json.dumps(cuts, sort_keys=True).encode()).hexdigest()


def _known(model: nn.Module) -> bool:
    """Whether the class is one that the library's tables list for its type of model."""
    name, config = type(model).__name__, getattr(model, "config", None)
    listed = name in named_class.classes_of(str(getattr(config, "model_type", "")))
    return listed and type(model) is getattr(named_class.import_transformers(), name)


def _refuse_strange(model: nn.Module, cuts: dict[str, Any]) -> None:
    """A model that was changed in ways that neither config nor cuts say would not load as itself."""
    checkpoint = Checkpoint(Path(), cuts["config"], (Path(WEIGHTS),), 2**20, 2**60, None, {}, COMPACT)
    try:
        built = built_of_config(checkpoint)
        restore_(built, cuts.get("decoupled", []))
        said = next(differences(model, cut(built, from_json(cuts, built))), "")
    except InputError as error:
        said = str(error)
    if said:
        raise UsageError(
            f"{type(model).__name__}: built anew from its config and cut alike it is another model: {said}. Save what "
            "shrink made of a model as its class and config build it"
        )


def open_compact(folder: Path) -> Compact:
    """Look through a compact folder without building anything from it.

    Raises:
        InputError: a file is missing, truncated, garbled or altered, or not of this form.
    """
    path = folder / COMPACT
    text = read_object(path)
    if text.get("format") != FORMAT:
        raise InputError(f"{path}: format {text.get('format')!r} is not known; expected {FORMAT!r}.")
    weights, apart, source = text.get("weights"), text.get("stored_apart"), text.get("source")
    cuts = text.get("cuts")
    words = isinstance(apart, list) and all(isinstance(name, str) for name in apart)
    if not isinstance(weights, dict) or not weights or not words or not isinstance(source, dict):
        raise InputError(f"{path}: expected weights, stored_apart and source.")
    config = cuts.get("config") if isinstance(cuts, dict) else None
    if not isinstance(cuts, dict) or not (config is None or (isinstance(config, dict) and config)):
        raise InputError(f"{path}: expected cuts, with a config or null.")
    if text.get("cuts_sha256") != _digest(cuts):
        raise InputError(
            f"{path}: the cuts are not those that were written (their SHA-256 differs); restore the file."
        )
    for name in weights:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise InputError(f"{path}: names {name!r}, which is no safetensors file in the same folder.")
    places = [folder / name for name in weights]
    checkpoint = look_through(folder, config or {}, places, [], COMPACT)
    for name, digest in weights.items():
        if checkpoint.files[name] != digest:
            raise InputError(f"{folder / name}: altered since {COMPACT} was written; restore both.")
    return Compact(checkpoint, cuts, tuple(apart), source)  # type: ignore[arg-type]


def read_compact(found: Compact, build: Build | None = None, **packed: Any) -> nn.Module:
    """Build the model of a compact folder, in eval mode.

    Args:
        found: from `open_compact`.
        build: for a module of one's own: a function without arguments that gives it, or it and example inputs, as
            it was before it was shrunk, with any weights.
        packed: of packed weights, how they run: `prefer`, see `load_sparse_`. Without it they become ordinary ones.

    Raises:
        UsageError: a module of one's own without `build`.
        InputError: what is built, what was cut and what is stored do not belong together, by name.

    Cost: memory for the shrunk model; for the whole one only where it cannot be built on the meta device.
    """
    folder, place = found.checkpoint.folder, found.checkpoint.folder / COMPACT
    if build is None and not found.pretrained:
        raise UsageError(
            f"{folder}: holds a {found.cuts.get('class')} of your own code; say what builds it: secateur.load(folder, "
            f"build), or file.py:function@{folder} on the command line."
        )
    try:
        built = built_of_config(found.checkpoint) if build is None else built_of_code(build, str(folder))
        restore_(built, found.cuts.get("decoupled", []))
        note = from_json(found.cuts, built)
        small = cut(built, note)
        _fill(small, found, packed or {"dense": True})
        check_indices(small)
    except InputError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"{place}: {error}") from error
    generation = folder / "generation_config.json"
    if found.pretrained and generation.is_file():
        with (
            pretrained.quiet(),
            named_class.told(found.checkpoint, "makes no config of generation", generation.name),
        ):
            kind: Any = named_class.import_transformers().GenerationConfig
            small.generation_config = kind.from_dict(read_object(generation))
    return small.eval()


def _fill(model: nn.Module, found: Compact, packed: Mapping[str, Any]) -> None:
    """Give every parameter and buffer what is stored of it; nothing may be missing, left over or of another shape."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    integers = [path for path in found.checkpoint.weights if quantized_header(path) is not None]
    sparse = [path for path in found.checkpoint.weights if sparse_header(path) is not None]
    for path in found.checkpoint.weights:
        if path in integers or path in sparse:
            continue
        more, aliases = read_state(path)
        if again := state.keys() & more.keys():
            raise InputError(f"{path}: holds {min(again)}, which another file holds as well.")
        state, tied = state | more, tied | aliases
    wanted = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if integers or sparse:
        rounded = places_of(model)
        wanted = {name: tensor for name, tensor in wanted.items() if name not in rounded}
    stored = {name: tied.get(name, name) for name in wanted}
    refuse_gaps(wanted, stored, state, {*state, *tied})
    made: dict[Any, Any] = {}
    for name, tensor in wanted.items():
        owner_path, _, last = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        key = stored[name], isinstance(tensor, nn.Parameter)
        if key not in made:
            value = state[stored[name]]
            made[key] = nn.Parameter(value, requires_grad=tensor.requires_grad) if key[1] else value
        (owner._parameters if key[1] else owner._buffers)[last] = made[key]
    for path in integers:
        load_quantized_(model, path, dense=True)
    for path in sparse:
        load_sparse_(model, path, **packed)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it remembers its tensors
