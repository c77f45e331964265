"""The config that says a shrunk model's widths, found by search: with it the checkpoint is a plain one.

No table tells which field holds which width in which architecture. Every whole number of the config, and every
field that is None, may take the new sizes of what had its old size; a twin is built from each trial on the meta
device and compared with the model, module by module, until nothing differs. Where something always does, the config
cannot say it, and the nearest trial's first difference says why.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.core.example import main_output
from secateur.deploy.compare import answer, difference
from secateur.deploy.shrunk import Shrunk
from secateur.deploy.slots import ATTRIBUTE, change, ways
from secateur.deploy.twin import buffer_differences, differences, is_transformers, twin_of
from secateur.errors import UsageError

__all__ = ["check_same", "describe"]

TRIALS = 120  # twins that are built at most
TOLERANCE = {2: 2e-2, 4: 1e-5, 8: 1e-9}  # relative, by bytes of a number


def describe(model: nn.Module) -> Any:
    """The configuration from which stock transformers builds this very model, sizes and scales and tables.

    Args:
        model: Of transformers, such as `shrink` makes it; untouched.

    Returns:
        A configuration; the model's own where that says it already. What it builds is to be run by `check_same`
        before it counts.

    Raises:
        UsageError: no configuration says it; the first difference of the nearest one is named.

    Cost:
        A build on the meta device for each trial, and one with values of buffers where the model has such that are
        in no file.
    """
    name = type(model).__name__
    if not is_transformers(model):
        raise UsageError(f"{name}: no model of transformers, so no config can describe it.")
    search = _Search(model)
    best = min(search.starts(), key=lambda trial: trial.cost)
    while best.cost and search.may_help and (found := search.better(best)):
        best = found
    said = best.words or next(iter(buffer_differences(model, twin_of(model, best.config, buffers=True))), "")
    if said:
        raise UsageError(
            f"{name}: no config of its class says these widths, so from_pretrained would build another model: {said}. "
            "Prune with homogeneous=True (--homogeneous) for equal widths in all layers where the config has a field "
            'for them, or save with to="compact" or "padded".'
        )
    return best.config


@dataclass(frozen=True)
class _Trial:
    config: Any
    cost: float  # number of differences; infinite where nothing can be built
    words: str  # the first of them


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.left = TRIALS
        note: Any = vars(model).get(ATTRIBUTE)
        self.source = model.config if not isinstance(note, Shrunk) else self._parsed(note.config)
        self.before = twin_of(model, self.source)
        self.sizes = self._sizes(note) if isinstance(note, Shrunk) else {}
        self.runs = isinstance(note, Shrunk) and note.example is not None  # whether `check_same` will run it

    @property
    def may_help(self) -> bool:
        """Whether a number of the config may be the answer: not where like blocks differ and it has no lists."""
        if any(isinstance(step, int) for way, _ in ways(self.source) for step in way):
            return True
        alike: dict[tuple[str, Any], Any] = {}
        before = self.before.state_dict()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            key = re.sub(r"\.\d+\.", ".*.", name), tuple(before[name].shape) if name in before else ()
            if alike.setdefault(key, tensor.shape) != tensor.shape:
                return False
        return True

    def _parsed(self, text: Any) -> Any:
        config: Any = type(self.model.config)
        return config.from_dict(copy.deepcopy(dict(text)))

    def _sizes(self, note: Shrunk) -> dict[int, set[int]]:
        """Old size -> new sizes of what had it."""
        out: dict[int, set[int]] = {}
        for old, new in note.numbers.values():
            out.setdefault(int(old), set()).add(int(new))
        for axis in note.axes:
            out.setdefault(axis.size, set()).add(axis.width)
        before = {n: tuple(t.shape) for n, t in self.before.state_dict().items()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            for old, new in zip(before.get(name, ()), tensor.shape, strict=False):
                if old != new:
                    out.setdefault(old, set()).add(new)
        return out

    def starts(self) -> Iterator[_Trial]:
        """What the model's own config says, and what it said before it was shrunk."""
        yield self.tried(self.model.config)
        yield self.tried(self.source)

    def tried(self, config: Any) -> _Trial:
        self.left -= 1
        try:
            config = self._parsed(json.loads(config.to_json_string()))  # as it will be read
            twin = twin_of(self.model, config)
            found = [*differences(self.model, twin, before=self.before if self.runs else None)]
        except Exception as error:  # whatever a class raises about a config is what we want to know
            return _Trial(config, float("inf"), f"it cannot be built ({' '.join(str(error).split())[:200]})")
        return _Trial(config, len(found), found[0] if found else "")

    def better(self, best: _Trial) -> _Trial | None:
        """The best change of one field, or of two at once where none of one helps; None where nothing helps."""
        ones = [*self._changes(best.config)]
        trials = [self.tried(self._changed(best.config, [one])) for one in ones[: self.left]]
        found = min(trials, key=lambda trial: trial.cost, default=best)
        if found.cost < best.cost:
            return found
        for at, one in enumerate(ones):
            for other in ones[at + 1 :]:
                if other[0] != one[0] and self.left > 0:
                    trial = self.tried(self._changed(best.config, [one, other]))
                    if trial.cost < best.cost:
                        return trial
        return None

    def _changes(self, config: Any) -> Iterator[tuple[Any, int]]:
        """Fields with numbers that they may hold instead."""
        every = sorted({new for found in self.sizes.values() for new in found})
        before = dict(ways(self.source))
        for way, now in ways(config):
            old = before.get(way, now)
            for new in every if old is None else sorted(self.sizes.get(old, ())):
                if new != now:
                    yield way, new

    @staticmethod
    def _changed(config: Any, changes: list[tuple[Any, int]]) -> Any:
        out = copy.deepcopy(config)
        for way, number in changes:
            change(out, way, number)
        return out


def check_same(model: nn.Module, loaded: nn.Module, what: str) -> float:
    """How far a model that was loaded computes what it did before it was saved, on the inputs it was shrunk with.

    Returns:
        The relative difference; 0 where no inputs are known.

    Raises:
        UsageError: it computes something else.
    """
    note: Any = vars(model).get(ATTRIBUTE)
    if not isinstance(note, Shrunk) or note.example is None:
        return 0.0
    parameter = next(model.parameters())
    given = note.example.map(
        lambda _, x: x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)
    )
    found = difference(
        answer(model, given, main_output), answer(loaded.to(parameter.device), given, main_output)
    )
    if not found <= TOLERANCE.get(parameter.element_size(), 1e-5):
        raise UsageError(
            f"{type(model).__name__}: {what} computes something else (relative difference {found:.1e}); save it with "
            'to="compact".'
        )
    return found
