"""Does a model's config describe the model? A twin is built from it on the meta device and compared.

What `save_pretrained` writes is a config and tensors; what `from_pretrained` builds depends on the config alone.
So a model that is the twin of what its config builds, module by module, loads as itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["misfits"]

Plain = int | float | str | bool | None
TRAINING = ("training", "drop_prob")  # attributes that matter in training alone


def misfits(model: nn.Module) -> tuple[str, ...]:
    """How a transformers model differs from the one that its config builds, in words; nothing for any other model.

    Compared are the class of every module, the names and shapes of all parameters and saved buffers, and the
    plain attributes (numbers, words, None) of the modules inside of repeated blocks.

    Cost: the model is built once on the meta device; no tensor is computed.
    """
    if not any(c.__name__ == "PreTrainedModel" and "transformers" in c.__module__ for c in type(model).__mro__):
        return ()
    try:
        twin = _twin(model)
    except Exception as error:  # whatever a class raises about a config is what we want to know
        return (
            f"{type(model).__name__} cannot be built from its config ({' '.join(str(error).split())[:200]})",
        )
    return tuple(_differences(model, twin))


def _twin(model: nn.Module) -> nn.Module:
    config: Any = copy.deepcopy(model.config)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")
        return type(model)(config)


def _differences(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    mine, others = dict(model.named_modules()), dict(twin.named_modules())
    for path in dict.fromkeys([*mine, *others]):
        one, other = mine.get(path), others.get(path)
        if one is None or other is None:
            yield f"{path} is {'not built' if other is None else 'built, but not in the model'}"
        elif _kind(one) != _kind(other):
            yield f"{path} is built as {type(other).__name__} instead of {type(one).__name__}"
        else:
            yield from _attributes(path, one, other)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    built = {name: tuple(t.shape) for name, t in twin.state_dict(keep_vars=True).items()}
    for name in dict.fromkeys([*shapes, *built]):
        if shapes.get(name) != built.get(name):
            yield f"{name} is built with shape {built.get(name)} instead of {shapes.get(name)}"


def _kind(module: nn.Module) -> tuple[str, str]:
    """The class by name: parametrized modules have a class each."""
    return type(module).__module__, type(module).__qualname__


def _attributes(path: str, one: nn.Module, other: nn.Module) -> Iterator[str]:
    if not any(part.isdigit() for part in path.split(".")):
        return  # outside of lists nothing depends on how many blocks there are
    for name, value in vars(one).items():
        plain = isinstance(value, Plain) and not name.startswith("_") and name not in TRAINING
        if plain and name in vars(other) and not _same(value, vars(other)[name]):
            yield f"{path}.{name} is built as {vars(other)[name]!r} instead of {value!r}"


def _same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)
