"""What a threshold would remove: a slider, live and per layer, from the stored histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UsageError, nearest
from .elements import Section, chooser, details, figure, plural, shorten, table
from .grid import Grid
from .histogram import CountBelow, Histogram
from .markup import Html, join, named, shown, tag
from .numbers import count, number, percent
from .weights import Stage

__all__ = ["Cut", "threshold_for", "threshold_section"]

Kind = Literal["weights", "neurons"]
_SYMBOL = {"weights": "τ", "neurons": "λ"}
_KEY = {"weights": "tau", "neurons": "lambda"}
_HEADING = {"weights": "What would a threshold remove?", "neurons": "Activations"}
_SPREAD = {
    "weights": "weights of this layer by magnitude",
    "neurons": "neurons of this layer by mean activation",
}
_LEAD = {
    "weights": "A threshold τ removes every weight of magnitude |w| ≤ τ. Move it to see, layer by layer, how many that "
    "would be.",
    "neurons": "Activation pruning removes every neuron whose mean activation |a| over the data is at most λ. Move it "
    "to see, layer by layer, how many that would be.",
}


@dataclass(frozen=True)
class Cut:
    """How much of each layer a threshold removes.

    Attributes:
        tau: the threshold.
        layers: layer -> how many of its values it removes.
        sizes: layer -> how many values it has.
    """

    tau: float
    layers: Mapping[str, CountBelow]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, histograms: Mapping[str, Histogram], tau: float) -> Cut:
        """Count from histograms; see `Histogram.count_up_to` for when that is exact."""
        counts = {name: held.count_up_to(tau) for name, held in histograms.items()}
        return cls(tau, counts, {name: held.n for name, held in histograms.items()})

    @property
    def total(self) -> CountBelow:
        """Over all layers."""
        parts = list(self.layers.values())
        return CountBelow(
            sum(part.low for part in parts),
            sum(part.estimate for part in parts),
            sum(part.high for part in parts),
        )

    @property
    def size(self) -> int:
        """Values in all layers."""
        return sum(self.sizes.values())


def threshold_for(histograms: Mapping[str, Histogram], sparsity: float) -> float:
    """The least threshold of the slider that removes at least this fraction of all values.

    Raises:
        UsageError: sparsity is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise UsageError(f"sparsity is {sparsity}, expected a fraction in [0, 1]")
    stops = thresholds(list(histograms.values()))
    low, high = 0, len(stops) - 1
    size = sum(held.n for held in histograms.values())
    while low < high:
        middle = (low + high) // 2
        if sum(held.count_up_to(stops[middle]).low for held in histograms.values()) >= sparsity * size:
            high = middle
        else:
            low = middle + 1
    return stops[low]


def thresholds(held: Sequence[Histogram]) -> list[float]:
    """Where the slider stops: 0, and just below each edge of the finest bins.

    There the counts of the layer with the finest bins are exact, and those of every layer whose own bins have that
    edge: all layers above their 2^exponent. Below it a coarser layer may have a bin across the edge; its error is then
    what lies in that one bin.
    """
    filled = [one for one in held if one.limit > 0]
    if not filled:
        return [0.0]
    finest = Grid(max(one.bins for one in filled), max(min(one.exponent for one in filled), -126))
    reach = min(max(max(-one.min, one.max) for one in filled), 2.0**126)
    last = int(finest.index(np.array([reach]))[0]) + 1
    edges = np.array([finest.edge(at) for at in range(1, last + 1)], dtype=np.float32)
    return [0.0, *np.nextafter(edges, np.float32(0)).astype(np.float64).tolist()]


def threshold_section(
    stages: Sequence[Stage],
    *,
    kind: Kind = "weights",
    start: float | None = None,
    stage: str | None = None,
    shared: str | None = None,
    heading: str = "",
    anchor: str = "",
) -> Section:
    """A slider over thresholds: removed values of each layer, the sparsity-to-threshold curve, the chosen layer.

    The page's address keeps the threshold, `#tau=0.05` (`#lambda=0.05` for neurons).

    Args:
        stages: histograms to count from, of weights, or of each neuron's mean absolute activation; one stage or more
            to choose from.
        kind: what is removed: "weights" at |w| <= tau or "neurons" at mean |a| <= lambda.
        stage: name of the stage that is counted at first; by default the first one.
        start: the threshold at first; by default the one that removes half.
        shared: anchor of a `histogram_section` of these very stages in the same page, so that they are not stored
            twice.
        heading: of the section.
        anchor: its name in links; `threshold` or `activations` by default.

    Raises:
        UsageError: no stages, or a start that is no magnitude.
    """
    if not stages or not any(stage.histograms for stage in stages):
        raise UsageError("a threshold needs the histograms of at least one stage. Pass stages.")
    symbol = _SYMBOL[kind]
    anchor = anchor or {"weights": "threshold", "neurons": "activations"}[kind]
    names = list(dict.fromkeys(name for stage in stages for name in stage.histograms))
    if stage is not None and stage not in [one.name for one in stages]:
        raise UsageError(f"no stage is called {stage!r}; {nearest(stage, [one.name for one in stages])}")
    at = 0 if stage is None else [one.name for one in stages].index(stage)
    first = stages[at].histograms
    tau = threshold_for(first, 0.5) if start is None else start
    cut = Cut.of(first, tau)
    data = {
        "kind": kind,
        "symbol": symbol,
        "key": _KEY[kind],
        "start": tau,
        "stage": at,
        "names": [shown(name) for name in names],
        "short": shorten(names),
        "shared": shared,
        "stages": [shown(stage.name) for stage in stages],
        "histograms": None
        if shared
        else [
            [stage.histograms[name].to_dict() if name in stage.histograms else None for name in names]
            for stage in stages
        ],
    }
    chart = figure(
        anchor,
        "threshold",
        data,
        label=f"Curves: removed {kind} against the threshold {symbol}, of all layers and of the chosen one",
        before=_controls(anchor, kind, stages, at, names, cut),
    )
    body = join(
        tag("p", _LEAD[kind], class_="lead"),
        chart,
        details("The curve as a table", tag("div", id=f"{anchor}-curve")),
        _layer_table(cut, names, kind, anchor),
    )
    return Section(anchor, heading or _HEADING[kind], body)


def _controls(
    anchor: str, kind: Kind, stages: Sequence[Stage], chosen: int, names: Sequence[str], cut: Cut
) -> Html:
    symbol = _SYMBOL[kind]
    slider = tag(
        "div",
        tag("label", f"Threshold {symbol}", for_=f"{anchor}-slider"),
        tag("input", type="range", min=0, max=1, value=0, step=1, id=f"{anchor}-slider", data_part="slider"),
        class_="choice wide-slider",
    )
    typed = {"type": "text", "inputmode": "decimal"}
    value = tag("input", **typed, value=number(cut.tau), id=f"{anchor}-value", data_part="value", size=10)
    share = tag("input", **typed, id=f"{anchor}-share", data_part="share", size=7)
    fields = tag(
        "div",
        tag("span", tag("label", f"{symbol} =", for_=f"{anchor}-value"), value, class_="field"),
        tag("span", tag("label", f"{kind} removed, in %", for_=f"{anchor}-share"), share, class_="field"),
        class_="fields",
    )
    sentence = tag(
        "output", _sentence(cut, kind), class_="sentence", id=f"{anchor}-sentence", for_=f"{anchor}-slider"
    )
    stage = None
    if len(stages) > 1:
        options = (
            tag("option", shown(one.name), value=at, selected=at == chosen) for at, one in enumerate(stages)
        )
        stage = tag(
            "div",
            tag("label", "Stage", for_=f"{anchor}-stage"),
            tag("select", *options, id=f"{anchor}-stage", data_part="stage"),
            class_="choice",
        )
    legend = tag(
        "ul",
        tag("li", _line("dash0", "s1"), " all layers"),
        tag("li", _line("dash1", "s2"), " this layer"),
        tag(
            "li",
            tag("span", class_="swatch s0 area", aria_hidden="true"),
            f" {_SPREAD[kind]}",
        ),
        class_="legend",
        aria_label="Lines",
    )
    return tag("div", slider, fields, sentence, stage, chooser(anchor, names), legend, class_="controls")


def _line(dash: str, series: str) -> Html:
    return tag(
        "svg",
        tag("line", x1=1, y1=6, x2=27, y2=6, class_=dash),
        class_=f"swatch {series}",
        viewBox="0 0 28 12",
        width=28,
        height=12,
        aria_hidden="true",
    )


def _sentence(cut: Cut, kind: Kind) -> str:
    total = cut.total
    share = percent(total.estimate / cut.size if cut.size else 0.0)
    sure = "exact" if total.error == 0 else f"at least {count(total.low)}, at most {count(total.high)}"
    many = plural(len(cut.layers), "layer")
    return (
        f"{_SYMBOL[kind]} = {number(cut.tau)} removes {count(total.estimate)} of {count(cut.size)} {kind} in {many}: "
        f"{share} ({sure})."
    )


def _layer_table(cut: Cut, names: Sequence[str], kind: Kind, anchor: str) -> Html:
    rows = []
    for name, short in zip(names, shorten(names), strict=True):
        found, size = cut.layers.get(name), cut.sizes.get(name, 0)
        low, estimate, high = found or (0, 0, 0)
        share = estimate / size if size else 0.0
        full = tag("span", style=f"transform:scaleX({share:.4f})")
        bar = tag("span", full, class_="bar live", aria_hidden="true")
        rows.append(
            tag(
                "tr",
                tag("th", named(short), scope="row", class_="name", title=shown(name)),
                tag("td", tag("span", percent(share)), bar, class_="number"),
                tag("td", count(estimate), class_="number", data_value=estimate),
                tag(
                    "td",
                    "exact" if low == high else f"± {count(max(high - estimate, estimate - low))}",
                    class_="number",
                ),
                tag("td", count(size), class_="number", data_value=size),
            )
        )
    columns = ["Layer", "Removed", kind.capitalize(), "Error", "Of"]
    built = table(columns, rows, label=f"Removed {kind} of each layer", numeric=range(1, 5))
    return tag("div", built, id=f"{anchor}-layers", class_="live-table")
