"""Types and shapes checked at run time, in packages whose functions say them.

jaxtyping's own hook wraps whatever is called: a function inside of a function anew each time, which takes longer than
most tests, and a function that says no shape as slowly as one that does. Here a function inside of a function is left
alone (`tests/test_shapes.py` sees that none says a shape), and one without a shape is checked by beartype alone.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

import beartype
import jaxtyping

HERE = "__checked__"


def says_a_shape(function: Any) -> bool:
    """Whether an annotation of a function holds one of jaxtyping's, by itself or by a name for it."""
    names = {word for hint in function.__annotations__.values() for word in _words(hint)}
    return any(_has_a_shape(function.__globals__.get(name)) for name in names)


def _words(hint: Any) -> list[str]:
    return re.findall(r"[^\W\d]\w*", hint if isinstance(hint, str) else repr(hint))


def _has_a_shape(value: Any) -> bool:
    if isinstance(value, list | tuple):  # the parameters of a Callable
        return any(map(_has_a_shape, value))
    if inspect.isclass(value) and value.__module__.split(".")[0] == "jaxtyping":
        return True
    return any(map(_has_a_shape, get_args(value)))


def _is_known(hint: Any, names: dict[str, Any]) -> bool:
    """Whether an annotation means something now: not a name for type checkers alone, nor of what comes later."""
    try:
        return not isinstance(hint, str) or eval(hint, names) is not NotImplemented
    except Exception:
        return False


def checked(thing: Any) -> Any:
    """A function or a class, the generated `__init__` of a dataclass included, that checks what it is called with."""
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(checked(thing.__func__))
    if isinstance(thing, property):
        return property(*(part and checked(part) for part in (thing.fget, thing.fset, thing.fdel)))
    for name, hint in thing.__annotations__.items():
        if not _is_known(hint, thing.__globals__):
            thing.__annotations__[name] = Any
    if says_a_shape(thing):
        return jaxtyping.jaxtyped(thing, typechecker=beartype.beartype)
    return beartype.beartype(thing)


class _Marked(ast.NodeTransformer):
    """Decorates classes, and functions that are not inside of another."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, ast.copy_location(ast.Name(HERE, ast.Load()), node))  # after @dataclass
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(ast.copy_location(ast.Name(HERE, ast.Load()), node))
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew each time, so that no cache outside of the tests holds it."""
        path = self.get_filename(fullname)
        tree = _Marked().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[HERE] = checked
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(f"{fullname}.".startswith(f"{package}.") for package in self.packages):
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _Loader(found.loader.name, found.loader.path)
        return found


def check(packages: Sequence[str]) -> None:
    """Every module of these packages that is imported from now on is checked."""
    sys.meta_path.insert(0, _Finder(packages))
