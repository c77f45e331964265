"""An example of a model's inputs as users give it, and the analysis of the model on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.forward import accepts, device_of
from secateur.core.misfit import run
from secateur.core.units import Analysis, analyse
from secateur.errors import UsageError

__all__ = ["Example", "analysis_of", "example_of", "main_output", "prepared"]

LEFT_OUT = ("loss", "past_key_values")  # of a model's answer: neither is there to be kept


@dataclass(frozen=True)
class Example:
    """Inputs of one call: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Example:
        """The same with every tensor changed; tensors are named like the inputs of an exported program."""
        args, kwargs = pytree.tree_map_with_path(
            lambda path, x: change(pytree.keystr(path), x) if isinstance(x, Tensor) else x,
            (self.args, dict(self.kwargs)),
        )
        return Example(args, kwargs)

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def run(self, model: nn.Module) -> Any:
        """The model's answer; MisfitError where it refuses these inputs."""
        return run(model, self.args, self.kwargs)

    @property
    def rows(self) -> int:
        """The leading size of the first tensor that has one: the batch."""
        return next((x.shape[0] for x in self.tensors() if x.dim()), 1)


def example_of(model: nn.Module, given: Any) -> Example:
    """Read what a user gives for an example: a tensor, positional inputs, keywords, or a batch with labels.

    A tuple is read as positional inputs where the forward takes so many, else as a batch `(inputs, ...)`.
    Labels under the key "labels" are left out: a loss is no output to keep.

    Raises:
        UsageError: none of these, or no tensor in it.
    """
    if isinstance(given, Example):
        return given
    if isinstance(given, Tensor):
        return _on_device(model, Example((given,), {}))
    if isinstance(given, Mapping):
        found = Example((), {key: value for key, value in given.items() if key != "labels"})
    elif isinstance(given, (tuple, list)) and given:
        if isinstance(given[0], Mapping):
            return example_of(model, given[0])
        found = Example(tuple(given) if _binds(model, tuple(given)) else (given[0],), {})
    else:
        raise UsageError(
            "example: expected a tensor, a tuple of positional inputs, a mapping of keyword inputs or a batch "
            f"(inputs, labels); got {type(given).__name__}."
        )
    if not found.tensors():
        raise UsageError("example: it holds no tensor; give inputs that the model can be called with.")
    return _on_device(model, found)


def analysis_of(model: nn.Module, given: Any, **options: Any) -> tuple[Analysis, Example]:
    """The axes of a model on an example as users give it.

    A single row is given twice, because a size of 1 hides broadcasts; a cache is switched off; of an answer with
    names the main part is kept, see `main_output`.

    Args:
        model: any module that torch.export can trace.
        given: see `example_of`.
        options: of `analyse`.

    Returns:
        The analysis, and the example that its program takes.

    Raises:
        UsageError: as `example_of` and `analyse`.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found, example = analysis_of(mlp, torch.zeros(1, 3))
        >>> found.units[0].name, example.rows
        ('feed-forward units of 0,2', 2)
    """
    example = prepared(model, given)
    found = analyse(model, example.args, example.kwargs, **{"output": main_output, **options})
    return found, example


def prepared(model: nn.Module, given: Any) -> Example:
    """An example in the form in which models are analysed: at least two rows, no cache.

    Raises:
        UsageError: as `example_of`.
    """
    example = example_of(model, given)
    if example.rows == 1:
        example = example.map(lambda _, x: torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x)
    if accepts(model, "use_cache") and "use_cache" not in example.kwargs:
        example = Example(example.args, {**example.kwargs, "use_cache": False})
    return example


def main_output(answer: Any) -> Any:
    """What of a model's answer has to stay: logits, else the last hidden state, else everything but loss and cache."""
    if isinstance(answer, tuple | list):
        kept = tuple(part for part in answer if _of_tensors(part))
        return kept if kept and len(kept) < len(answer) else answer
    if not isinstance(answer, Mapping):
        return answer
    if isinstance(answer.get("logits"), Tensor):
        return answer["logits"]
    if isinstance(answer.get("last_hidden_state"), Tensor):
        pooled = answer.get("pooler_output")
        return (answer["last_hidden_state"], pooled) if pooled is not None else answer["last_hidden_state"]
    return {key: value for key, value in answer.items() if key not in LEFT_OUT and _of_tensors(value)}


def _of_tensors(part: Any) -> bool:
    """Whether a part of an answer is computed: not None, a number or a word beside what is."""
    leaves = pytree.tree_leaves(part)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _binds(model: nn.Module, args: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(model.forward).bind(*args)
    except TypeError:
        return False
    return True


def _on_device(model: nn.Module, example: Example) -> Example:
    device = device_of(model)
    return example if device.type == "meta" else example.map(lambda _, x: x.to(device))
