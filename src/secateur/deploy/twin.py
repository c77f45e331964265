"""Does a model's config describe the model? A twin is built from it on the meta device and compared.

What `save_pretrained` writes is a config and tensors; what `from_pretrained` builds depends on the config alone.
So a model that is the twin of what its config builds, module by module, loads as itself.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from secateur.deploy.width import Width

__all__ = [
    "buffer_differences",
    "built_empty",
    "configuration",
    "differences",
    "is_transformers",
    "misfits",
    "twin_of",
]

Plain = int | float | str | bool | None
LOOSE = ("training", "drop_prob", "name_or_path")  # attributes that matter in training alone, or to nobody


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a model of transformers; does not import it for the answer."""
    return any(
        kind.__name__ == "PreTrainedModel" and "transformers" in kind.__module__ for kind in type(model).__mro__
    )


def configuration(model: nn.Module) -> dict[str, Any] | None:
    """What a transformers model's config says, as plain JSON that names the class; None for any other model."""
    if not is_transformers(model):
        return None
    config: Any = model.config
    return json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]}


def misfits(model: nn.Module) -> tuple[str, ...]:
    """How a transformers model differs from the one that its config builds, in words; nothing for any other model.

    Compared are the class of every module, the names and shapes of all parameters and saved buffers, and the
    plain attributes (numbers, words, None) of the modules inside of repeated blocks.

    Cost: the model is built once on the meta device; no tensor is computed.
    """
    if not is_transformers(model):
        return ()
    try:
        twin = twin_of(model, model.config)
    except Exception as error:  # whatever a class raises about a config is what we want to know
        return (
            f"{type(model).__name__} cannot be built from its config ({' '.join(str(error).split())[:200]})",
        )
    return tuple(differences(model, twin, everywhere=False))


def twin_of(model: nn.Module, config: Any, *, buffers: bool = False) -> nn.Module:
    """A model of the same class as a config builds it, without values; with `buffers` those have theirs."""
    return built_empty(type(model), copy.deepcopy(config), buffers=buffers)


def built_empty(kind: type[nn.Module], config: Any, *, buffers: bool = False) -> nn.Module:
    """A model without values of parameters; with `buffers` those, and what else is no parameter, have theirs.

    Args:
        kind: a class of transformers.
        config: its configuration, which the model keeps.
        buffers: compute them.

    Cost: no memory; with `buffers` one parameter at a time is given memory that is not written to.
    """
    place = (
        hooks.register_module_parameter_registration_hook(_without_values)  # type: ignore[arg-type]
        if buffers
        else torch.device("meta")
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), place, _uninitialized(buffers):
        warnings.simplefilter("ignore")
        return kind(config)


@contextmanager
def _uninitialized(wanted: bool) -> Iterator[None]:
    """Torch's own layers draw no numbers: nobody reads them."""
    init = torch.nn.init
    names = [name for name in init.__all__ if name.endswith("_") and hasattr(init, name)] if wanted else []
    before = {name: getattr(init, name) for name in names}
    try:
        for name in names:
            setattr(init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(init, name, function)


def _without_values(owner: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def differences(
    model: nn.Module, twin: nn.Module, *, everywhere: bool = True, before: nn.Module | None = None
) -> Iterator[str]:
    """How a model differs from one that was built anew, in words.

    Args:
        model: The model.
        twin: The other; its tensors need no values.
        everywhere: Compare plain attributes of all modules, not only of those inside of repeated blocks, on which
            the number of blocks has no effect.
        before: The model before it was shrunk: whole numbers that are still as there are not compared, because
            shrinking leaves alone what no call uses; only a run can tell.
    """
    past = {} if before is None else dict(before.named_modules())
    mine, others = dict(model.named_modules()), dict(twin.named_modules())
    for path in dict.fromkeys([*mine, *others]):
        one, other = mine.get(path), others.get(path)
        if one is None or other is None:
            yield f"{path} is {'not built' if other is None else 'built, but not in the model'}"
        elif _kind(one) != _kind(other):
            yield f"{path} is built as {type(other).__name__} instead of {type(one).__name__}"
        elif everywhere or any(part.isdigit() for part in path.split(".")):
            yield from _attributes(path, one, other, vars(past[path]) if path in past else {})
    shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    built = {name: tuple(t.shape) for name, t in twin.state_dict(keep_vars=True).items()}
    for name in dict.fromkeys([*shapes, *built]):
        if shapes.get(name) != built.get(name):
            yield f"{name} is built with shape {built.get(name)} instead of {shapes.get(name)}"


def buffer_differences(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Buffers that are in no file, so that they have to come out right when the model is built."""
    saved = model.state_dict(keep_vars=True)
    built = dict(twin.named_buffers(remove_duplicate=False))
    for name, value in model.named_buffers(remove_duplicate=False):
        if name not in saved and not (
            name in built
            and built[name].shape == value.shape
            and torch.allclose(built[name].double(), value.detach().cpu().double(), rtol=1e-5, atol=0)
        ):
            yield f"{name} is built with other numbers"


def _kind(module: nn.Module) -> tuple[str, str]:
    """The class by name: parametrized modules have a class each."""
    return type(module).__module__, type(module).__qualname__


def _attributes(path: str, one: nn.Module, other: nn.Module, past: Mapping[str, Any]) -> Iterator[str]:
    for name, value in vars(one).items():
        if type(value) is int and past.get(name) == value:
            continue
        plain = isinstance(value, Plain) and not name.startswith("_") and name not in LOOSE
        if plain and name in vars(other) and not _same(value, vars(other)[name]):
            full = f"{path}.{name}" if path else name
            yield f"{full} is built as {vars(other)[name]!r} instead of {value!r}"


def _same(one: Any, other: Any) -> bool:
    scales = [value.old if isinstance(value, Width) else value for value in (one, other)]
    return (one == other and scales[0] == scales[1]) or (one != one and other != other)
