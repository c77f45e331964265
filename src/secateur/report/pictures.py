"""Masks as pictures: where in a matrix the pruned weights lie."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .elements import Section, chooser, details, figure, shorten, table
from .markup import Html, join, named, shown, tag
from .numbers import count, percent

__all__ = ["Picture", "picture", "picture_section"]

SIDE = 48
"""Cells along a side of a picture at most: 72 matrices of them add 120 kB to a page."""


@dataclass(frozen=True)
class Picture:
    """A mask, seen from so far away that at most `SIDE` x `SIDE` cells remain.

    Attributes:
        rows, columns: of the matrix.
        cells: which part of each cell is kept, in fifteenths rounded, row by row.
        height, width: how many cells.
        kept: weights kept, exactly.
        empty_rows, empty_columns: how many are pruned as a whole, exactly.
        low, high: the least and the greatest sparsity of a row, exactly.
    """

    rows: int
    columns: int
    cells: bytes
    height: int
    width: int
    kept: int
    empty_rows: int
    empty_columns: int
    low: float
    high: float

    @property
    def exact(self) -> bool:
        """Whether every cell is one weight."""
        return (self.height, self.width) == (self.rows, self.columns)


def picture(mask: Tensor) -> Picture:
    """The picture of a mask.

    Args:
        mask: boolean, True = kept; a matrix, or a tensor of which the first dimension becomes the rows.

    Raises:
        UsageError: not boolean, or without a weight.

    Cost: two passes, 4 bytes a weight for a moment.
    """
    if mask.dtype != torch.bool or mask.dim() < 1 or not mask.numel():
        raise UsageError(
            f"a picture is made of a boolean mask with weights, got {mask.dtype} {tuple(mask.shape)}"
        )
    matrix = mask.detach().cpu().reshape(len(mask), -1)
    rows, columns = matrix.shape
    height, width = min(rows, SIDE), min(columns, SIDE)
    kept = matrix.float()
    cells = torch.nn.functional.adaptive_avg_pool2d(kept[None, None], (height, width))[0, 0]
    of_row, of_column = kept.sum(1), kept.sum(0)
    return Picture(
        rows,
        columns,
        bytes((15 * cells).round().to(torch.uint8).flatten().tolist()),
        height,
        width,
        int(torch.count_nonzero(matrix)),
        int((of_row == 0).sum()),
        int((of_column == 0).sum()),
        1 - float(of_row.max()) / columns,
        1 - float(of_row.min()) / columns,
    )


def picture_section(
    pictures: Mapping[str, Picture], *, heading: str = "Where the zeros lie", anchor: str = "masks"
) -> Section:
    """One layer's mask at a time as a picture, and a table of what shape all masks have.

    Raises:
        UsageError: no pictures.
    """
    if not pictures:
        raise UsageError("there are no masks to show. Pass at least one picture.")
    names = list(pictures)
    data = {
        "names": [shown(name) for name in names],
        "short": shorten(names),
        "pictures": [_stored(each) for each in pictures.values()],
    }
    lead = (
        "Outputs from top to bottom, inputs from left to right. In a large matrix a cell stands for many weights, and "
        "its shade for the part of them that is kept."
    )
    body = join(
        tag("p", lead, class_="lead"),
        figure(
            anchor,
            "picture",
            data,
            label="Picture of one layer's mask",
            before=tag("div", chooser(anchor, names), _key(), class_="controls"),
        ),
        tag("p", class_="aside", id=f"{anchor}-said", aria_live="polite"),
        details("Shapes of all masks as a table", _shapes(pictures)),
    )
    return Section(anchor, heading, body)


def _key() -> Html:
    shades = (
        tag("li", tag("span", class_=f"swatch {what}", aria_hidden="true"), f" {what}")
        for what in ("kept", "pruned")
    )
    return tag("ul", *shades, class_="legend", aria_label="Shades")


def _stored(held: Picture) -> dict[str, object]:
    """Two cells to a byte."""
    cells = held.cells + b"\0" * (len(held.cells) % 2)
    packed = bytes(high << 4 | low for high, low in zip(cells[::2], cells[1::2], strict=True))
    return {
        "rows": held.rows,
        "columns": held.columns,
        "height": held.height,
        "width": held.width,
        "kept": held.kept,
        "cells": base64.b64encode(packed).decode("ascii"),
    }


def _shapes(pictures: Mapping[str, Picture]) -> Html:
    rows = []
    for name, held in pictures.items():
        size = held.rows * held.columns
        rows.append(
            tag(
                "tr",
                tag("th", named(name), scope="row", class_="name"),
                tag("td", f"{count(held.rows)} × {count(held.columns)}", class_="number"),
                tag(
                    "td", percent(1 - held.kept / size), class_="number", data_value=repr(1 - held.kept / size)
                ),
                tag("td", count(held.empty_rows), class_="number", data_value=held.empty_rows),
                tag("td", count(held.empty_columns), class_="number", data_value=held.empty_columns),
                tag("td", f"{percent(held.low)} to {percent(held.high)}", class_="number"),
            )
        )
    columns = [
        "Layer",
        "Outputs × inputs",
        "Sparsity",
        "Outputs pruned",
        "Inputs pruned",
        "Sparsity of an output",
    ]
    return table(columns, rows, label="Shapes of all masks", numeric=range(1, 6))
