"""A number for each row and column, darker where it is greater: heads of layers, layers at sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .elements import Section, details, figure, shorten, table
from .markup import Html, join, named, shown, tag
from .numbers import number

__all__ = ["HeatMap", "heat_section"]


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers with names at its sides.

    Attributes:
        title: of the section.
        rows: names from top to bottom, for instance layers.
        columns: names from left to right, for instance heads.
        values: one row of numbers for each of `rows`; None where there is nothing.
        quantity: what the numbers are, with their unit.
        row_label: what a row is.
        column_label: what a column is.
        marked: places (row, column) that carry a cross, for instance removed heads.
        mark: what the cross says.
        caption: a sentence on what the chart says.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    quantity: str
    row_label: str = "layer"
    column_label: str = "head"
    marked: frozenset[tuple[int, int]] = frozenset()
    mark: str = "removed"
    caption: str = ""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows):
            raise UsageError(
                f"heat map {self.title!r}: {len(self.values)} rows of numbers for {len(self.rows)} names"
            )
        for name, row in zip(self.rows, self.values, strict=True):
            if len(row) != len(self.columns):
                raise UsageError(
                    f"heat map {self.title!r}, row {name!r}: {len(row)} numbers under {len(self.columns)} columns"
                )
        for place in self.marked:
            if not (0 <= place[0] < len(self.rows) and 0 <= place[1] < len(self.columns)):
                raise UsageError(f"heat map {self.title!r}: the mark at {place} lies outside")


def heat_section(content: HeatMap, *, anchor: str = "heat") -> Section:
    """The heat map, with its numbers in the cells where they fit, and the table of them."""
    data = {
        "rows": [shown(name) for name in content.rows],
        "short": shorten(content.rows),
        "columns": [shown(name) for name in content.columns],
        "values": [[None if v is None else float(f"{v:.5g}") for v in row] for row in content.values],
        "quantity": shown(content.quantity),
        "row_label": shown(content.row_label),
        "column_label": shown(content.column_label),
        "marked": sorted([row, column] for row, column in content.marked),
        "mark": shown(content.mark),
    }
    known = [v for row in content.values for v in row if v is not None]
    crossed = f" A cross marks what was {content.mark}." if content.marked else ""
    scale: list[object] = ["no numbers."]
    if known:
        bar = tag("span", class_="scale", aria_hidden="true")
        scale = [number(min(known)), bar, f"{number(max(known))}.{crossed}"]
    named_scale = join(f"{content.quantity[:1].upper()}{content.quantity[1:]}:", *scale, between=" ")
    label = f"Heat map: {content.quantity} of each {content.row_label} and {content.column_label}"
    body = join(
        tag("p", content.caption, class_="lead") if content.caption else None,
        tag("p", named_scale, class_="aside above"),
        figure(anchor, "heat", data, label=label, tall=len(content.rows) > 24),
        details("Numbers as a table", _numbers(content)),
    )
    return Section(anchor, content.title, body)


def _numbers(content: HeatMap) -> Html:
    rows = []
    for at, (name, values) in enumerate(zip(content.rows, content.values, strict=True)):
        cells = (
            tag(
                "td",
                "" if value is None else number(value),
                tag("span", f" {content.mark}", class_="mark") if (at, column) in content.marked else None,
                class_="number",
                data_value=None if value is None else repr(value),
            )
            for column, value in enumerate(values)
        )
        rows.append(tag("tr", tag("th", named(name), scope="row", class_="name"), *cells))
    columns = [content.row_label.capitalize(), *(named(name) for name in content.columns)]
    return table(columns, rows, label=content.title, numeric=range(1, len(columns)))
