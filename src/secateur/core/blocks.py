"""What each matrix inside one repeated block does: attention, feed-forward, router of experts, or other.

The evidence, in the order in which it counts:

1. Experts: a stacked tensor, or a list of equal feed-forwards. They are `ffn`; a matrix beside them with one
   row for each expert is their `router`, and so is one with a single row (the gate of a shared expert).
2. Convolutions: matrices that stand beside a convolution (a state-space mixer, ConvNeXt), and everything in a
   block that convolves images without attending, are `other`.
3. Attributes: a module inside the block that counts heads (`num_heads`, `head_dim` ...) is attention, unless
   its matrices form a whole layer, attention and feed-forward.
4. Widths (`secateur.core.widths`): first of each container, from the outside in, then of the matrices that no
   container explains.
5. Names of modules and classes, for what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

from secateur.core.matrix import Layout
from secateur.core.stacks import below, join
from secateur.core.widths import Matrix, Part, cover, parts_of

__all__ = ["BlockRole", "Entry", "block_roles"]

BlockRole = Literal["attention", "ffn", "router", "other"]

HEAD_ATTRIBUTES = (
    *("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "heads"),
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "head_dim", "head_size", "attention_head_size"),
)
ATTENTION_NAMES = r"attn|attention|qkv|query|key|value|(?<![a-z])[qkvo](?![a-z])"
FFN_NAMES = (
    r"mlp|ffn|feed_?forward|intermediate|expert|(?<![a-z])(ff|fc\d*|w[123])(?![a-z])|(gate|up|down)_proj"
)
NAMES: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("attention", re.compile(ATTENTION_NAMES, re.IGNORECASE)),
    ("ffn", re.compile(FFN_NAMES, re.IGNORECASE)),
)


class Entry(NamedTuple):
    """One matrix parameter: its full name, its module and where that is, and how it is seen as matrices."""

    name: str
    path: str
    module: nn.Module
    layout: Layout


def block_roles(block: nn.Module, path: str, entries: Sequence[Entry]) -> dict[str, BlockRole]:
    """The role of every entry of `block`, by full parameter name; embeddings must be left out of `entries`."""
    reading = _Reading(block, path, entries)
    reading.find_experts()
    reading.read(path, [entry.name for entry in entries])
    return reading.conclude()


class _Reading:
    """What is known so far about the matrices of one block."""

    def __init__(self, block: nn.Module, path: str, entries: Sequence[Entry]) -> None:
        self.path = path
        self.entries = {entry.name: entry for entry in entries}
        self.modules = {join(path, sub) if sub else path: module for sub, module in block.named_modules()}
        self.matrices = {entry.name: _matrix(entry) for entry in entries if not _convolves(entry.module)}
        self.roles: dict[str, BlockRole] = {}
        # attention by its attributes, which may lack the matrix that closes it: `out_proj` may stand outside
        self.provisional: set[str] = set()

    def read(self, path: str, names: list[str], attending: bool = False) -> None:
        """Give roles to what stands at or below `path`, as far as the evidence there goes.

        Inside a module that counts heads (`attending`) a pair that narrows is an adapter of attention.
        """
        direct, containers = self._split(path, names)
        attends = path != self.path and _counts_heads(self.modules[path])
        if self._mixes(path, direct, attends):
            self._set(direct, "other")
        linear = self._open(names)
        readings = parts_of([self.matrices[name] for name in linear])
        counted = attends or any(_counts_heads(self.modules[each]) for each in self._around(path, linear))
        if readings and counted and readings[0].part == "attention":
            self._set(linear, "attention")
            return
        if readings and not counted and (not attending or readings[0].widens):
            against = [sum(self.hint(m) not in (None, group.part) for m in group.members) for group in readings]
            self._set(linear, readings[against.index(min(against))].part)
            return
        for child, inside in containers.items():
            self.read(child, inside, attending or attends)
        self._pool(names, attends)
        holds = {self.roles.get(name) for name in names}
        attention = attends or "attention" in holds or self.provisional.intersection(names)
        if attention and "ffn" not in holds and path != self.path:
            # convolutions inside attention (reduced keys and values) belong to it
            self.provisional |= {name for name in names if name not in self.roles}

    def _pool(self, names: list[str], attends: bool) -> None:
        """Explain what is left over by its widths, with and without the open attention of a container."""
        loose = self._open(names)
        for pool in (loose, [name for name in loose if name not in self.provisional]):
            if self.provisional.issuperset(pool):
                return
            groups = cover([self.matrices[name] for name in pool], self.hint)
            layer = len({group.part for group in groups}) == 2
            feeds = all(group.widens for group in groups if group.part == "ffn")
            if groups and (not attends or (layer and feeds)):
                for group in groups:
                    self._set([matrix.name for matrix in group.members], group.part)
                return

    def conclude(self) -> dict[str, BlockRole]:
        """The last evidence, names, and the convolutions of images."""
        counts_heads = _counts_heads(self.modules[self.path])
        for name in self.entries:
            if name in self.roles:
                continue
            if name in self.provisional:
                self.roles[name] = "attention"
            elif name in self.matrices:
                widths_allow = counts_heads and "ffn" not in self.roles.values()
                self.roles[name] = self.hint(self.matrices[name]) or ("attention" if widths_allow else "other")
            else:
                self.roles[name] = "other"
        images = any(
            isinstance(e.module, nn.Conv2d | nn.Conv3d) and _convolves(e.module) for e in self.entries.values()
        )
        if images and "attention" not in self.roles.values():
            return dict.fromkeys(self.entries, "other")
        return {name: self.roles[name] for name in self.entries}

    def find_experts(self) -> None:
        """Banks of experts and, beside them, their routers."""
        for bank, inside, count in self._banks():
            self._set([name for name in inside if name in self.matrices], "ffn")
            width = self.matrices[inside[0]].columns
            owner = bank.rpartition(".")[0] if bank != self.path else bank
            names = [name for name, entry in self.entries.items() if below(owner, entry.path) is not None]
            direct = self._split(owner, names)[0]
            beside = [self.matrices[name] for name in self._open(names)]
            # a feed-forward with as many neurons as there are experts has a matrix that closes it
            routers = {1} if any(matrix.columns == count for matrix in beside) else {1, count}
            # in a block that is itself the mixture, only what stands directly in it can be a router
            for matrix in beside:
                near = matrix.name in direct or (matrix.rows > 1 and owner != self.path)
                if near and matrix.columns == width and matrix.rows in routers:
                    self.roles[matrix.name] = "router"

    def _banks(self) -> list[tuple[str, list[str], int]]:
        """Path, parameter names and number of experts of every bank in the block."""
        found = []
        for path, module in self.modules.items():
            inside = [name for name, entry in self.entries.items() if below(path, entry.path) is not None]
            own = [name for name in inside if self.entries[name].path == path and name in self.matrices]
            if (
                own
                and self.entries[own[0]].layout.shape[0] > 1
                and not isinstance(module, nn.MultiheadAttention)
            ):
                found.append((path, own, self.entries[own[0]].layout.shape[0]))
            elif isinstance(module, nn.ModuleList | nn.ModuleDict) and self._equal_experts(
                path, module, inside
            ):
                found.append((path, inside, len(module)))
        return found

    def _equal_experts(self, path: str, module: nn.ModuleList | nn.ModuleDict, inside: list[str]) -> bool:
        children = dict(module.named_children())
        if len(children) < 2 or len({type(child) for child in children.values()}) > 1:
            return False
        experts = [self._split(path, inside)[1].get(f"{path}.{name}", []) for name in children]
        if any(name not in self.matrices for expert in experts for name in expert):
            return False
        shapes = [[self.matrices[name][1:] for name in expert] for expert in experts]
        readings = parts_of([self.matrices[name] for name in experts[0]])
        return all(shape == shapes[0] for shape in shapes) and bool(readings) and readings[0].part == "ffn"

    def hint(self, matrix: Matrix) -> Part | None:
        """What names say: the nearest module inside the block whose name or class says anything."""
        path = self.entries[matrix.name].path
        while path != self.path:
            words = f"{path.rpartition('.')[2]} {type(self.modules[path]).__name__}"
            for part, pattern in NAMES:
                if pattern.search(words):
                    return part
            path = path.rpartition(".")[0]
        return None

    def _around(self, path: str, names: Iterable[str]) -> set[str]:
        """Paths of the modules strictly inside `path` that hold any of these matrices."""
        found = set()
        for name in names:
            inner = self.entries[name].path
            while inner != path:
                found.add(inner)
                inner = inner.rpartition(".")[0]
        return found

    def _split(self, path: str, names: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
        """What stands directly at `path` (or alone in its container), and the rest by container."""
        direct, containers = [], dict[str, list[str]]()
        for name in names:
            inside = below(path, self.entries[name].path)
            if inside:
                child = join(path, inside.split(".")[0])
                containers.setdefault(child, []).append(name)
            else:
                direct.append(name)
        for child, inside_names in list(containers.items()):
            if len(inside_names) == 1 and not _counts_heads(self.modules[child]):
                direct += containers.pop(child)
        return direct, containers

    def _mixes(self, path: str, direct: list[str], attends: bool) -> bool:
        """Whether a convolution stands directly in this module; attention admits all but depthwise in time."""
        for name in direct:
            module = self.entries[name].module
            if _convolves(module) and below(path, self.entries[name].path) in dict(
                self.modules[path].named_children()
            ):
                depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
                if depthwise or not attends:
                    return True
        return False

    def _open(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        return [name for name in self.matrices if name in wanted and name not in self.roles]

    def _set(self, names: Iterable[str], role: BlockRole) -> None:
        for name in names:
            self.roles.setdefault(name, role)


def _matrix(entry: Entry) -> Matrix:
    part, rows, columns = entry.layout.shape
    packed = isinstance(entry.module, nn.MultiheadAttention)
    return Matrix(entry.name, rows * part if packed else rows, columns)


def _convolves(module: nn.Module) -> bool:
    """A convolution over space or time; a Conv1d with kernel 1 is a Linear by another name."""
    if isinstance(module, nn.Conv1d):
        return module.kernel_size != (1,)
    return isinstance(module, nn.Conv2d | nn.Conv3d)


def _counts_heads(module: nn.Module) -> bool:
    values = (getattr(module, name, None) for name in HEAD_ATTRIBUTES)
    return any(isinstance(value, int) and not isinstance(value, bool) for value in values)
