"""Which integers of a model end up in which operator: integers that remember where they come from.

A `Tagged` is an int that keeps the formula by which it was made. While the model runs once with its own numbers
replaced by tagged ones, every torch function that receives one is noted, with the module whose forward called
it and the shape of what it returned. A tagged number turned into a float, as for 1/sqrt(width), is noted too:
such a number must not follow the width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.deploy.slots import Slot

__all__ = ["Formula", "Tagged", "Uses", "family", "watching"]


@dataclass(frozen=True)
class Formula:
    """A number as a function of slots."""

    slots: tuple[Slot, ...]
    evaluate: Callable[[Mapping[Slot, int]], Any]
    pure: bool = True  # no other number takes part, which might be a size that changes too


class Tagged(int):
    """An integer with its formula; arithmetic with whole numbers keeps it, a float forgets it and is noted."""

    formula: Formula
    noted: set[Slot]  # slots whose number was turned into a float

    @staticmethod
    def of(value: int, formula: Formula, noted: set[Slot]) -> Tagged:
        """A tagged number."""
        self = Tagged(value)
        self.formula, self.noted = formula, noted
        return self

    def __float__(self) -> float:
        self.noted.update(self.formula.slots)
        return float(int(self))

    def __deepcopy__(self, memo: Any) -> Tagged:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _whole(name: str, *, swapped: bool = False) -> Callable[[Tagged, Any], Any]:
    compute = getattr(operator, name)

    def method(self: Tagged, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int):
            if isinstance(other, float):
                self.noted.update(self.formula.slots)
            return NotImplemented if not isinstance(other, float) else _plain(compute, self, other, swapped)
        pair = (int(other), int(self)) if swapped else (int(self), int(other))
        value = compute(*pair)
        if type(value) is not int:
            self.noted.update(self.formula.slots)
            return value
        mine = self.formula
        theirs = other.formula if isinstance(other, Tagged) else _number(int(other))

        def evaluate(numbers: Mapping[Slot, int]) -> Any:
            a, b = mine.evaluate(numbers), theirs.evaluate(numbers)
            return compute(b, a) if swapped else compute(a, b)

        return Tagged.of(
            value, Formula((*mine.slots, *theirs.slots), evaluate, mine.pure and theirs.pure), self.noted
        )

    return method


def _number(value: int) -> Formula:
    return Formula((), lambda _: value, pure=False)


def _plain(compute: Callable[[Any, Any], Any], mine: int, other: float, swapped: bool) -> Any:
    return compute(other, int(mine)) if swapped else compute(int(mine), other)


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv"):
    setattr(Tagged, f"__{_name}__", _whole(_name))
    setattr(Tagged, f"__r{_name}__", _whole(_name, swapped=True))


def _negative(self: Tagged) -> Tagged:
    mine = self.formula
    return Tagged.of(-int(self), Formula(mine.slots, lambda numbers: -mine.evaluate(numbers)), self.noted)


setattr(Tagged, "__neg__", _negative)  # noqa: B010 - in line with the others


@dataclass(frozen=True)
class Use:
    """A tagged number in a call of a torch function.

    Attributes:
        module: Path of the module whose forward made the call.
        family: Of the function, see `family`.
        order: How many calls of this family with this shape of result the module made before.
        shapes: Of the result, one for each tensor.
        dim: Which dimension of the result the number says, None where its place does not tell.
        place: Position or name of the argument.
        value: The number.
        formula: How it follows from slots.
    """

    module: str
    family: str
    order: int
    shapes: tuple[tuple[int, ...], ...]
    dim: int | None
    place: int | str
    value: int
    formula: Formula


@dataclass
class Uses:
    """Everything noted in one run.

    Attributes:
        calls: Uses in torch functions, in order.
        floats: Slots that Python turned into a float, as in 1 / sqrt(width).
        scalars: Slots that a tensor was multiplied by, compared with, and the like.
        counts: How many calls of a family with a shape a module made.
    """

    calls: list[Use]
    floats: set[Slot]
    scalars: set[Slot]
    counts: dict[tuple[str, str, tuple[tuple[int, ...], ...]], int]


FAMILIES = {
    "view": "view reshape unflatten flatten _unsafe_view view_as reshape_as",
    "split": "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes",
    "slice": "__getitem__ slice select narrow index",
    "expand": "expand broadcast_to expand_as repeat",
}
_FAMILY = {word: name for name, words in FAMILIES.items() for word in words.split()}

SIZES = {"view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "full", "rand", "randn"}
SIZES |= {f"new_{name}" for name in ("zeros", "ones", "empty", "full")}

SCALARS = {
    f"{prefix}{name}"
    for prefix in ("", "r", "i")
    for name in ["add", "sub", "mul", "div", "truediv", "floordiv", "pow", "mod"]
}
SCALARS |= {
    "full_like",
    "fill",
    "masked_fill",
    "clamp",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "remainder",
    "tensor",
}


def family(name: str) -> str:
    """Functions that one may be exported as another, under one name."""
    return _FAMILY.get(name, name.strip("_"))  # in place, or a magic method


class _Watch(TorchFunctionMode):
    def __init__(self, uses: Uses, stack: list[str]) -> None:
        super().__init__()
        self.uses, self.stack = uses, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(x.shape) for x in _tensors(result))
        if not shapes:
            return result
        name = getattr(func, "__name__", "")
        key = (self.stack[-1], family(name), shapes)
        order = self.uses.counts.get(key, 0)
        self.uses.counts[key] = order + 1
        for place, number in [*_tagged(args, ()), *_tagged(kwargs or {}, ())]:
            if key[1] in SCALARS:
                self.uses.scalars.update(number.formula.slots)
                continue
            dim = _dimension(name, place, shapes, number)
            self.uses.calls.append(Use(*key[:2], order, shapes, dim, place[0], int(number), number.formula))
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def _tagged(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tagged]]:
    if isinstance(value, Tagged):
        yield place, value
    elif isinstance(value, (tuple, list)):
        for at, part in enumerate(value):
            yield from _tagged(part, (*place, at))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tagged(part, (*place, key))
    elif isinstance(value, slice):
        yield from _tagged((value.start, value.stop, value.step), place)


def _dimension(name: str, place: tuple[Any, ...], shapes: Any, number: int) -> int | None:
    """Of `x.view(2, 3, n)` and `x.view((2, 3, n))` the dimension that n stands for."""
    if name not in SIZES or len(shapes) != 1:
        return None
    method = name in ("view", "reshape", "expand", "broadcast_to") or name.startswith("new_")
    at = place[-1] if len(place) > 1 else place[0] - method
    if not isinstance(at, int) or at >= len(shapes[0]) or shapes[0][at] != number:
        return None
    return at


@contextmanager
def watching(model: nn.Module) -> Iterator[Uses]:
    """Note what torch functions receive while the model's forward runs.

    Args:
        model: A copy that may get hooks; its numbers are tagged with `Tagged.of(..., uses.floats)`.
    """
    uses = Uses([], set(), set(), {})
    stack = [""]
    handles = []
    for path, module in model.named_modules():

        def enter(*_: Any, path: str = path) -> None:
            stack.append(path)

        def leave(*_: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _Watch(uses, stack):
            yield uses
    finally:
        for handle in handles:
            handle.remove()
