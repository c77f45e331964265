"""How good is each method? Held-out perplexity of real language models, by method and sparsity.

    OMP_NUM_THREADS=1 python bench/quality.py --work runs/quality

Every point (model, target, method, seed of the calibration draw) is one JSON line in WORK/points.jsonl; points that
are there already are not computed again. The table is printed at the end, or alone with --table.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from secateur import data, evaluate
from secateur import model as models
from secateur.best import best_
from secateur.demo.language import model_folder
from secateur.documents import read_text
from secateur.pattern import NM, Weights
from secateur.prune import prune_
from secateur.recipes import admm, alps, magnitude, ria, sparsegpt, wanda

SHARED = Path(__file__).resolve().parents[2] / "shared"
TARGETS = ("50 %", "60 %", "70 %", "2:4")
RECIPES = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "RIA": ria,
    "SparseGPT": sparsegpt,
    "ADMM": admm,
    "ALPS": alps,
}
METHODS = (*RECIPES, "best")
CONTEXT, SAMPLES, TOKENS = 256, 64, 16_384


def stories(tokenizer: Any, seed: int, samples: int, split: str = "train") -> list[Any]:
    texts = read_text(SHARED / f"data/lm/tinystories_{split}.txt")
    return data.tokens(texts, tokenizer, context=CONTEXT, samples=samples, seed=seed, batch=samples)


def encyclopedia(held_out: bool) -> list[str]:
    """Wikipedia articles; every tenth is held out of the calibration."""
    text = (SHARED / "data/lm/wikipedia_sample.txt").read_text(encoding="utf-8")
    texts = [part.strip() for part in re.split(r"</?doc[^>]*>", text) if part.strip()]
    return [article for number, article in enumerate(texts) if (number % 10 == 9) == held_out]


def articles(tokenizer: Any, seed: int, samples: int) -> list[Any]:
    return data.tokens(
        encyclopedia(False), tokenizer, context=CONTEXT, samples=samples, seed=seed, batch=samples
    )


def wikitext(tokenizer: Any, seed: int, samples: int) -> list[Any]:
    texts = read_text(SHARED / "data/lm/wikitext2_raw_valid.txt")
    return data.tokens(texts, tokenizer, context=CONTEXT, samples=samples, seed=seed, batch=samples)


def mixed(tokenizer: Any, seed: int, samples: int) -> list[Any]:
    """Half stories, half articles; dealt alternately, so that any part of them is mixed too."""
    pair = (stories(tokenizer, seed, samples // 2)[0], articles(tokenizer, seed, samples // 2)[0])
    return [{key: torch.stack([half[key] for half in pair], dim=1).flatten(0, 1) for key in pair[0]}]


MODELS: dict[str, tuple[str, Callable[..., list[Any]], dict[str, str]]] = {
    "stories260K": (
        str(SHARED / "models/stories260K"),
        stories,
        {"TinyStories": "tinystories_test.txt"},
    ),
    "gpt2_3m": (
        model_folder(),
        mixed,
        {"TinyStories": "tinystories_test.txt", "Wikipedia": "", "WikiText-2": "wikitext2_raw_test.txt"},
    ),
    "gpt2_3m, calibrated on WikiText-2": (
        model_folder(),
        wikitext,
        {"WikiText-2": "wikitext2_raw_test.txt"},
    ),
}


def pruned(dense: nn.Module, method: str, target: str, batches: list[Any], seed: int) -> tuple[nn.Module, str]:
    """A pruned copy, and what `best` says of itself."""
    found = copy.deepcopy(dense)
    pattern, sparsity = (NM(2, 4), None) if target == "2:4" else (Weights(), float(target[:2]) / 100)
    if method == "best":
        return found, str(best_(found, sparsity, batches, pattern=pattern, seed=seed))
    prune_(found, sparsity, replace(RECIPES[method], pattern=pattern), data=batches, seed=seed)
    return found, ""


def points(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """The cheap points of all models first."""
    for method in ("dense", *args.methods):
        for name in args.models:
            for seed in args.seeds:
                for target in ("-",) if method == "dense" else args.targets:
                    if method != "dense" or seed == args.seeds[0]:
                        yield name, target, method, seed


def run(args: argparse.Namespace, file: Path) -> None:
    done = {(p["model"], p["target"], p["method"], p["seed"]) for p in read(file)}
    loaded, texts = {}, {}
    for name in args.models:
        folder, _, tests = MODELS[name]
        loaded[name] = models.load(folder, offline=True)
        texts[name] = {t: ids(path, loaded[name].tokenizer) for t, path in tests.items()}
    for point in points(args):
        if point in done:
            continue
        name, target, method, seed = point
        dense, draw = loaded[name], MODELS[name][1]
        started, said, model = time.perf_counter(), "", dense.model
        if method != "dense":
            batches = draw(dense.tokenizer, seed, SAMPLES)
            started = time.perf_counter()
            model, said = pruned(dense.model, method, target, batches, seed)
        seconds = time.perf_counter() - started
        values = {text: evaluate.perplexity(model, t, context=CONTEXT).value for text, t in texts[name].items()}
        line = {"model": name, "target": target, "method": method, "seed": seed, "perplexity": values}
        line |= {
            "seconds": round(seconds, 1),
            "said": said,
            "machine": platform.processor() or platform.machine(),
        }
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        print(
            name,
            target,
            method,
            seed,
            {k: round(v, 3) for k, v in values.items()},
            f"{seconds:.1f} s",
            flush=True,
        )


def ids(file: str, tokenizer: Any) -> Tensor:
    """The first tokens of a text, "" being held-out articles; a part of it is enough to fill them."""
    texts = read_text(SHARED / "data/lm" / file) if file else encyclopedia(True)
    return data.stream([text[:400_000] for text in texts[:400]], tokenizer)[:TOKENS]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def table(found: list[dict[str, Any]]) -> str:
    """One table for each model and text: mean over seeds, then each seed."""
    lines: list[str] = []
    cells = {(p["model"], p["method"], p["target"], p["seed"]): p for p in found}
    for name, (_, _, tests) in MODELS.items():
        dense = next((p for p in found if p["model"] == name and p["method"] == "dense"), None)
        for text in tests:
            if dense is None:
                continue
            lines += ["", f"{name}, {text}, dense {dense['perplexity'][text]:.2f}", ""]
            lines += ["| method | " + " | ".join(TARGETS) + " | seconds |", "|---" * (len(TARGETS) + 2) + "|"]
            for method in METHODS:
                row = [[p for k, p in cells.items() if k[:3] == (name, method, t)] for t in TARGETS]
                if any(row):
                    times = [p["seconds"] for cell in row for p in cell]
                    shown = [_cell([p["perplexity"][text] for p in cell]) for cell in row]
                    lines.append(f"| {method} | " + " | ".join(shown) + f" | {mean(times):.0f} |")
    return "\n".join(lines).strip()


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return (
        f"{_short(mean(values))} ({', '.join(map(_short, values))})" if len(values) > 1 else _short(values[0])
    )


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "points.jsonl"
    if not args.table:
        run(args, file)
    print(table(read(file)))


if __name__ == "__main__":
    main()
