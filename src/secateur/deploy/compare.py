"""Two computations on the same inputs: how far apart, and where they part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.core.axes.trace import returning
from secateur.core.example import Example
from secateur.core.statistics import evaluating

__all__ = ["Output", "Progress", "answer", "difference", "fingerprints", "progress"]

Output = str | Callable[[Any], Any] | None
Print = tuple[tuple[int, ...], float, float]  # shape, sum, sum of absolute values


@torch.no_grad()
def answer(model: nn.Module, example: Example, output: Output = None) -> list[Tensor]:
    """The tensors of a model's output, in evaluation mode."""
    with evaluating(model), returning(model, output):
        found = example.run(model)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference relative to the largest value of its tensor; infinite where they cannot be compared."""
    if len(wanted) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        x, y = a.double(), b.double()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        fine = x.isfinite()
        scale = x[fine].abs().max() if fine.any() else x.new_zeros(())
        gap = (x[fine] - y[fine]).abs().max() if fine.any() else x.new_zeros(())
        worst = max(worst, float(gap / scale) if scale > 0 else (float("inf") if gap > 0 else 0.0))
    return worst


class _Fingerprints(fx.Interpreter):
    """Runs a graph and remembers what every node computed, as three numbers."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[tuple[int, ...], list[Print]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor):
                mark = _print(one)
                self.found.setdefault(mark[0], []).append(mark)
        return result


def _print(x: Tensor) -> Print:
    value = x.detach().double() if not x.is_complex() else x.detach().abs().double()
    return tuple(x.shape), float(value.sum()), float(value.abs().sum())


@torch.no_grad()
def fingerprints(program: fx.GraphModule, example: Example) -> dict[tuple[int, ...], list[Print]]:
    """Shape -> marks of all values of that shape that a program computes."""
    interpreter = _Fingerprints(program)
    interpreter.run(*pytree.tree_leaves((example.args, dict(example.kwargs))), enable_io_processing=False)
    return interpreter.found


@dataclass(frozen=True)
class Progress:
    """How far a model goes as it should.

    Attributes:
        steps: Calls of modules that returned what the program computes, before the first that did not.
        module: The first that did not; "" where all did.
        words: What went wrong.
        failed: Whether something did.
    """

    steps: int
    module: str
    words: str
    failed: bool


class _StopError(Exception):
    pass


@torch.no_grad()
def progress(model: nn.Module, example: Example, known: dict[tuple[int, ...], list[Print]]) -> Progress:
    """Run a model until a module returns what the program never computes, or fails."""
    steps, stack, words = 0, [""], ""
    where = ""
    handles = []

    def leave(path: str, result: Any) -> None:
        nonlocal steps, where, words
        stack.pop()
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point() and not _known(x, known):
                where, words = path, f"returns another tensor of shape {tuple(x.shape)}"
                raise _StopError
        steps += 1

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(lambda *a, path=path: leave(path, a[-1])))
    try:
        with evaluating(model):
            model(*example.args, **example.kwargs)
    except _StopError:
        return Progress(steps, where, words, True)
    except Exception as error:  # whatever a forward with wrong sizes raises
        return Progress(steps, stack[-1], f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", True)
    finally:
        for handle in handles:
            handle.remove()
    return Progress(steps, "", "", False)


def _known(x: Tensor, known: dict[tuple[int, ...], list[Print]]) -> bool:
    shape, total, size = _print(x)
    if not math.isfinite(size):
        return True
    near = max(1e-4 * size, 1e-12)
    return any(abs(total - other[1]) <= near and abs(size - other[2]) <= near for other in known.get(shape, ()))
