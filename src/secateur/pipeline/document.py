"""A YAML file as plain values, with the line on which each of them stands.

Scalars follow YAML 1.2, so that `2:4` is no number to the base of 60, `1e-4` is a number and `no` a word. Duplicate
keys, aliases and tags are refused: nothing in the file becomes code, and a small file stays small.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from secateur.errors import InputError, UsageError, nearest

__all__ = ["Document", "Place", "read"]

LARGEST = 1_000_000  # bytes
DEEPEST = 20
Place = tuple[str | int, ...]  # keys and list positions from the root


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        value: mappings, lists, strings, numbers, booleans and None.
        name: of the file, for messages.
        lines: place -> line number, from 1; of a mapping's entry that of its key.
    """

    value: Any
    name: str
    lines: dict[Place, int] = field(repr=False)

    def where(self, place: Place) -> str:
        """`file, line n`: of the place, or of the nearest one around it."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return f"{self.name}, line {self.lines[place[:end]]}"
        return self.name


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2's core schema; everything else as SafeLoader has it."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"$"), [""])


def read(path: str | Path) -> Document:
    """Read a file.

    Raises:
        UsageError: no such file, or something that is not plain YAML, naming the line.
        InputError: a file that is no text or far too large.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are too many for an experiment")
        text = path.read_text("utf-8")
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {near}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: no text in UTF-8") from None
    return parse(text, path.name)


def parse(text: str, name: str) -> Document:
    """The plain values in a text; see `read`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        reading = _Reading(name)
        return Document(None if node is None else reading.value(node, ()), name, reading.lines)
    except UsageError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{line}: no YAML ({error.problem or error.context})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{name}: no YAML ({' '.join(str(error).split())[:200]})") from None
    finally:
        loader.dispose()


class _Reading:
    """Nodes become values, each once."""

    def __init__(self, name: str):
        self.name = name
        self.lines: dict[Place, int] = {}
        self.seen: set[int] = set()

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if len(place) > DEEPEST:
            self._refuse(node, f"nested more than {DEEPEST} deep")
        if id(node) in self.seen:
            self._refuse(node, "an alias; write it out")
        self.seen.add(id(node))
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(each, (*place, number)) for number, each in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            self._refuse(node, f"the tag {kind} is refused; plain values need none")
        return _SCALARS[kind](node.value)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, each in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "a key must be a word")
            key = key_node.value
            inside = (*place, key)
            if key in found:
                self._refuse(key_node, f"{key} stands here twice, first on line {self.lines[inside]}")
            self.lines[inside] = key_node.start_mark.line + 1
            found[key] = self.value(each, inside)
        return found

    def _refuse(self, node: yaml.Node, what: str) -> NoReturn:
        raise UsageError(f"{self.name}, line {node.start_mark.line + 1}: {what}")


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
}
