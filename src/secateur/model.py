"""A MODEL on the command line becomes an nn.Module, and an nn.Module becomes a folder that loads again.

MODEL is a folder in Hugging Face format, a Hugging Face name, or `file.py:function` of the user's own, with
weights as `file.py:function@weights.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import own, pretrained
from secateur.checkpoint import INTEGERS, read_checkpoint, read_state, weight_file
from secateur.compact import cast_, compact_at, is_compact, open_compact, read_compact
from secateur.deploy import Shrunk, load_quantized_
from secateur.deploy.packed import quantized_header
from secateur.deploy.slots import ATTRIBUTE
from secateur.errors import InputError, ResourceError, UsageError, nearest
from secateur.hub import fetch
from secateur.manifest import check_listed, sha256
from secateur.shrunken import save_shrunk
from secateur.state import groups, plain_state, save_state

__all__ = [
    "Loaded",
    "fingerprint",
    "load",
    "load_built",
    "placed",
    "save",
    "usable_device",
    "weights_digest",
]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A model, and where it came from.

    Attributes:
        model: in eval mode.
        tokenizer: the tokenizer beside it, None where there is none.
        spec: what the user asked for.
        kind: "transformers" for a folder or name in Hugging Face format, "python" for a function.
        fingerprint: SHA-256 in hexadecimal of the weight file, of the list of weight files where there are
            several, or of the state where the function made the weights itself.
        folder: the folder in Hugging Face format, None for a function.
        files: name -> SHA-256 of every file that was used.
        stored_dtype: floating-point type of most of the numbers in the files, None where nothing says it.
        example: inputs that the function gave beside the model, None otherwise.
        dense: of a packed model the same numbers as ordinary weights, by which it is counted; None otherwise.
        place: of a function the file or the compact folder that its weights came from, None where it made them.
    """

    model: nn.Module
    tokenizer: Any
    spec: str
    kind: str
    fingerprint: str
    folder: Path | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    stored_dtype: torch.dtype | None = None
    example: Any = None
    dense: nn.Module | None = None
    place: Path | None = None

    @property
    def weights(self) -> Path | None:
        """The folder, or the file, in which the weights lie."""
        return self.place if self.folder is None else self.folder


def load(
    spec: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    drop_unexpected: bool = False,
    seed: int = 0,
) -> Loaded:
    """Load a model in eval mode, whole or not at all; no generator and no log setting is left changed.

    The head comes from config.json's "architectures". Missing, unexpected and misshapen tensors are errors,
    but for tied ones. Local folders are read without any network. A folder with a manifest is compared with it.

    Args:
        spec: folder, Hugging Face name, `file.py:function` or `file.py:function@weights.safetensors`. The
            function takes no arguments and returns an nn.Module, or an nn.Module and example inputs.
        dtype: of the floating-point parameters. None: float32 for a folder or name, whatever its files hold,
            and for a function what it builds. "auto": what the files or the function say.
        device: where the model goes.
        offline: use the network for nothing; a name must be in the cache.
        trust_remote_code: run Python files of a checkpoint whose config asks for that.
        allow_pickle: accept weights in pickle, opened with `weights_only=True`.
        drop_unexpected: leave out tensors of a checkpoint that the model has no place for.
        seed: where the generators of torch, numpy and random start for a function.

    Raises:
        UsageError: no such model, function, type or device; or an exception in the user's function.
        InputError: a file is truncated, garbled, altered, refused, or does not fit the model.
        ResourceError: too little memory.

    Cost:
        One read of all weight files for the digests, one to load them.
    """
    text, kind = str(spec), _dtype(dtype)
    where = usable_device(device)
    if own.is_own(text):
        loaded = _load_own(text, kind, allow_pickle, seed)
    else:
        folder = folder_of(
            text, offline=offline, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
        if is_compact(folder):
            return placed(where, _load_compact(text, folder, kind or torch.float32, seed))
        checkpoint = read_checkpoint(folder, allow_pickle=allow_pickle)
        options = {"trust_remote_code": trust_remote_code, "drop_unexpected": drop_unexpected}
        with own.seeded(seed):
            model, tokenizer = pretrained.build(checkpoint, dtype=kind or torch.float32, **options)
        mark, files = checkpoint.fingerprint, checkpoint.files
        stored = None if INTEGERS in files else checkpoint.dtype  # scales say nothing of the weights
        loaded = Loaded(model, tokenizer, text, "transformers", mark, folder, files, stored)
    return placed(where, loaded)


def placed(where: torch.device, loaded: Loaded) -> Loaded:
    """The model, and its dense twin, on a device; ResourceError where they do not fit."""
    try:
        loaded.model.to(where)
        if loaded.dense is not None:
            loaded.dense.to(where)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"{loaded.spec}: does not fit on {where} ({reason}).") from error
    return loaded


def _load_compact(spec: str, folder: Path, dtype: torch.dtype | str, seed: int) -> Loaded:
    """A shrunk model of transformers."""
    found = open_compact(folder)
    with own.seeded(seed):
        model: Any = read_compact(found)
    checkpoint = found.checkpoint
    with pretrained.quiet():
        tokenizer = pretrained.tokenizer_of(checkpoint, model.config, False)
    cast_(model, dtype)
    files = dict(checkpoint.files)
    return Loaded(
        model, tokenizer, spec, "transformers", checkpoint.fingerprint, folder, files, checkpoint.dtype
    )


def save(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    source: str | Path | None = None,
    to: str = "auto",
    made_from: Mapping[str, Any] | None = None,
) -> str:
    """Write a model so that it loads again with the same numbers, from a process that knows nothing of us.

    A transformers model is written with its own `save_pretrained`, in safetensors. Of any other module the
    state goes to model.safetensors, tied tensors once, with their other names in the file's metadata; load it
    with `file.py:function@model.safetensors`. What `shrink` made is written as `save_shrunk` says.

    Args:
        model: not changed.
        tokenizer: written beside the model; None for none.
        folder: an existing folder, as `new_folder` gives it.
        dtype: type in which floating-point tensors are stored, such as `Loaded.stored_dtype`; None keeps the
            model's.
        source: a folder, such as `Loaded.folder`, whose tokenizer, generation and preprocessor files are
            copied as they are.
        to, made_from: of a shrunk model, see `save_shrunk`.

    Returns:
        "hf" or, of a shrunk model, "compact" or "padded"; "state" where only the numbers were written.

    Raises:
        UsageError: the state holds something that is no plain tensor.
        ResourceError: the disk is full (raised by `new_folder`).
    """
    place = Path(folder)
    kind = _dtype(dtype)
    if kind == "auto":
        kind = None
    origin = None if source is None else Path(source)
    options: dict[str, Any] = {"dtype": kind, "source": origin}
    if isinstance(vars(model).get(ATTRIBUTE), Shrunk):
        return save_shrunk(model, tokenizer, place, to=to, made_from=made_from, **options)
    if to in ("compact", "padded") or (to == "hf" and not pretrained.is_pretrained(model)):
        raise UsageError(f"{type(model).__name__}: nothing was taken out of it by shrink; leave to={to!r} out.")
    if pretrained.is_pretrained(model):
        pretrained.save_pretrained(model, tokenizer, place, **options)
        return "hf"
    save_state(model, place / "model.safetensors", kind)  # type: ignore[arg-type]
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    return "state"


def load_built(
    build: Callable[[], Any], folder: Path, *, dtype: torch.dtype | str, device: torch.device | str
) -> nn.Module:
    """A module of one's own, shrunk or not, filled from a folder, in eval mode; see `secateur.load`."""
    where, kind = usable_device(device), _dtype(dtype)
    if is_compact(folder):
        model = read_compact(open_compact(folder), build)
    else:
        built = build()
        model = built[0] if isinstance(built, tuple) else built
        _filled_from(model, weight_file(folder))
    cast_(model, kind)
    loaded = Loaded(model.eval(), None, str(folder), "python", "")
    return placed(where, loaded).model


def weights_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, as `Loaded.fingerprint` has it."""
    return (open_compact(folder).checkpoint if is_compact(folder) else read_checkpoint(folder)).fingerprint


def fingerprint(model: nn.Module) -> str:
    """SHA-256 in hexadecimal of names, types, shapes and bytes of the state, in the order of the names.

    Raises:
        UsageError: the state holds something that is no plain tensor.

    Cost:
        One pass over the state; a copy of one tensor at a time where it is not on the CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state(model).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def folder_of(spec: str, *, offline: bool, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The local folder that `spec` means, downloaded where that is allowed."""
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return path
    if path.is_file():
        raise UsageError(
            f"{path} is a file; give its folder, or file.py:function@{path} for weights of your own."
        )
    if path.is_absolute() or spec.startswith((".", "~")) or not _HUB_NAME.fullmatch(spec):
        near = own.near(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()])
        raise UsageError(f'"{spec}": no such folder, and no Hugging Face name.{near}')
    return fetch(spec, offline=offline, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def _load_own(spec: str, dtype: torch.dtype | str | None, allow_pickle: bool, seed: int) -> Loaded:
    """A model of the user's own code, with weights where `spec` names them."""
    path, name, weights = own.split(spec)
    built = own.call(spec, seed=seed)
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{path}:{name} returned {type(built).__name__}; expected an nn.Module, or one with example inputs."
        )
    files = {path.name: sha256(path)}
    stored = None
    place = None if weights is None else Path(weights).expanduser()
    small = None if place is None else compact_at(place)
    if small is not None:
        opened = open_compact(small)
        model = read_compact(opened, lambda: own.call(spec, seed=seed))
        cast_(model, dtype)
        known, mark = {**files, **opened.checkpoint.files}, opened.checkpoint.fingerprint
        stored = opened.checkpoint.dtype
        return Loaded(model, None, spec, "python", mark, None, known, stored, example, place=small)
    if place is not None:
        place = file = weight_file(place)
        state = _filled_from(model, file, allow_pickle=allow_pickle)
        files[file.name] = sha256(file)
        check_listed(file.parent, {file.name: files[file.name]})
        sizes: dict[torch.dtype, int] = defaultdict(int)
        for tensor in state.values():
            sizes[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
        stored = max((key for key, size in sizes.items() if size), key=lambda key: sizes[key], default=None)
    mark = files[place.name] if place is not None else fingerprint(model)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    return Loaded(model.eval(), None, spec, "python", mark, None, files, stored, example, place=place)


def _filled_from(model: nn.Module, file: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Fill a model from a file of weights, or of integers that stand for them; returns what was stored as it is."""
    if quantized_header(file) is not None:
        load_quantized_(model, file, dense=True)
        return {}
    state, tied = read_state(file, allow_pickle=allow_pickle)
    _fill(model, state, tied, file)
    return state


def _fill(model: nn.Module, given: dict[str, Tensor], tied: dict[str, str], path: Path) -> None:
    """Copy a state into the model; every name, shape and type must fit, tied names may be left out."""
    wanted = plain_state(model)
    state = dict(given)
    same = groups(wanted)
    for name in wanted.keys() - given.keys():
        twins = [tied.get(name, name), *next(group for group in same if name in group)]
        if found_twin := next((twin for twin in twins if twin in given), None):
            state[name] = given[found_twin]
    said = []
    if missing := wanted.keys() - state.keys():
        said.append(f"missing in the file: {pretrained.some(missing)}")
    if unknown := state.keys() - wanted.keys():
        said.append(f"unknown to the model: {pretrained.some(unknown)} ({nearest(min(unknown), wanted)})")
    for name in sorted(wanted.keys() & state.keys()):
        found, expected = state[name], wanted[name]
        if found.shape != expected.shape:
            said.append(f"{name} has shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        elif torch.promote_types(found.dtype, expected.dtype) != expected.dtype:
            said.append(f"{name} has type {found.dtype}, which does not fit in {expected.dtype} without loss")
    for group in same:
        values = [state[name] for name in group if name in state]
        if len({tensor.shape for tensor in values}) == 1 and not all(
            torch.equal(values[0], v) for v in values[1:]
        ):
            said.append(f"{' and '.join(group)} are one tensor in the model and differ in the file")
    if said:
        raise InputError(f"{path} does not fit the model: {'; '.join(said[:6])}.")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}.") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f'dtype "{name}" is not known; {nearest(name, ["auto", *_DTYPES])}.')
    return _DTYPES[name]


def usable_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be made on; UsageError for others."""
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f'device "{device}" cannot be used here ({str(error).splitlines()[0][:200]}).'
        ) from error
    return chosen
