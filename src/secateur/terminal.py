"""What the command line shows: progress with time left, tables of measurements and layers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from secateur.core.counts import sparsity
from secateur.core.where import layers, select
from secateur.evaluate import Measurement
from secateur.measure import Tell

__all__ = ["progress", "show_layers", "show_measurements"]

PATIENCE = 2.0  # seconds before a task is worth a bar


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Tell]:
    """A function `(label, done, total)`; a task longer than two seconds gets a bar with the time left.

    On something that is no terminal, such a task gets one line when it ends.
    """
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, tuple[TaskID, float]] = {}

    def tell(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total, visible=False), time.perf_counter()
        task, began = tasks[label]
        spent = time.perf_counter() - began
        bars.update(task, completed=done, total=total, visible=spent > PATIENCE and done < total)
        if done >= total:
            del tasks[label]
            if spent > PATIENCE and not console.is_terminal:
                console.print(Text(f"{label}: {spent:.0f} s"))

    with bars:
        yield tell


def show_measurements(measurements: Mapping[str, Sequence[Measurement]]) -> None:
    """One row a quantity, one column a variant; conditions below the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measurement")
    for variant in measurements:
        table.add_column(Text(variant), justify="right")
    names = dict.fromkeys((m.name, m.unit) for found in measurements.values() for m in found)
    for name, unit in names:
        cells = []
        for found in measurements.values():
            held = [m for m in found if m.name == name]
            cells.append(Text(_value(held[0]) if held else ""))
        label = name.replace("_", " ") + ("" if unit == "1" else f" ({unit})")
        table.add_row(Text(label), *cells)
    Console(highlight=False, width=None).print(table)
    told = dict.fromkeys(
        str(m.conditions.get("protocol") or "") for found in measurements.values() for m in found
    )
    datasets = dict.fromkeys(
        str(m.conditions.get("dataset") or "") for found in measurements.values() for m in found
    )
    for text in [*told, *(f"data: {name}" for name in datasets if name)]:
        if text:
            typer.echo(f"  {text}")


def _value(measured: Measurement) -> str:
    value = f"{measured.value:,}" if isinstance(measured.value, int) else f"{measured.value:,.4g}"
    if measured.spread is not None:
        value += f"  [{measured.spread.low:.3g} to {measured.spread.high:.3g}]"
    return value


def show_layers(model: Any, only: Sequence[str], skip: Sequence[str], *, as_json: bool = False) -> None:
    """Every matrix of a model with role, shape, zeros, ties and whether it would be pruned."""
    selection = select(model, list(only) or None, list(skip) or None)
    chosen = {layer.name for layer in selection.chosen}
    reasons = {layer.name: reason for layer, reason in selection.left_out}
    counts = sparsity(model)
    rows: list[dict[str, Any]] = [
        {
            "name": layer.name,
            "role": layer.role,
            "stack": layer.stack or "",
            "shape": list(layer.weight.shape),
            "zeros": counts.layers[layer.name].zeros,
            "pruned": layer.name in chosen,
            "why not": reasons.get(layer.name, ""),
            "tied to": list(layer.tied),
        }
        for layer in layers(model)
    ]
    if as_json:
        typer.echo(json.dumps({"layers": rows, "parameters": counts.model.size}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "role", "shape", "zeros", "chosen"):
        table.add_column(column, justify="right" if column in ("shape", "zeros") else "left", overflow="fold")
    for row in rows:
        shape = " x ".join(str(size) for size in row["shape"])
        table.add_row(
            Text(row["name"]), row["role"], shape, f"{row['zeros']:,}", "yes" if row["pruned"] else "no"
        )
    Console(highlight=False).print(table)
    for name, reason in reasons.items():
        typer.echo(f"left out {name}: {reason}")
    typer.echo(
        f"{counts.prunable.size:,} prunable of {counts.model.size:,} parameters, {counts.model.zeros:,} are zero"
    )
