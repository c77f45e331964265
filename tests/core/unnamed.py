"""Blocks whose names, attributes or classes are what a test says."""

from __future__ import annotations

from torch import nn


class Foo(nn.Module):
    """A block whose attributes say nothing: a list of (rows, columns) becomes a, b, c ..."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        for letter, (rows, columns) in zip("abcdefghij", shapes, strict=False):
            setattr(self, letter, nn.Linear(columns, rows, bias=False))


def container(class_name: str, modules: dict[str, nn.Module], **attributes: object) -> nn.Module:
    """A module of a class of this name; the same name gives the same class."""
    kind = CLASSES.setdefault(class_name, type(class_name, (nn.Module,), {}))
    made = kind()
    for name, module in modules.items():
        made.add_module(name, module)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


CLASSES: dict[str, type[nn.Module]] = {}


def squares(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(32, 32, bias=False) for name in names}
