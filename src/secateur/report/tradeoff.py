"""What quality costs: one line for each method, across sparsities or sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .elements import Section, details, figure, legend, table
from .markup import Html, join, named, shown, tag
from .numbers import number, percent

__all__ = ["Better", "Point", "Tradeoff", "tradeoff_section"]

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Point:
    """One variant: where it stands, and between which values its repeats lie, where there were any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Tradeoff:
    """Lines over one pair of axes.

    Attributes:
        title: of the section.
        x_label: what the horizontal axis is.
        y_label: what the vertical axis is, with its unit.
        lines: method -> its points.
        reference: value of the dense model, drawn as a dashed line; None where there is none.
        reference_name: what that line is called.
        x_percent: x is a fraction; show percent.
        log_y: start with a logarithmic vertical axis.
        caption: a sentence on what the chart says.
        better: which way is better along x and along y; given, the points that no other point beats in both, the
            Pareto front over all lines, are marked and joined.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    reference: float | None = None
    reference_name: str = "dense"
    x_percent: bool = True
    log_y: bool = False
    caption: str = ""
    better: tuple[Better, Better] | None = None

    def front(self) -> list[Point]:
        """The points that no other point equals or beats in both directions, along x; empty without `better`."""
        if self.better is None:
            return []
        signs = [1 if way == "higher" else -1 for way in self.better]
        points = [point for points in self.lines.values() for point in points]
        worth = sorted(points, key=lambda point: (-signs[0] * point.x, -signs[1] * point.y))
        found: list[Point] = []
        for point in worth:
            if not found or signs[1] * point.y > signs[1] * found[-1].y:
                found.append(point)
        return sorted(found, key=lambda point: point.x)


def tradeoff_section(content: Tradeoff, *, anchor: str = "tradeoff") -> Section:
    """The chart of the lines, a switch for the logarithmic axis, and the table of all points."""
    data = {
        "x_label": shown(content.x_label),
        "y_label": shown(content.y_label),
        "x_percent": content.x_percent,
        "log": content.log_y,
        "front": [[point.x, point.y] for point in content.front()],
        "reference": content.reference,
        "reference_name": shown(content.reference_name),
        "lines": [
            {
                "name": shown(name),
                "points": [
                    [point.x, point.y, point.low, point.high, shown(point.name)]
                    for point in sorted(points, key=lambda point: point.x)
                ],
            }
            for name, points in content.lines.items()
        ],
    }
    controls = tag(
        "div",
        legend(list(content.lines), label="Lines", more=_front_key() if content.better else None),
        tag(
            "label",
            tag("input", type="checkbox", data_option="log", checked=content.log_y),
            " Logarithmic axis",
        ),
        class_="controls",
    )
    label = (
        f"Lines: {content.y_label} against {content.x_label}, one line for each of {len(content.lines)} methods"
    )
    body = join(
        tag("p", content.caption, class_="lead") if content.caption else None,
        figure(anchor, "lines", data, label=label, before=controls),
        details("Points as a table", _points(content)),
    )
    return Section(anchor, content.title, body)


def _front_key() -> Html:
    return tag(
        "li", tag("span", class_="swatch front", aria_hidden="true"), " Pareto front: nothing is better in both"
    )


def _points(content: Tradeoff) -> Html:
    front = {id(point) for point in content.front()}
    spread = any(point.low is not None for points in content.lines.values() for point in points)
    rows = []
    for name, points in content.lines.items():
        for point in sorted(points, key=lambda point: point.x):
            x = percent(point.x) if content.x_percent else number(point.x)
            around = (
                ""
                if point.low is None or point.high is None
                else f"{number(point.low)} to {number(point.high)}"
            )
            rows.append(
                tag(
                    "tr",
                    tag("th", named(name), scope="row"),
                    tag("td", x, class_="number", data_value=repr(point.x)),
                    tag("td", number(point.y), class_="number", data_value=repr(point.y)),
                    tag("td", around) if spread else None,
                    tag("td", "on the front" if id(point) in front else "") if content.better else None,
                )
            )
    columns = ["Line", content.x_label, content.y_label] + ["Spread"] * spread
    columns += ["Pareto"] * (content.better is not None)
    return table(columns, rows, label=content.title, numeric=[1, 2])
