"""Targets in real units for coupled units: parameters, multiply-accumulates, bytes, or time on this machine.

A target is turned into the number of weights to keep by trying: which units an allocation keeps is cheap to
know once their scores are, and what is left then needs so and so much.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur import evaluate
from secateur.core.example import Example
from secateur.core.feasible import feasible, neighbours
from secateur.core.select import Candidates
from secateur.core.units import Analysis, pruned_program
from secateur.errors import UsageError
from secateur.recipes import Recipe
from secateur.scoring import kept_of

__all__ = ["Target", "counts_of", "meter_of"]

Quantity = Literal["parameters", "macs", "bytes", "ms"]
Meter = Callable[[Mapping[str, Tensor]], float]  # axis -> kept units -> how much of the quantity is left

TOLERANCE = 0.02
_WORDS: dict[str, Quantity] = {
    "parameters": "parameters", "parameter": "parameters", "params": "parameters", "macs": "macs", "mac": "macs",
    "bytes": "bytes", "byte": "bytes", "b": "bytes", "ms": "ms", "smaller": "bytes", "faster": "ms",
}  # fmt: skip
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_FORM = re.compile(
    r"(?P<number>\d+(?:\.\d+)?)\s*(?P<scale>[kmg%x]?)\s*(?P<fewer>fewer\s+)?(?P<word>"
    + "|".join(sorted(_WORDS, key=len, reverse=True))
    + ")",
    re.IGNORECASE,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What the model is to need when the pruned units are gone; met within 2 %, or refused.

    Args:
        quantity: "parameters" in use (tied ones once), "macs" of one row of the example, "bytes" of parameters and
            buffers as they are stored, or "ms" of a forward pass of the example, measured on this machine.
        value: above 0; how much is left.
        relative: value is a fraction of what the dense model needs.

    Example:
        >>> Target.parse("300M macs"), Target.parse("2x faster").value
        (Target(quantity='macs', value=300000000.0, relative=False), 0.5)
    """

    quantity: Quantity
    value: float
    relative: bool = False

    def __post_init__(self):
        if not 0 < self.value < float("inf") or (self.relative and self.value > 1):
            raise UsageError(
                f"target of {self.value:g} {self.quantity}: expected more than 0, and at most 1 for a fraction of the "
                "dense model"
            )

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "0.5 parameters", "50% macs", "1.2M parameters", "300M macs", "20 MB", "2x faster", "12 ms".

        A number of at most 1 is the fraction that is left, as a percentage is; "2x" is half of it.
        """
        found = _FORM.fullmatch(text.strip().replace(",", ""))
        word = found["word"].lower() if found else ""
        scale = found["scale"].lower() if found else ""
        times = scale == "x"
        fits = times if found and (found["fewer"] or word in ("faster", "smaller")) else not times
        if not found or not fits:
            raise UsageError(
                f"target {text!r} is not understood; expected for example '0.5 parameters', '300M macs', '20 MB', "
                "'2x faster', '2x fewer macs' or '12 ms'"
            )
        value = float(found["number"])
        if value == 0 or (times and value < 1):
            raise UsageError(f"target {text!r}: expected a number above 0, and a factor of at least 1")
        if times:
            return cls(_WORDS[word], 1 / value, True)
        if scale == "%":
            return cls(_WORDS[word], value / 100, True)
        relative = value <= 1 and scale == "" and _WORDS[word] != "ms"
        return cls(_WORDS[word], value if relative else value * _SCALES[scale], relative)

    @classmethod
    def read(cls, given: Any, recipe: Recipe, sparsity: float | None, nonzero: int | None) -> Target | None:
        """What `prune_` was given for a target, checked against the rest of the request."""
        if given is None:
            return None
        target = cls.parse(given) if isinstance(given, str) else given
        if not isinstance(target, Target):
            raise UsageError(f"target is {given!r}; expected a text such as '0.5 parameters', or a Target")
        if sparsity is not None or nonzero is not None:
            other = "sparsity" if sparsity is not None else "nonzero"
            raise UsageError(f"target and {other} both say how much is cut; leave one of them out")
        if not hasattr(recipe.pattern, "sites"):
            raise UsageError(
                f"a target of {target.quantity} needs units that can be taken out, such as pattern=Neurons(); zeros "
                f"from {recipe.pattern!r} leave every tensor as large as it was. For those say sparsity= or nonzero="
            )
        if getattr(recipe.allocate, "decides", False):
            raise UsageError(f"{recipe.allocate!r} decides how much is cut; leave target out")
        return target

    def said(self, amount: float) -> str:
        """An amount of the quantity in words."""
        if self.relative:
            return f"{amount:.4f}"
        return f"{amount:.3f} ms" if self.quantity == "ms" else f"{amount:,.0f}"

    def __str__(self) -> str:
        of = f" of the dense model's {self.quantity}" if self.relative else f" {self.quantity}"
        return self.said(self.value).removesuffix(" ms") + of


def counts_of(model: nn.Module, todo: Any, candidates: Mapping[str, Candidates]) -> dict[str, Tensor]:
    """Units kept in each competition, as a plan asks: by its number of weights, or by its target in real units.

    Args:
        model: for the errors' sake and for measuring.
        todo: a `Plan`.
        candidates: by the name of their site.

    Raises:
        UsageError: a target that no number of units meets; the message says what can be reached.
    """

    def at(keep: int) -> dict[str, Tensor]:
        return feasible(candidates, todo.recipe.allocation(candidates, keep), None if decides else keep)

    decides = todo.keep is None and todo.target is None
    if todo.target is None:
        return at(todo.keep or 0)
    meter = meter_of(todo.target, todo.analysis, todo.example)
    candidates = with_costs(candidates, todo.target, todo.analysis)
    return _search(todo.target, meter, at, candidates)


def with_costs(
    candidates: Mapping[str, Candidates], target: Target, analysis: Analysis
) -> dict[str, Candidates]:
    """The candidates with what one unit of each frees of the target's quantity; multiply-accumulates for a time.

    It is counted when an allocator asks, once for each axis.
    """
    count = {"parameters": analysis.parameter_count, "bytes": analysis.byte_count}.get(
        target.quantity, analysis.macs
    )

    def freed(name: str, units: int) -> float:
        return float(count({}) - count({name: torch.arange(units - 1)}))

    return {
        name: replace(layer, cost=cache(partial(freed, name, layer.units)))
        for name, layer in candidates.items()
    }


def meter_of(target: Target, analysis: Analysis, example: Example | None) -> Meter:
    """How much of the target's quantity is left when only some units are kept."""
    if target.quantity == "ms":
        if example is None:
            raise UsageError(
                "a target in ms is measured on an example; pass example= as an input, not an Analysis"
            )
        return _stopwatch(target, analysis, example)
    rows = example.rows if example is not None and target.quantity == "macs" else 1
    count = {"parameters": analysis.parameter_count, "macs": analysis.macs, "bytes": analysis.byte_count}
    measure = count[target.quantity]
    whole = measure({}) if target.relative else rows
    return lambda keep: measure(keep) / whole


class _Call(nn.Module):
    """A program together with its inputs."""

    def __init__(self, program: nn.Module, example: Example) -> None:
        super().__init__()
        self.program, self.example = program, example

    def forward(self) -> Any:
        return self.program(*self.example.args, **self.example.kwargs)


def _stopwatch(target: Target, analysis: Analysis, example: Example) -> Meter:
    """Milliseconds of the program without the pruned units, or their ratio to the whole program's, taken in turns."""
    dense = _Call(pruned_program(analysis, {}), example)  # rebuilt like the pruned one, so that they compare

    def measure(keep: Mapping[str, Tensor]) -> float:
        pair = {"dense": dense, "pruned": _Call(pruned_program(analysis, keep), example)}
        found = evaluate.paired_latency(pair, (), repeats=ROUNDS, warmup=2)
        if target.relative:
            return 1 / float(found.speedup["pruned"].value)
        return float(found.latency["pruned"].value)

    return measure


ROUNDS = 15  # of timing, for each number of units that is tried


@dataclass(frozen=True)
class _Trial:
    """Counts that were tried, and how much of the quantity they leave."""

    miss: float
    amount: float
    counts: dict[str, Tensor]


def _search(
    target: Target,
    meter: Meter,
    at: Callable[[int], dict[str, Tensor]],
    candidates: Mapping[str, Candidates],
) -> dict[str, Tensor]:
    """Halve the interval of weights kept until the target is met, or no unit is left between; then try single units."""

    def tried(counts: dict[str, Tensor]) -> _Trial:
        kept = {
            name: kept_of(layer, counts[name])[0].nonzero().flatten().cpu()
            for name, layer in candidates.items()
        }
        amount = meter(kept)
        log.info("%s kept: %s", {name: len(index) for name, index in kept.items()}, target.said(amount))
        return _Trial(abs(amount - target.value), amount, counts)

    low = sum(layer.cells * layer.least for layer in candidates.values())
    high = sum(layer.weights for layer in candidates.values())
    least, most = tried(at(low)), tried(at(high))
    best = min(least, most, key=_miss)
    finest = min(layer.cells for layer in candidates.values())
    close = TOLERANCE / 4 if target.quantity == "ms" else 0.0  # times are no more exact than that
    while high - low > finest and best.miss > close * target.value:
        middle = (low + high) // 2
        trial = tried(at(middle))
        best = min(best, trial, key=_miss)
        low, high = (low, middle) if trial.amount > target.value else (middle, high)
    if target.quantity != "ms":
        best = _refined(target, best, tried, candidates)
    if best.miss > TOLERANCE * target.value:
        raise UsageError(
            f"a target of {target} cannot be met within {TOLERANCE:.0%}: {target.said(least.amount)} to "
            f"{target.said(most.amount)} can be reached in whole units, and nearest is {target.said(best.amount)}. "
            "Choose another target, more kinds of units, or a smaller multiple="
        )
    return best.counts


def _refined(
    target: Target,
    best: _Trial,
    tried: Callable[[dict[str, Tensor]], _Trial],
    candidates: Mapping[str, Candidates],
) -> _Trial:
    """Where whole steps of the allocation miss the target, one axis after another gives or takes a unit."""
    while best.miss > TOLERANCE * target.value:
        near = min(map(tried, neighbours(candidates, best.counts)), key=_miss, default=best)
        if near.miss >= best.miss:
            break
        best = near
    return best


def _miss(trial: _Trial) -> float:
    return trial.miss
