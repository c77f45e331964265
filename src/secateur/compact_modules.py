"""The modules of a compact folder: built as its config or the user's function says, without values, and filled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur import named_class, pretrained
from secateur.checkpoint import Checkpoint
from secateur.deploy.twin import built_empty
from secateur.errors import InputError, UsageError

__all__ = ["Build", "built_of_code", "built_of_config", "cast_", "places_of", "refuse_gaps"]

Build = Callable[[], Any]


def built_of_config(checkpoint: Checkpoint) -> nn.Module:
    """A model of transformers as its config builds it, without values of parameters."""
    named_class.import_transformers()
    with pretrained.quiet():
        model_class, config = named_class.class_and_config(checkpoint, False)
        whole = replace(checkpoint, elements=2**60)  # before anything is cut it may be of any size
        with (
            named_class.told(checkpoint, f"cannot be built as {model_class.__name__}"),
            named_class.bounded(whole),
        ):
            model = built_empty(model_class, config)
            return model if not any(_beside(model)) else built_empty(model_class, config, buffers=True)


def built_of_code(build: Build, who: str) -> nn.Module:
    """What a user's function builds, without values where that can be."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = _module(build(), who)
        if not any(_beside(model)):
            return model
    except (
        Exception
    ):  # code that looks at values cannot run on the meta device: it says so again below, if it fails
        pass
    with torch.random.fork_rng(devices=[]):
        return _module(build(), who)


def _module(built: Any, who: str) -> nn.Module:
    model = built[0] if isinstance(built, tuple) and built else built
    if not isinstance(model, nn.Module):
        raise UsageError(f"{who}: build gave {type(built).__name__}; expected an nn.Module.")
    return model


def _beside(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep as plain attributes: nothing is stored of them."""
    for module in model.modules():
        for value in vars(module).values():
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, Tensor):
                    yield each


def cast_(model: nn.Module, dtype: torch.dtype | str | None) -> None:
    """Parameters and saved buffers in another type; tables in no state keep theirs, as in `from_pretrained`."""
    if not isinstance(dtype, torch.dtype):
        return
    saved = model.state_dict(keep_vars=True)
    apart = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in saved}
    model.to(dtype)
    for name, value in apart.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = value


def places_of(model: nn.Module) -> set[str]:
    """Give everything in the state a place on the CPU, tied tensors one; returns the names."""
    made: dict[int, Tensor] = {}
    names = model.state_dict(keep_vars=True)
    for name, tensor in names.items():
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            held = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if held else empty
        (owner._parameters if last in owner._parameters else owner._buffers)[last] = made[id(tensor)]  # type: ignore[assignment]
    return set(names)


def refuse_gaps(
    wanted: Mapping[str, Tensor], stored: Mapping[str, str], state: Mapping[str, Tensor], known: set[str]
) -> None:
    """Everything that the model holds is stored, in its shape and kind, and nothing else is."""
    said = []
    if missing := [name for name, kept in stored.items() if kept not in state]:
        said.append(f"missing in the files: {pretrained.some(missing)}")
    if unknown := known - wanted.keys():
        said.append(f"without a place in the model: {pretrained.some(unknown)}")
    for name, kept in stored.items():
        if kept in state:
            found, tensor = state[kept], wanted[name]
            if found.shape != tensor.shape:
                said.append(f"{name} has shape {tuple(found.shape)} instead of {tuple(tensor.shape)}")
            elif found.dtype != tensor.dtype and not (found.is_floating_point() and tensor.is_floating_point()):
                said.append(f"{name} has type {found.dtype} instead of {tensor.dtype}")
    if said:
        raise InputError(f"the weight files do not fit: {'; '.join(said[:5])}.")
