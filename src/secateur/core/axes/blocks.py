"""Where a whole model cannot be exported: its submodules one by one, with frozen borders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.core.axes.trace import evaluating, tied
from secateur.core.misfit import run
from secateur.core.units import Analysis, analyse
from secateur.errors import UsageError

__all__ = ["Blocks", "analyse_blocks"]


@dataclass(frozen=True)
class Blocks:
    """Analyses of the largest submodules that can be exported.

    Attributes:
        analyses: Submodule path -> its analysis; names in it are relative to the submodule, and its inputs and
            outputs are frozen.
        refused: Submodule path -> why nothing in it can be pruned.
    """

    analyses: Mapping[str, Analysis]
    refused: Mapping[str, str]


@torch.no_grad()
def _calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The inputs of every call of every submodule in one forward."""
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    handles = []
    for path, module in model.named_modules():
        calls[path] = []

        def record(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], path: str = path) -> None:
            calls[path].append((given, named))

        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        with evaluating(model):
            run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def analyse_blocks(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Blocks:
    """Analyse the largest submodules that can be exported, when the whole model cannot.

    What crosses a submodule's border keeps its width, so hidden widths stay; heads, feed-forward units and
    inner channels are found. Tensors tied to others outside of the submodule are frozen. A submodule called
    several times is refused, since its calls could tie different axes.

    Args:
        model: Any module whose forward runs on the example.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Returns:
        Analyses by submodule path, and the refused submodules with the reasons.

    Raises:
        UsageError: not one submodule can be analysed.

    Cost:
        One forward, whose activations are held, and an export of each submodule.
    """
    calls = _calls(model, tuple(args), kwargs or {})
    ties = tied(model)
    analyses: dict[str, Analysis] = {}
    refused: dict[str, str] = {}

    def descend(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            visit(inner, child)

    def visit(path: str, module: nn.Module) -> None:
        if next(module.parameters(), None) is None:
            return
        if len(calls[path]) > 1:
            refused[path] = f"called {len(calls[path])} times in one forward"
            return
        if not calls[path]:
            descend(path, module)
            if not list(module.children()):
                refused[path] = "never called by itself; its parent uses its parameters"
            return
        outside = {
            name[len(path) + 1 :]
            for name, names in ties.items()
            if name.startswith(path + ".") and any(not other.startswith(path + ".") for other in names)
        }
        given, named = calls[path][0]
        try:
            analyses[path] = analyse(module, given, named, fixed=outside)
        except UsageError as error:
            if not list(module.children()):
                refused[path] = str(error)
            descend(path, module)

    descend("", model)
    if not analyses:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:3])
        raise UsageError(f"{type(model).__name__}: none of its submodules can be analysed. {reasons}")
    return Blocks(analyses, refused)
