"""That types and shapes are checked in the tests: a wrong one must fail whatever test meets it."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

from .shapes import _Finder, checked, says_a_shape

MODULE = """
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown

Pair = dict[str, Float[Tensor, "row column"]]
Of = Callable[[Float[Tensor, " row"]], None]


def columns(matrix: Float[Tensor, "row column"], vector: Float[Tensor, " column"]) -> Float[Tensor, " row"]:
    return matrix @ vector if vector[0] else vector


def through(pair: Pair) -> None: ...


def takes(function: Of) -> None: ...


def count(number: int) -> int:
    return number if number else "none"


def unknown(what: Unknown, number: int) -> None: ...


def outer():
    def inner(number: int) -> int:
        return number

    return inner("a word")


@contextmanager
def within(number: int) -> Iterator[int]:
    yield number


@dataclass
class Shaped:
    vector: Float[Tensor, " column"]


@dataclass(frozen=True)
class Plain:
    number: int

    @property
    def twice(self) -> int:
        return 2 * self.number if self.number else "none"

    @classmethod
    def of(cls, number: int) -> Plain:
        return cls(number)

    @staticmethod
    def half(number: float) -> float:
        return number / 2


class Inherits(Plain): ...
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "said_shapes.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "meta_path", [_Finder(["said_shapes"]), *sys.meta_path])
        yield importlib.import_module("said_shapes")
    sys.modules.pop("said_shapes")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m.columns(torch.ones(2, 3), torch.ones(2)),
        lambda m: m.columns(torch.ones(2, 3), torch.ones(3).double().long()),
        lambda m: m.columns(torch.ones(2, 3), torch.zeros(3)),  # returns three numbers for two rows
        lambda m: m.through({"a": torch.ones(3)}),
        lambda m: m.takes(3),
        lambda m: m.count("one"),
        lambda m: m.count(0),
        lambda m: m.within("one").__enter__(),
        lambda m: m.Shaped(torch.ones(2, 3)),
        lambda m: m.Plain("one"),
        lambda m: m.Plain(0).twice,
        lambda m: m.Plain.of("one"),
        lambda m: m.Plain.half("one"),
        lambda m: m.Inherits("one"),
    ],
)
def test_a_wrong_type_or_shape_is_told(module, wrong):
    with pytest.raises(Exception, match=r"(?s)[Tt]ype|violates"):
        wrong(module)


def test_all_else_runs_as_it_is(module):
    assert module.columns(torch.ones(2, 3), torch.ones(3)).tolist() == [3, 3]
    module.through({"a": torch.ones(2, 3)})
    module.takes(print)
    module.unknown("a name that only type checkers know", 3)
    assert module.count(3) == 3
    assert module.outer() == "a word"  # a function inside of a function is left alone
    with module.within(3) as number:
        assert number == 3
    assert module.Plain.of(3).twice == 6
    assert module.Plain.half(3.0) == 1.5
    assert module.Shaped(torch.ones(3)).vector.shape == (3,)
    assert module.Inherits(3) == module.Inherits.of(3)


def test_shapes_are_found_in_annotations(module):
    found = [says_a_shape(inspect.unwrap(f)) for f in (module.columns, module.through, module.takes)]
    assert found == [True] * 3
    assert not any(says_a_shape(inspect.unwrap(f)) for f in (module.count, module.unknown, module.outer))
    assert says_a_shape(inspect.unwrap(module.Shaped.__init__))
    assert checked(module.Plain) is module.Plain


@pytest.mark.parametrize("package", ["core", "score", "pattern", "allocate"])
def test_the_packages_of_masks_are_checked(package):
    found = importlib.import_module(f"secateur.{package}")
    assert "__checked__" in vars(found)


@pytest.mark.parametrize("package", ["core", "score", "pattern", "allocate"])
def test_no_function_inside_of_a_function_says_a_shape(package):
    """Nothing would check it."""
    home = Path(importlib.import_module(f"secateur.{package}").__file__).parent
    functions = [
        node
        for file in home.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert functions
    for outer in functions:
        for node in ast.walk(outer):
            if node is not outer and isinstance(node, ast.FunctionDef):
                said = ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None))
                assert "Tensor, '" not in said, f"{node.name} of {outer.name}: {said}"
