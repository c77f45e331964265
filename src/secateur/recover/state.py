"""Where training stands, in one safetensors file: tensors, and everything else as JSON in its header.

One file, written beside and renamed, so that a kill leaves the earlier one; no pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.stored import save_tensors
from secateur.errors import InputError, UsageError

__all__ = [
    "as_before",
    "check_same",
    "generators",
    "load_optimizer_",
    "optimizer_state",
    "put_together",
    "read_state",
    "seed_epoch",
    "set_generators",
    "taken_apart",
    "write_state",
]

FORMAT = "secateur.training.v1"
_OPTIMIZER = "optimizer"
_TENSOR = "tensor in the file"


def write_state(path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Write tensors and JSON values as one file, whole or not at all.

    Raises:
        UsageError: the file cannot be written there.
        ResourceError: the disk is full; the earlier file is as it was.
    """
    header = {"secateur": json.dumps({"format": FORMAT, **plain}, allow_nan=False)}
    with suppress(OSError):  # what is wrong with the place is said below
        path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {name: _own(tensor) for name, tensor in tensors.items()}, header, flush=True)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote.

    Raises:
        InputError: no readable file of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get("secateur", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        plain = json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: no readable checkpoint of training ({error}); delete it to start anew"
        ) from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise InputError(f"{path}: no checkpoint of training of format {FORMAT}; delete it to start anew")
    return tensors, plain


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with anything but what was begun.

    Raises:
        UsageError: naming everything that changed.
    """
    said = []
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            short = key in ("model", "data", "masks", "teacher", "validation")
            said.append(
                f"the {key} changed" if short else f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            )
    if said:
        raise UsageError(
            f"{path}: this checkpoint belongs to another run ({'; '.join(said)}). Give what was given then, or delete "
            "it to start anew"
        )


def taken_apart(state: Mapping[str, Any], place: str = "pruner") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested mappings as tensors by their place, and the same without tensors, which JSON can hold."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        inside = f"{place}|{key}"
        if isinstance(value, Tensor):
            tensors[inside] = value
            plain[key] = {_TENSOR: inside}
        elif isinstance(value, Mapping):
            more, plain[key] = taken_apart(value, inside)
            tensors |= more
        else:
            plain[key] = value
    return tensors, plain


def put_together(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What `taken_apart` was given.

    Raises:
        KeyError: a tensor that is missing.
    """
    if set(plain) == {_TENSOR}:
        raise TypeError("a tensor where a mapping was expected")
    return {
        key: value
        if not isinstance(value, Mapping)
        else tensors[value[_TENSOR]]
        if set(value) == {_TENSOR}
        else put_together(tensors, value)
        for key, value in plain.items()
    }


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name, and the rest as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}.{number}.{key}"] = value
            else:
                plain.setdefault(str(number), {})[key] = value
    return tensors, {"state": plain, "groups": state["param_groups"]}


def load_optimizer_(optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` gave; JSON's lists become the tuples they were (betas)."""
    state: dict[int, dict[str, Any]] = {int(number): dict(entry) for number, entry in plain["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(f"{_OPTIMIZER}."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = tensor
    groups = [
        {
            key: tuple(value) if isinstance(value, list) and key != "params" else value
            for key, value in group.items()
        }
        for group in plain["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Where the generators of torch, numpy and random stand."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{number}"] = state
    name, keys, place, has_gauss, cached = np.random.get_state()
    tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy())
    version, words, gauss = random.getstate()
    plain = {"numpy": [name, place, has_gauss, cached], "random": [version, list(words), gauss]}
    return tensors, plain


def set_generators(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put the generators back to where `generators` found them."""
    torch.set_rng_state(tensors["rng.torch"])
    cuda = sorted(name for name in tensors if name.startswith("rng.cuda."))
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[name] for name in cuda])
    name, place, has_gauss, cached = plain["numpy"]
    keys = tensors["rng.numpy"].numpy().view(np.uint32)
    np.random.set_state((name, keys, place, has_gauss, cached))
    version, words, gauss = plain["random"]
    random.setstate((version, tuple(words), gauss))


def seed_epoch(seed: int, epoch: int) -> None:
    """Start every generator of an epoch; epochs of one seed share no numbers."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed)


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Put modes and generators back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    tensors, plain = generators()
    try:
        with torch.enable_grad():
            yield
    finally:
        set_generators(tensors, plain)
        for module, mode in modes:
            module.training = mode


def _own(tensor: Tensor) -> Tensor:
    """The tensor alone in its memory, on the CPU: safetensors refuses shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
