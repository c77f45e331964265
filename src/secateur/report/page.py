"""One HTML file that shows a run: opens offline, asks the network for nothing, lets no data become code."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .. import __version__
from ..errors import UsageError
from .elements import Section
from .heat import HeatMap, heat_section
from .markup import Html, tag
from .measurements import compare, measurement_section
from .numbers import count, percent
from .pictures import Picture, picture_section
from .sensitivity import Sensitivity, sensitivity_section
from .sparsity import LayerRow, sparsity_section
from .tables import Table, notes_section, table_section
from .threshold import threshold_section
from .tradeoff import Tradeoff, tradeoff_section
from .weights import Stage, histogram_section

__all__ = ["Highlight", "document", "page"]

_SCRIPTS = (
    "common.js",
    "counts.js",
    "bars.js",
    "lines.js",
    "histogram.js",
    "threshold.js",
    "heat.js",
    "curves.js",
    "picture.js",
    "start.js",
)


@dataclass(frozen=True)
class Highlight:
    """A number at the head of the page: what it is, how much, and what to compare it with."""

    label: str
    value: str
    detail: str = ""


def page(
    title: str,
    *,
    summary: str,
    measurements: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    layers: Sequence[LayerRow] = (),
    stages: Sequence[Stage] = (),
    tradeoffs: Sequence[Tradeoff] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    sections: Sequence[Section] = (),
    highlights: Sequence[Highlight] | None = None,
    tau: float | None = None,
    tau_stage: str | None = None,
    pictures: Mapping[str, Picture] | None = None,
    sensitivity: Sensitivity | None = None,
    heat_maps: Sequence[HeatMap] = (),
    activations: Sequence[Stage] = (),
    lambda_: float | None = None,
    unfinished: str = "",
) -> str:
    """The report of a run, as the text of one self-contained HTML file.

    Args:
        title: names the run, for instance the model; the page's heading.
        summary: one sentence: what was done to which model.
        measurements: variant (`before`, `after`) -> its measurements as plain mappings; the first is the
            reference.
        layers: the prunable layers with their zeros.
        stages: the weights' histograms at several moments, in order of time.
        tradeoffs: charts of quality against sparsity.
        tables: tables of the caller's own.
        notes: sentences for the end of the page.
        sections: parts of the caller's own, after all others but the notes.
        tau: where the slider over thresholds stands at first; by default where half of the first stage would go.
        tau_stage: name of the stage that the slider counts in at first; by default the first one.
        pictures: layer -> its mask, as `secateur.report.picture` makes it.
        sensitivity: what the sparsity of each layer alone costs.
        heat_maps: for instance the importance of each head of each layer.
        activations: histograms of the neurons' mean absolute activations, layer by layer, at one stage or more.
        lambda_: where the slider over activations stands at first.
        unfinished: for the report of a run that has not ended: how far it got, said at the head of the page.
        highlights: numbers at the head; by default the total sparsity and the first three changes.

    Returns:
        HTML; `secateur.report.write` puts it on the disk.

    Raises:
        UsageError: two sections have one anchor, a measurement lacks a field, or plotly is not installed.

    Cost: 5 MB of text, nearly all of it plotly's script; own data about 2 kB for each layer and stage.
    """
    parts: list[Section] = []
    if measurements:
        parts.append(measurement_section(measurements))
    for at, tradeoff in enumerate(tradeoffs):
        parts.append(tradeoff_section(tradeoff, anchor="tradeoff" + (f"-{at + 1}" if at else "")))
    if layers:
        parts.append(sparsity_section(layers))
    if stages:
        parts.append(histogram_section(stages))
        parts.append(threshold_section(stages, start=tau, stage=tau_stage, shared="weights"))
    if pictures:
        parts.append(picture_section(pictures))
    if sensitivity is not None:
        parts.append(sensitivity_section(sensitivity))
    for at, heat_map in enumerate(heat_maps):
        parts.append(heat_section(heat_map, anchor="heat" + (f"-{at + 1}" if at else "")))
    if activations:
        parts.append(threshold_section(activations, kind="neurons", start=lambda_))
    for at, content in enumerate(tables):
        parts.append(table_section(content, anchor=f"table-{at + 1}"))
    parts.extend(sections)
    if notes:
        parts.append(notes_section(notes))
    if highlights is None:
        highlights = _highlights(measurements or {}, layers)
    return document(title, summary=summary, sections=parts, highlights=highlights, unfinished=unfinished)


def document(
    title: str,
    *,
    summary: str,
    sections: Sequence[Section],
    highlights: Sequence[Highlight] = (),
    unfinished: str = "",
) -> str:
    """A page of any sections; `page` calls it with the usual ones.

    Raises:
        UsageError: two sections have one anchor, or plotly is not installed.
    """
    anchors = [section.anchor for section in sections]
    for anchor in anchors:
        if anchors.count(anchor) > 1:
            raise UsageError(f"{anchors.count(anchor)} sections have the anchor {anchor!r}. Give each its own.")
    scripts = (
        [_plotly(), "".join(map(_asset, _SCRIPTS))]
        if any("<figure" in section.body for section in sections)
        else []
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="generator", content=f"secateur {__version__}"),
        tag("title", f"{title} · secateur"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(_asset("page.css"))),
    )
    contents = (tag("li", tag("a", section.heading, href=f"#{section.anchor}")) for section in sections)
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        _header(title, summary, highlights, unfinished),
        tag(
            "div",
            tag("nav", tag("ul", *contents), aria_label="Contents") if len(sections) > 1 else None,
            tag("main", *(_framed(section) for section in sections), id="content", tabindex=-1),
            class_="columns",
        ),
        tag("footer", tag("p", f"Made by secateur {__version__}. This page works offline and sends nothing.")),
        *(tag("script", Html(script)) for script in scripts),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(title: str, summary: str, highlights: Sequence[Highlight], unfinished: str) -> Html:
    tiles = (
        tag(
            "div",
            tag("dt", tile.label),
            tag("dd", tile.value, class_="value"),
            tag("dd", tile.detail) if tile.detail else None,
        )
        for tile in highlights
    )
    return tag(
        "header",
        tag("p", "secateur", class_="brand"),
        tag("h1", title),
        tag("p", summary, class_="summary"),
        tag("p", tag("b", "Not finished. "), unfinished, class_="unfinished", role="status")
        if unfinished
        else None,
        tag("dl", *tiles, class_="tiles") if highlights else None,
    )


def _framed(section: Section) -> Html:
    heading = tag("h2", section.heading, id=f"{section.anchor}-heading")
    return tag("section", heading, section.body, id=section.anchor, aria_labelledby=f"{section.anchor}-heading")


def _highlights(
    measurements: Mapping[str, Sequence[Mapping[str, Any]]], layers: Sequence[LayerRow]
) -> list[Highlight]:
    """The total sparsity, and what got better or worse between two variants, in the order measured."""
    tiles = []
    weights = sum(layer.weights for layer in layers)
    if weights:
        zeros = sum(layer.zeros for layer in layers)
        tiles.append(Highlight("Sparsity", percent(zeros / weights), f"of {count(weights)} prunable weights"))
    variants = list(measurements)
    rows = [row for row in compare(measurements) if row.cells[-1] is not None] if len(variants) == 2 else []
    ordered = sorted(rows, key=lambda row: row.change(1)[1] not in ("better", "worse"))
    for row in ordered[:3]:
        told = ", ".join(str(value) for key, value in row.telling.items() if key in ("dataset", "task"))
        text, _ = row.change(1)
        before = f"{variants[0]} {row.text(0)}" if row.cells[0] is not None else ""
        label = f"{row.title}, {told}" if told else row.title
        detail = ", ".join(part for part in (before, text) if part)
        detail = detail.replace(" %", "\u00a0%").replace("≈ ", "≈\u00a0")
        tiles.append(Highlight(label, row.text(1), detail))
    return tiles


def _policy(scripts: Sequence[str]) -> str:
    """No network, no form, no frame, and no script but these, told by their digests."""
    digests = (
        "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") + "'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {' '.join(digests) or chr(39) + 'none' + chr(39)}; "
        f"style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The script of the plotly package that is installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError(
            "the report's charts need plotly, which is not installed. Run: pip install 'secateur[report]'"
        ) from error
    script = str(get_plotlyjs()).replace("\r\n", "\n")
    if "</script" in script.lower() or "<!--" in script:
        raise UsageError(
            "the installed plotly's script cannot stand inside a page. "
            "Run: pip install --upgrade 'secateur[report]'"
        )
    return script
