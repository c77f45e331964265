"""Which score should choose the heads and neurons of a language model? Held-out perplexity with 20 % of them gone.

    OMP_NUM_THREADS=1 python bench/width.py --work runs/width

Every point (model, sparsity, score, allocation, seed of the calibration draw) is one JSON line in
WORK/points.jsonl; points that are there already are not computed again. Nothing is mended or trained afterwards.
Sparsity is that of the weights of all heads (key/value groups) and neurons together.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from quality import CONTEXT, MODELS, ids, read

from secateur import evaluate, score
from secateur import model as models
from secateur.allocate import Normalised, globally, per_layer
from secateur.core.example import analysis_of
from secateur.pattern import Coupled, Heads, Neurons, Together
from secateur.prune import plan, prune_
from secateur.recipes import Recipe
from secateur.scoring import gather_for

BOTH = Heads() | Neurons()
READERS = Heads(over="readers") | Neurons(over="readers")
SCORES: dict[str, tuple[Any, Coupled | Together]] = {
    "random": (score.random, BOTH),
    "magnitude": (score.magnitude, BOTH),
    "l2": (score.l2, BOTH),
    "Wanda": (score.wanda, BOTH),
    "Wanda, readers": (score.wanda, READERS),
    "FLAP": (score.flap, BOTH),
    "activation": (score.activation, BOTH),
    "Taylor": (score.taylor, BOTH),
    "Taylor, whole": (score.taylor_whole, BOTH),
    "Fisher": (score.fisher, BOTH),
    "gate": (score.gate, BOTH),
}
ALLOCATIONS = {
    "per axis": per_layer,
    "global": globally,
    "by mean": Normalised("mean"),
    "by standard": Normalised("standard"),
}
SAMPLES = 64


KNOWN: dict[tuple, Any] = {}  # statistics serve every allocation


def pruned(dense: nn.Module, axes: Any, point: tuple, batches: list[Any]) -> tuple[nn.Module, str]:
    """A pruned copy and what is left of it."""
    model, sparsity, name, allocation, seed = point
    measure, pattern = SCORES[name]
    recipe = Recipe(measure, pattern, ALLOCATIONS[allocation])
    if (model, name, seed) not in KNOWN:
        KNOWN.clear()
        todo = plan(dense, sparsity, recipe, example=axes)
        KNOWN[model, name, seed] = gather_for(dense, recipe, todo.layers, batches)
    found = copy.deepcopy(dense)
    masks = prune_(
        found, sparsity, recipe, example=axes, seed=seed, statistics=KNOWN[model, name, seed], data=batches
    )
    return found, f"sparsity {masks.sparsity:.4f}"


def run(args: argparse.Namespace, file: Path) -> None:
    done = {tuple(p["point"]) for p in read(file)}
    for name in args.models:
        folder, draw, tests = MODELS[name]
        loaded = models.load(folder, offline=True)
        texts = {t: ids(path, loaded.tokenizer) for t, path in tests.items()}
        batches = {seed: draw(loaded.tokenizer, seed, SAMPLES) for seed in args.seeds}
        axes, _ = analysis_of(loaded.model, {"input_ids": batches[args.seeds[0]][0]["input_ids"][:2, :16]})
        points = [(name, 0.0, "dense", "-", args.seeds[0])]
        points += [
            (name, sparsity, kind, allocation, seed)
            for sparsity in args.sparsities
            for seed in args.seeds
            for kind in args.scores
            for allocation in args.allocations
        ]
        for point in points:
            if point in done:
                continue
            started = time.perf_counter()
            model, said = (
                (loaded.model, "")
                if point[2] == "dense"
                else pruned(loaded.model, axes, point, batches[point[4]])
            )
            seconds = time.perf_counter() - started
            values = {t: evaluate.perplexity(model, text, context=CONTEXT).value for t, text in texts.items()}
            line = {"point": point, "perplexity": values, "seconds": round(seconds, 1), "said": said}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(*point, {k: round(float(v), 3) for k, v in values.items()}, f"{seconds:.1f} s", flush=True)


def table(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """For each model, text and sparsity: scores by allocations, mean over seeds and the seeds' values."""
    cells: dict[tuple, list[dict[str, float]]] = {}
    for line in found:
        cells.setdefault(tuple(line["point"][:4]), []).append(line["perplexity"])
    lines: list[str] = []
    for name in args.models:
        dense = cells.get((name, 0.0, "dense", "-"), [{}])[0]
        for text in MODELS[name][2]:
            for sparsity in args.sparsities:
                lines += [
                    "",
                    f"{name}, {text}, {sparsity:.0%} gone, dense {dense.get(text, float('nan')):.2f}",
                    "",
                ]
                lines += ["| score | " + " | ".join(ALLOCATIONS) + " |", "|---" * (len(ALLOCATIONS) + 1) + "|"]
                for kind in SCORES:
                    row = [[v[text] for v in cells.get((name, sparsity, kind, a), [])] for a in ALLOCATIONS]
                    if any(row):
                        lines.append(f"| {kind} | " + " | ".join(map(_cell, row)) + " |")
    return "\n".join(lines).strip()


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    shown = ", ".join(f"{value:.4g}" for value in values)
    return f"{mean(values):.4g} ({shown})" if len(values) > 1 else shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/width"))
    parser.add_argument("--models", nargs="+", default=list(MODELS)[:2], choices=list(MODELS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.2])
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "points.jsonl"
    if not args.table:
        run(args, file)
    print(table(read(file), args))


if __name__ == "__main__":
    main()
