"""Tables and notes of the caller's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .elements import Section, table
from .markup import join, named, tag
from .numbers import number

__all__ = ["Cell", "Table", "notes_section", "table_section"]

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        title: shown above.
        columns: names of the columns.
        rows: as many cells as there are columns; numbers are set right, None is an empty cell.
        caption: a sentence on what the table says.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for at, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise UsageError(
                    f"table {self.title!r}, row {at}: {len(row)} cells under {len(self.columns)} columns. "
                    f"Give every row one cell for each column, None where there is nothing."
                )


def table_section(content: Table, *, anchor: str = "table") -> Section:
    """A table of the caller's own."""
    numeric = [at for at in range(len(content.columns)) if _is_numeric([row[at] for row in content.rows])]
    rows = []
    for row in content.rows:
        first, *rest = (_cell(value) for value in row)
        cells = (
            tag("td", text, class_="number" if at in numeric else None, data_value=value)
            for at, (text, value) in enumerate(rest, 1)
        )
        rows.append(tag("tr", tag("th", named(first[0]), scope="row", class_="name"), *cells))
    caption = tag("p", content.caption, class_="lead") if content.caption else None
    built = table(list(content.columns), rows, label=content.title, numeric=numeric)
    return Section(anchor, content.title, join(caption, built))


def _is_numeric(cells: Sequence[Cell]) -> bool:
    held = [cell for cell in cells if cell is not None]
    return bool(held) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in held)


def _cell(value: Cell) -> tuple[str, str | None]:
    if value is None:
        return "", None
    if isinstance(value, bool | str):
        return str(value), None
    return number(value), repr(value)


def notes_section(notes: Sequence[str], *, heading: str = "Notes", anchor: str = "notes") -> Section:
    """Sentences, one to a bullet."""
    return Section(anchor, heading, tag("ul", *(tag("li", note) for note in notes), class_="notes"))
