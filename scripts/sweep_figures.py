"""Tables and small pictures of the four classic sweeps: mean over seeds, sample standard deviation, every seed.

python scripts/sweep_figures.py runs docs     # runs/sparsity, runs/methods, runs/layers, runs/epochs
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SWEEPS = {"sparsity": "sparsity", "methods": "method", "layers": "only", "epochs": "epochs"}


def read(folder: Path, axis: str) -> tuple[dict[str, list[dict[str, str]]], float]:
    """Rows of the points by the value of the axis, and the mean accuracy right before they were pruned."""
    held, dense = defaultdict(list), []
    with (folder / "results.csv").open() as file:
        for row in csv.DictReader(file):
            if row["status"] != "done":
                continue
            held[row[axis]].append(row)
            stages = json.loads((folder / "points" / row["folder"] / "run" / "results.json").read_text())[
                "stages"
            ]
            before = stages[[stage["name"] for stage in stages].index("prune") - 1]
            dense.append(next(m["value"] for m in before["measurements"] if m["name"] == "accuracy"))
    return held, 100 * fmean(dense)


def draw(held: dict[str, list[float]], axis: str, dense: float, path: Path) -> None:
    """Means with their standard deviation, every seed as a dot, the model before pruning as a line."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(held))
    axes.axhline(dense, color="grey", linestyle="--", linewidth=1, label=f"before pruning ({dense:.1f} %)")
    axes.errorbar(
        places,
        [fmean(v) for v in held.values()],
        [stdev(v) for v in held.values()],
        fmt="ks",
        capsize=5,
        label="mean",
    )
    for place, values in zip(places, held.values(), strict=True):
        axes.plot([place + 0.12] * len(values), values, "o", color="tab:blue", markersize=4)
    axes.set_xticks(list(places), list(held))
    axes.set_xlabel(axis)
    axes.set_ylabel("test accuracy, %")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=90)


def main(runs: Path, docs: Path) -> None:
    """Print a table and write a picture for each sweep that is there."""
    for name, axis in SWEEPS.items():
        if not (runs / name / "results.csv").is_file():
            continue
        rows, dense = read(runs / name, axis)
        held = {}
        print(
            f"\n{name}: before pruning {dense:.2f} %\n\n| {axis} | zeros | accuracy, % | each seed |\n|---|---|---|---|"
        )
        for value, same in rows.items():
            accuracy = [100 * float(row["accuracy"]) for row in same]
            zeros = fmean(float(row.get("sparsity reached", row["sparsity"])) for row in same)
            held[value] = accuracy
            each = ", ".join(f"{a:.1f}" for a in accuracy)
            print(f"| {value} | {zeros:.1%} | {fmean(accuracy):.2f} +- {stdev(accuracy):.2f} | {each} |")
        draw(held, axis, dense, docs / f"sweep-{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
