"""The report of a sweep: means and spreads over seeds, trade-offs with their Pareto front, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from secateur import report
from secateur.recover.training import HIGHER
from secateur.sweep.points import Sweep
from secateur.sweep.table import Group, Line, columns, groups

__all__ = ["write_report"]

QUALITY = {
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "f1": "F1",
    "kl_divergence": "KL divergence from the model as loaded",
}


def axis_label(name: str, better: str) -> str:
    """What stands along an axis: short enough for it."""
    return f"{QUALITY[name].partition(' from ')[0]} ({better} is better)"


def write_report(title: str, sweep: Sweep, found: Sequence[Line], out: Path) -> None:
    """Write report.html into the sweep's folder."""
    same = groups(sweep, found)
    head, rows = columns(sweep, found)
    count = {status: sum(line.status == status for line in found) for status in ("done", "failed", "waiting")}
    tables = [_means(sweep, same)] if same else []
    tables.append(report.Table("Every point", head, rows))
    if count["failed"]:
        failed = [
            [*(str(v) for v in line.at.values()), line.error] for line in found if line.status == "failed"
        ]
        tables.insert(
            0, report.Table("What failed", [*sweep.axes, "why"], failed, "The next call tries again.")
        )
    unfinished = ""
    if count["done"] < len(found):
        unfinished = f"{count['done']} of {len(found)} points are done, {count['failed']} failed."
    html = report.page(
        title,
        summary=f"A sweep of {len(found)} points: "
        + ", ".join(f"{len(v)} x {axis}" for axis, v in sweep.axes.items()),
        tradeoffs=_charts(sweep, same, found),
        tables=tables,
        highlights=[report.Highlight(f"points {word}", str(count[word])) for word in count if count[word]],
        notes=[
            "A point is the mean over seeds; its bar goes from the least to the largest seed.",
            "Measured after the last stage of each point. The folder of a point holds its model and all that was said.",
        ],
        unfinished=unfinished,
    )
    report.write(out / "report.html", html)


def _means(sweep: Sweep, same: Sequence[Group]) -> report.Table:
    names = [
        name
        for name in dict.fromkeys(n for group in same for n in group.values)
        if name in (*QUALITY, "sparsity")
    ]
    axes = [axis for axis in sweep.axes if axis != "seed"]
    head = [*axes, "seeds", *(f"{name}{word}" for name in names for word in ("", ", std"))]
    rows: list[list[Any]] = []
    for group in same:
        cells: list[Any] = []
        for name in names:
            known = name in group.values
            std = group.std(name) if known else None
            cells += [_short(group.mean(name)) if known else None, None if std is None else _short(std)]
        seeds = max((len(values) for values in group.values.values()), default=0)
        rows.append([*group.at.values(), seeds, *cells])
    return report.Table("Mean and spread over seeds", head, rows)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _charts(sweep: Sweep, same: Sequence[Group], found: Sequence[Line]) -> list[report.Tradeoff]:
    """One chart a quality, over the sparsity reached, or over epochs where only those change."""
    epochs = len(sweep.axes.get("epochs", ())) > 1 and len(sweep.axes.get("sparsity", ())) < 2
    along = "epochs" if epochs else "sparsity"
    charts = []
    for name in QUALITY:
        known = [group for group in same if name in group.values and (epochs or "sparsity" in group.values)]
        if not known:
            continue
        held: dict[str, list[report.Point]] = {}
        for group in known:
            where = [
                f"{axis} {v}" for axis, v in group.at.items() if axis != along and len(sweep.axes[axis]) > 1
            ]
            x = float(group.at["epochs"]) if epochs else group.mean("sparsity")
            values = group.values[name]
            low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
            held.setdefault(", ".join(where) or "all points", []).append(
                report.Point(x, group.mean(name), low, high, ", ".join(f"{a} {v}" for a, v in group.at.items()))
            )
        before = [line.dense[name].value for line in found if name in line.dense]
        sign: Any = "higher" if name in HIGHER else "lower"
        charts.append(
            report.Tradeoff(
                f"{QUALITY[name]} against {along}",
                "epochs of fine-tuning" if epochs else "sparsity of the pruned layers",
                axis_label(name, sign),
                held,
                reference=fmean(before) if before else None,
                reference_name="before pruning",
                x_percent=not epochs,
                log_y=name == "perplexity",
                better=("lower" if epochs else "higher", sign),
            )
        )
    return charts
