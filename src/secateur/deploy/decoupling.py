"""decoupling: where modules that share a table or a residual stream can have an index of their own, and its cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.core.axes.adding import adds_to
from secateur.core.axes.tables import shared_tables
from secateur.core.axes.trace import evaluating
from secateur.core.depth import series
from secateur.core.example import Example, analysis_of, main_output, prepared
from secateur.core.taps import NAME, Tap, parameter_names, tap_, taps_of, untap_
from secateur.core.units import Analysis
from secateur.deploy.compare import answer
from secateur.errors import InputError, UsageError, nearest

__all__ = ["Decoupling", "check_indices", "decouple_", "decoupling", "entries_of", "restore_"]

# what is shared -> kinds of the axes that it ties together
KINDS = {
    "rope": ("rotary pair", "qk dimension", "head dimension"),
    "bias": ("head", "KV group", "query head"),
    "residual": ("hidden",),
}
MISSING = {
    "rope": "no table of angles that several modules share is handed to them",
    "bias": "no table of biases that several modules share is handed to them",
    "residual": "no repeated block is handed hidden states and gives them back with something added (a norm behind the "
    "sum, as in BERT, lets nothing pass)",
}
INDEX = 8  # bytes of a position

Mark = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Decoupling:
    """Taps that would let modules lose units of their own, and what they cost while nothing has gone.

    Attributes:
        taps: module path -> taps.
        bytes_kept: of the indices, in the state_dict from then on.
        bytes_moved: read and written by gathers and scatters, for one token of the example.
        macs: multiply-accumulates that come on top: none, a gather multiplies nothing.
    """

    taps: Mapping[str, tuple[Tap, ...]]
    bytes_kept: int
    bytes_moved: int
    macs: int = 0

    def __str__(self) -> str:
        by_name: dict[str, list[str]] = {}
        for path, taps in self.taps.items():
            for tap in taps:
                by_name.setdefault(tap.name.rstrip("0123456789"), []).append(f"{path}: {tap}")
        lines = []
        for name, places in by_name.items():
            more = f" and {len(places) - 2} more" if len(places) > 2 else ""
            lines.append(f"{name:9}{len(places)} taps, {', '.join(places[:2])}{more}")
        lines.append(
            f"cost     {self.bytes_kept:,} bytes of indices, {self.bytes_moved:,} bytes moved a token, "
            f"{self.macs} MACs, before anything goes"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Call:
    """What one module was handed, and what it gave."""

    leaves: tuple[tuple[tuple[Any, ...], Tensor, Mark], ...]
    out: Mark


def decoupling(
    model: nn.Module, example: Any, what: Sequence[str] = ("rope", "bias", "residual")
) -> Decoupling:
    """Find where taps go; the model is not changed.

    Args:
        model: with weights.
        example: see `analysis_of`.
        what: "rope", tables of rotary angles; "bias", tables with an entry a head; "residual", the residual stream,
            of which every block then reads and writes dimensions of its own.

    Returns:
        The taps and their cost, for `decouple_`.

    Raises:
        UsageError: an unknown word, or something that is not shared in such a way, by name.

    Cost: an export, and two forwards of the example.
    """
    for word in what:
        if word not in KINDS:
            raise UsageError(f"decouple {word!r}: {nearest(word, KINDS)}")
    if not what:
        raise UsageError(f"decouple what? Expected some of {', '.join(KINDS)}")
    if taps_of(model):
        raise UsageError(
            f"{type(model).__name__} is decoupled already; say all at once on the model as it was built"
        )
    analysis, given = analysis_of(model, example)
    finder = _Finder(model, analysis, given)
    taps: dict[str, list[Tap]] = {}
    moved = 0
    for word in dict.fromkeys(what):
        found = finder.of_residual() if word == "residual" else finder.of_tables(word)
        places = list(found)
        if not places:
            raise UsageError(f"{type(model).__name__} cannot be decoupled by {word!r}: {MISSING[word]}")
        for path, tap, tensor in places:
            taps.setdefault(path, []).append(tap)
            moved += tensor.numel() * tensor.element_size() * (5 if tap.writes else 2)
    kept = sum(INDEX * size for mine in taps.values() for size in {t.name: t.size for t in mine}.values())
    order = {path: at for at, (path, _) in enumerate(model.named_modules())}
    sorted_taps = {path: tuple(taps[path]) for path in sorted(taps, key=order.__getitem__)}
    return Decoupling(sorted_taps, kept, moved // max(1, _tokens(given)))


def decouple_(model: nn.Module, found: Decoupling, example: Any = None) -> nn.Module:
    """Give the model the taps that `decoupling` found; it computes what it did.

    Args:
        model: changed in place: modules named in `found.taps` get a part called `decoupled`, with an index a tap.
        found: from `decoupling` of this model.
        example: where given, the model has to give the very same answer as before, else it is as it was.

    Returns:
        The model.

    Raises:
        UsageError: it is not the same model, or gives another answer.
    """
    before = None if example is None else _answer(model, example)
    restore_(model, entries_of(found.taps))
    if before is not None:
        after = _answer(model, example)
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            for path in found.taps:
                untap_(model.get_submodule(path))
            raise UsageError(
                f"{type(model).__name__}: decoupled it computes something else, so it was left as it was"
            )
    return model


def entries_of(taps: Mapping[str, Sequence[Tap]]) -> list[dict[str, Any]]:
    """Taps as plain JSON."""
    return [
        {"module": path, "name": t.name, "leaf": list(t.leaf), "dim": t.dim, "size": t.size, "writes": t.writes}
        for path, mine in taps.items()
        for t in mine
    ]


def check_indices(model: nn.Module) -> None:
    """Refuse positions that do not exist, in a model that was filled from files.

    Raises:
        InputError: with the name.
    """
    for path, taps in taps_of(model).items():
        for tap in taps:
            index = model.get_submodule(path).get_submodule(NAME).get_buffer(tap.name)
            if not index.numel() or not 0 <= int(index.min()) <= int(index.max()) < tap.size:
                raise InputError(f"{path}.{NAME}.{tap.name}: expected positions from 0 to {tap.size - 1}.")


def restore_(model: nn.Module, entries: Any) -> None:
    """Give a model the taps that entries say; trusted in nothing.

    Raises:
        InputError: entries that do not fit the model.
    """
    taps: dict[str, list[Tap]] = {}
    modules = dict(model.named_modules())
    if not isinstance(entries, list):
        raise InputError("decoupled: expected a list.")
    for entry in entries:
        tap = _tap(entry)
        path = entry["module"]
        if path not in modules:
            raise InputError(
                f"decoupled: {type(model).__name__} has no module {path!r}; {nearest(path, modules)}."
            )
        taps.setdefault(path, []).append(tap)
    for path, mine in taps.items():
        try:
            tap_(modules[path], mine)
        except UsageError as error:
            raise InputError(f"decoupled: {path}: {error}.") from None


def _tap(entry: Any) -> Tap:
    kinds = {"module": str, "name": str, "leaf": list, "dim": int, "size": int, "writes": bool}
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
        raise InputError(f"decoupled: expected entries with {', '.join(kinds)}.")
    steps = entry["leaf"]
    words = bool(steps) and type(steps[0]) is str and all(type(step) in (str, int) for step in steps)
    name, size = entry["name"], entry["size"]
    if not words or not name.isidentifier() or name.rstrip("0123456789") not in KINDS or not 1 <= size < 2**31:
        raise InputError(f"decoupled: {entry['module']}: no tap: {str(entry)[:200]}.")
    return Tap(name, tuple(steps), entry["dim"], size, entry["writes"])


class _Finder:
    """Tensors that modules are handed, found again among the values of the exported program, with their axes."""

    def __init__(self, model: nn.Module, analysis: Analysis, example: Example) -> None:
        self.model, self.analysis = model, analysis
        self.kinds = {units.leaf: units.kind for units in analysis.units}
        self.nodes = _nodes(analysis.program, example)
        self.tables = shared_tables(analysis.program.graph)
        self.calls = _calls(model, example)

    def of_tables(self, word: str) -> Iterator[tuple[str, Tap, Tensor]]:
        """The innermost modules that are handed a table, and where."""
        for path, call in self.calls.items():
            names: dict[int, str] = {}
            for leaf, tensor, mark in call.leaves:
                if self._below(path, mark):
                    continue
                nodes = [node for node in self.nodes.get(mark, ()) if node in self.tables]
                for dim in range(tensor.dim()):
                    if self._carries(nodes, dim, word):
                        size = tensor.shape[dim]
                        name = names.setdefault(size, f"{word}{len(names) or ''}")
                        yield path, Tap(name, leaf, dim - tensor.dim(), size), tensor

    def of_residual(self) -> Iterator[tuple[str, Tap, Tensor]]:
        """Repeated blocks that are handed hidden states and give back a tensor of their shape."""
        for each in series(self.model):
            for block in each.blocks:
                call = self.calls.get(block.path)
                for leaf, tensor, mark in call.leaves if call is not None else ():
                    if call is not None and self._passes(mark, call.out):
                        yield block.path, Tap("residual", leaf, -1, tensor.shape[-1], True), tensor
                        break

    def _passes(self, came: Mark, went: Mark) -> bool:
        """Whether what came carries the stream, and what went is that with something added."""
        before, after = self.nodes.get(came, ()), self.nodes.get(went, ())
        shaped = came[0] == went[0] and self._carries(before, -1, "residual")
        return shaped and any(adds_to(node, set(before)) for node in after)

    def _carries(self, nodes: Sequence[fx.Node], dim: int, word: str) -> bool:
        trace = self.analysis.trace
        dims = [trace.dims[node] for node in nodes if isinstance(trace.dims.get(node), tuple)]
        leaves = [leaf for each in dims for leaf in trace.axes.leaves(each[dim])]
        return any(self.kinds.get(leaf) in KINDS[word] for leaf in leaves)

    def _below(self, path: str, mark: Mark) -> bool:
        start = f"{path}." if path else ""
        return any(
            mark == other
            for inner, call in self.calls.items()
            if inner != path and inner.startswith(start)
            for _, _, other in call.leaves
        )


def _mark(x: Tensor) -> Mark:
    value = x.detach()
    value = value if value.is_floating_point() or value.is_complex() else value.double()
    sums = (value.double() if not value.is_complex() else value).sum(), value.abs().double().sum()
    return tuple(x.shape), " ".join(f"{complex(one):.17g}" for one in sums)


class _Marks(fx.Interpreter):
    """Runs a graph and remembers which nodes computed what."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Mark, list[fx.Node]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.found.setdefault(_mark(result), []).append(node)
        return result


@torch.no_grad()
def _nodes(program: fx.GraphModule, example: Example) -> dict[Mark, list[fx.Node]]:
    runner = _Marks(program)
    runner.run(*pytree.tree_leaves((example.args, dict(example.kwargs))), enable_io_processing=False)
    return runner.found


@torch.no_grad()
def _calls(model: nn.Module, example: Example) -> dict[str, _Call]:
    """What every module that runs once was handed."""
    found: dict[str, _Call] = {}
    often: set[str] = set()
    handles = []

    def met(path: str, module: nn.Module) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            if path in found:
                often.add(path)
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            out = _mark(first) if isinstance(first, Tensor) else ((), "")
            named = {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}
            leaves = ((way, x, _mark(x)) for way, x in _tensors(named, ()) if x.is_floating_point() and x.dim())
            found[path] = _Call(tuple(leaves), out)

        return hook

    for path, module in model.named_modules():
        handles.append(module.register_forward_hook(met(path, module), with_kwargs=True))
    try:
        with evaluating(model):
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {path: call for path, call in found.items() if path not in often}


def _tensors(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield way, value
    elif type(value) in (tuple, list):
        for at, inner in enumerate(value):
            yield from _tensors(inner, (*way, at))
    elif type(value) is dict:
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _tensors(inner, (*way, key))


def _tokens(example: Example) -> int:
    """Rows times positions of the first input."""
    first = example.tensors()[0]
    return int(first.shape[0]) * (
        int(first.shape[1]) if first.dim() > 1 and not first.is_floating_point() else 1
    )


def _answer(model: nn.Module, example: Any) -> list[Tensor]:
    with evaluating(model):
        return answer(model, prepared(model, example), main_output)
