"""What the sections are built from: a chart with its data, a table that scrolls in its box, a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .markup import Html, data_block, join, named, shown, tag
from .numbers import count

__all__ = ["Section", "chooser", "details", "figure", "legend", "plural", "shorten", "swatch", "table"]

_MARKERS = (
    "M14 2.2a3.8 3.8 0 1 0 .01 0z",
    "M10.4 2.4h7.2v7.2h-7.2z",
    "M14 1l5 5-5 5-5-5z",
    "M14 1.6l4.6 8h-9.2z",
    "M12.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
)
"""Circle, square, diamond, triangle, cross: the markers that the charts use, in their order."""


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, where a link finds it, and its content.

    Attributes:
        anchor: the part's name in links and in the page's state; letters, digits and hyphens.
        heading: shown above the part and in the list of contents.
        body: content as markup, built with `secateur.report.markup`.
    """

    anchor: str
    heading: str
    body: Html

    def __post_init__(self) -> None:
        if not (self.anchor.isascii() and self.anchor.replace("-", "a").isalnum()):
            raise UsageError(
                f"anchor {self.anchor!r} of section {self.heading!r} has more than a-z, 0-9 and hyphens."
            )


def figure(
    anchor: str, kind: str, data: object, *, label: str, before: Html | None = None, tall: bool = False
) -> Html:
    """Room for a chart that the page's script draws from `data`."""
    room = tag("div", class_="chart", role="img", aria_label=shown(label))
    if tall:
        room = tag("div", room, class_="tall", tabindex=0, role="group", aria_label=f"{shown(label)}; scrolls")
    return join(
        tag("figure", before, room, data_chart=kind, data_anchor=anchor), data_block(f"{anchor}-data", data)
    )


def chooser(anchor: str, names: Sequence[str], *, label: str = "Layer") -> Html:
    """A list of layers to choose one from, with buttons to its neighbours."""
    chosen = (tag("option", shown(name), value=at) for at, name in enumerate(names))
    return tag(
        "div",
        tag("label", label, for_=f"{anchor}-layer"),
        tag("button", "‹", type="button", data_step=-1, aria_label=f"Previous {label.lower()}"),
        tag("select", *chosen, id=f"{anchor}-layer", data_layers=True),
        tag("button", "›", type="button", data_step=1, aria_label=f"Next {label.lower()}"),
        class_="choice",
    )


def table(
    columns: Sequence[object], rows: Sequence[Html], *, label: str, numeric: Sequence[int] | range = ()
) -> Html:
    """A table in a box that scrolls by itself, so that the page never does sideways."""
    heads = (
        tag("th", column, scope="col", class_="number" if at in numeric else None)
        for at, column in enumerate(columns)
    )
    built = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    return tag("div", built, class_="scroll", tabindex=0, role="region", aria_label=f"{shown(label)}, table")


def details(summary: str, *content: Html) -> Html:
    """Content that opens on demand."""
    return tag("details", tag("summary", summary), *content)


def legend(names: Sequence[str], kind: str = "line", *, label: str, more: Html | None = None) -> Html:
    """The colours, dashes and patterns of a chart with their names; series 0, the grey one, is left out."""
    items = (tag("li", swatch(at, kind), " ", named(one)) for at, one in enumerate(names, 1))
    return tag("ul", *items, more, class_="legend", aria_label=shown(label))


def swatch(at: int, kind: str = "line") -> Html:
    """A sample of how series `at` is drawn, next to its name: an area for series 0, then lines or bars."""
    look = f"swatch s{at % 6}"
    if at == 0:
        return tag("span", class_=f"{look} area", aria_hidden="true")
    if kind == "bar":
        return tag("span", class_=f"{look} pattern{(at - 1) % 6}", aria_hidden="true")
    return tag(
        "svg",
        tag("line", x1=1, y1=6, x2=27, y2=6, class_=f"dash{(at - 1) % 5}"),
        tag("path", d=_MARKERS[(at - 1) % 5]),
        class_=look,
        viewBox="0 0 28 12",
        width=28,
        height=12,
        aria_hidden="true",
    )


def shorten(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all of them start and end with, for the axis of a chart.

    Example:
        >>> shorten(["model.layers.0.up.weight", "model.layers.1.up.weight"])
        ['0.up', '1.up']
    """
    parts = [one.split(".") for one in names]
    least = min((len(part) for part in parts), default=0)
    start = end = 0
    if len(names) > 1:
        while start < least - 1 and len({part[start] for part in parts}) == 1:
            start += 1
        while (
            end < least - start - 1
            and parts[0][-1 - end] == "weight"
            and len({p[-1 - end] for p in parts}) == 1
        ):
            end += 1
    return [shown(".".join(part[start : len(part) - end])) for part in parts]


def plural(many: int, noun: str) -> str:
    """A whole number with its noun, which takes an s unless there is one."""
    return f"{count(many)} {noun}" + ("" if many == 1 else "s")
