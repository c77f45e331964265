"""The page's charts as matplotlib figures, for notebooks, papers and boards; the same data, told apart the same way.

No global state of matplotlib is touched: every function makes a `matplotlib.figure.Figure` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError, nearest
from .elements import shorten
from .heat import HeatMap
from .histogram import Histogram
from .markup import shown
from .numbers import number, percent
from .pictures import Picture
from .sensitivity import Sensitivity
from .sparsity import LayerRow
from .threshold import Kind, thresholds
from .tradeoff import Tradeoff
from .weights import Stage

__all__ = ["heat_map", "histograms", "mask", "sensitivity", "sparsity", "threshold_curve", "tradeoff"]

_COLORS = ("#6b7a86", "#1b7f5c", "#d1530f", "#2f66b5", "#a8458a", "#8f6a00")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
_MARKERS = "osD^P"
_HATCHES = ("", "///", "...", "|||", "\\\\\\", "---")


def histograms(stages: Sequence[Stage], layers: Sequence[str] | None = None, *, bins: int = 96) -> Any:
    """Weights of each layer, its stages laid over each other, with the share of exact zeros as a spike at 0.

    Args:
        stages: in order of time; the first is filled.
        layers: which layers, one below the other; all by default.
        bins: of equal width in each plot, at most; counts are exact, as in the page.

    Raises:
        UsageError: a layer that no stage has, or matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for stage in stages for name in stage.histograms))
    chosen = names if layers is None else list(layers)
    for name in chosen:
        if name not in names:
            raise UsageError(f"no stage has a layer {name!r}; {nearest(name, names)}")
    figure, axes = _figure(len(chosen), height=2.7)
    for axis, name in zip(axes, chosen, strict=True):
        held = [
            (at, stage, stage.histograms[name]) for at, stage in enumerate(stages) if name in stage.histograms
        ]
        most = max(one.n for _, _, one in held)
        width, half = _equal([one for _, _, one in held], min(bins, max(24, round(4 * most ** (1 / 3)))))
        edges = width * np.arange(-half, half + 1)
        spikes, told = axis.twinx(), []
        spikes.set_ylim(0, 1.04)
        spikes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        for at, stage, one in held:
            label = _text(stage.name)
            style: dict[str, Any] = (
                {"fill": True, "alpha": 0.35} if at == 0 else {"linestyle": _dash(at), "lw": 1.6}
            )
            axis.stairs(_counts(one, width, half), edges, color=_color(at), label=label, **style)
            if one.zeros:
                x = (at - len(held) / 2) * 0.01 * half * width
                spikes.plot([x, x], [0, one.zeros / one.n], color=_color(at), lw=2)
                spikes.plot([x], [one.zeros / one.n], color=_color(at), marker=_marker(at), ms=6, mec="white")
                told.append(f"{percent(one.zeros / one.n)} zero ({_text(stage.name)})")
        axis.set_title(_text(name), fontsize=9, loc="left")
        axis.set_title("\n".join(told), fontsize=6.5, loc="right")
        axis.set_ylabel("weights")
    axes[-1].set_xlabel("weight")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return figure


def sparsity(layers: Sequence[LayerRow]) -> Any:
    """Bars of each layer's sparsity, its role by colour and hatching; a diamond at what it lost, where measured."""
    figure, (axis,) = _figure(1, height=1.2 + 0.22 * len(layers))
    roles = list(dict.fromkeys(layer.role for layer in layers))
    for group, role in enumerate(roles):
        own = [at for at, layer in enumerate(layers) if layer.role == role]
        values = [layers[at].sparsity for at in own]
        color, hatch = _color(group + 1), _HATCHES[group % 6]
        bars = {"facecolor": "none", "hatch": hatch} if hatch else {"facecolor": color}
        axis.barh(own, values, height=0.65, edgecolor=color, label=_text(role or "other"), **bars)
    lost = [(layer.lost, at) for at, layer in enumerate(layers) if layer.lost is not None]
    if lost:
        axis.plot(
            [x for x, _ in lost], [y for _, y in lost], "D", color="black", mec="white", ms=6, label="lost"
        )
    axis.set_yticks(
        range(len(layers)), [_text(name) for name in shorten([layer.name for layer in layers])], fontsize=7
    )
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.set_xlabel("sparsity")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def threshold_curve(
    held: Mapping[str, Histogram], tau: float | None = None, *, kind: Kind = "weights", layer: str | None = None
) -> Any:
    """What part of all layers, and of one, a threshold removes."""
    figure, (axis,) = _figure(1, height=3.2)
    stops = np.array(thresholds(list(held.values()))[1:])
    size = sum(one.n for one in held.values()) or 1
    total = [sum(one.count_up_to(stop).estimate for one in held.values()) / size for stop in stops.tolist()]
    axis.plot(stops, total, color=_color(1), label="all layers")
    if layer is not None:
        if layer not in held:
            raise UsageError(f"no layer {layer!r}; {nearest(layer, held)}")
        own = [held[layer].count_up_to(stop).estimate / (held[layer].n or 1) for stop in stops.tolist()]
        axis.plot(stops, own, color=_color(2), linestyle=_dash(2), label=_text(layer))
    symbol = "τ" if kind == "weights" else "λ"
    if tau is not None:
        axis.axvline(tau, color="black", lw=1.2, label=f"{symbol} = {number(tau)}")
    if len(stops):
        axis.set_xscale("log")
    axis.set_xlabel(f"threshold {symbol}")
    axis.set_ylabel(f"removed {kind}")
    axis.set_ylim(0, 1.03)
    axis.legend(fontsize=8, frameon=False)
    return figure


def tradeoff(content: Tradeoff) -> Any:
    """Lines over one pair of axes with their spreads, the dense model's value, and the Pareto front where asked for."""
    figure, (axis,) = _figure(1, height=3.6)
    front = content.front()
    if front:
        axis.plot(
            [p.x for p in front], [p.y for p in front], color="black", alpha=0.15, lw=9, label="Pareto front"
        )
    for at, (name, given) in enumerate(content.lines.items(), 1):
        points = sorted(given, key=lambda point: point.x)
        x, y = [point.x for point in points], [point.y for point in points]
        axis.plot(
            x, y, color=_color(at), linestyle=_dash(at), marker=_marker(at), mec="white", label=_text(name)
        )
        spread = [point for point in points if point.low is not None and point.high is not None]
        axis.vlines(
            [p.x for p in spread], [p.low for p in spread], [p.high for p in spread], color=_color(at), lw=1
        )
    if content.reference is not None:
        label = f"{_text(content.reference_name)} {number(content.reference)}"
        axis.axhline(content.reference, color="#55605a", linestyle=(0, (4, 3)), lw=1.2, label=label)
    if content.log_y:
        axis.set_yscale("log")
    axis.set_title(_text(content.title), fontsize=10, loc="left")
    axis.set_xlabel(_text(content.x_label))
    axis.set_ylabel(_text(content.y_label))
    axis.legend(fontsize=8, frameon=False)
    return figure


def heat_map(content: HeatMap) -> Any:
    """One hue, pale to dark, with the numbers in the cells of a small map, and crosses at what is marked."""
    figure, (axis,) = _figure(1, height=1.4 + 0.3 * len(content.rows))
    values = np.array([[np.nan if v is None else v for v in row] for row in content.values], dtype=float)
    drawn = axis.imshow(values, cmap="Greens", aspect="auto")
    figure.colorbar(drawn, ax=axis, label=_text(content.quantity))
    for row, column in np.ndindex(*values.shape):
        crossed = (row, column) in content.marked
        told = (
            "" if np.isnan(values[row, column]) or len(content.columns) > 16 else f"{values[row, column]:.2g}"
        )
        if crossed or told:
            low, high = np.nanmin(values), np.nanmax(values)
            dark = values[row, column] > low + 0.6 * (high - low)
            text = f"× {told}".strip() if crossed else told
            axis.text(
                column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    axis.set_xticks(range(len(content.columns)), [_text(name) for name in content.columns], fontsize=7)
    axis.set_yticks(range(len(content.rows)), [_text(name) for name in shorten(content.rows)], fontsize=7)
    axis.set_xlabel(_text(content.column_label))
    axis.set_title(_text(content.title), fontsize=10, loc="left")
    return figure


def sensitivity(content: Sensitivity, layer: str | None = None) -> Any:
    """A curve for each layer, faint, and one picked out: the given one, or the most sensitive."""
    names = content.ranked()
    if layer is not None and layer not in names:
        raise UsageError(f"no layer {layer!r}; {nearest(layer, names)}")
    figure, (axis,) = _figure(1, height=3.4)
    chosen = layer if layer is not None else (names[0] if names else None)
    for name in names:
        values = [np.nan if value is None else value for value in content.layers[name]]
        if name != chosen:
            axis.plot(content.sparsities, values, color=_color(0), lw=0.8, alpha=0.5)
    if chosen is not None:
        values = [np.nan if value is None else value for value in content.layers[chosen]]
        axis.plot(content.sparsities, values, color=_color(1), lw=2.4, marker="o", label=_text(chosen))
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel("sparsity of one layer alone")
    axis.set_ylabel(_text(content.quantity))
    return figure


def mask(held: Picture, name: str = "") -> Any:
    """A mask as a picture: black is kept, white is pruned."""
    figure, (axis,) = _figure(1, height=4.0)
    cells = np.frombuffer(held.cells, dtype=np.uint8).reshape(held.height, held.width) / 15
    axis.imshow(cells, cmap="Greys", vmin=0, vmax=1, aspect="auto", extent=(0, held.columns, held.rows, 0))
    axis.set_title(_text(name), fontsize=9, loc="left")
    axis.set_xlabel("input")
    axis.set_ylabel("output")
    return figure


def _figure(many: int, *, height: float) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "figures need matplotlib, which is not installed. Run: pip install 'secateur[figures]'"
        ) from error
    if not many:
        raise UsageError("there is nothing to draw: no layer was given")
    figure = Figure(figsize=(7.2, max(2.0, height * many)), layout="constrained")
    axes = figure.subplots(many, 1, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _equal(held: Sequence[Histogram], most: int) -> tuple[float, int]:
    """Bins of equal power-of-two width that no stored bin straddles: their width, and how many on each side."""
    limit = max((one.limit for one in held), default=0.0) or 1.0
    width = 2.0 ** np.ceil(np.log2(2 * limit / most))
    for one in held:
        if one.limit:
            width = max(
                width, 2.0 ** max(one.exponent, int(np.frexp(one.limit * (1 - 1e-12))[1]) - 1) / one.bins
            )
    return float(width), int(np.ceil(limit / width))


def _counts(held: Histogram, width: float, half: int) -> Any:
    counts = np.zeros(2 * half, dtype=np.int64)
    for sign, side in ((-1, held.negative), (1, held.positive)):
        for index, many in enumerate(side):
            at = int(held.grid.edge(index) / width)
            counts[half + at if sign > 0 else half - 1 - at] += many
    return counts


def _color(at: int) -> str:
    return _COLORS[at % 6]


def _dash(at: int) -> Any:
    return _DASHES[max(0, at - 1) % 5]


def _marker(at: int) -> str:
    return _MARKERS[max(0, at - 1) % 5]


def _text(text: object) -> str:
    """A name as matplotlib shows it literally: no mathematics between dollar signs."""
    return shown(text).replace("$", r"\$")
