"""What does depth cost? A real language model with blocks dropped or merged: perplexity, size, latency.

    OMP_NUM_THREADS=1 python bench/depth.py --work runs/depth

Every variant of the repository's own language model (GPT-2, 6 blocks) is one JSON line in WORK/points.jsonl:
perplexity before and after a short fine-tuning, the same for all and for the dense model, and latency in turns with
the dense model. Lines that are there are not computed again. The table is printed at the end, or alone with --table.
Needs the folder of real data.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality import CONTEXT, articles, ids, mixed, stories
from torch import Tensor, nn

from secateur import choose_blocks, drop_blocks, evaluate, finetune_, merge_blocks
from secateur import model as models
from secateur.demo.language import model_folder
from secateur.recipes import DEPTH_METHODS

TEXTS = {"TinyStories": "tinystories_test.txt", "WikiText-2": "wikitext2_raw_test.txt"}
STEPS, ROWS, RATE = 40, 8, 1e-3  # of fine-tuning: 40 steps of 8 windows of 256 tokens


@dataclass(frozen=True)
class Variant:
    """How one variant is made."""

    name: str
    make: Callable[[nn.Module, list[Any]], nn.Module]
    tuned: bool = True


def dropped(count: int, method: str, seed: int = 0) -> Callable[[nn.Module, list[Any]], nn.Module]:
    def make(model: nn.Module, calibration: list[Any]) -> nn.Module:
        which = choose_blocks(model, count, DEPTH_METHODS[method], calibration, seed=seed)
        return drop_blocks(model, which, example=calibration[0])

    return make


def merged(n: int, **options: Any) -> Callable[[nn.Module, list[Any]], nn.Module]:
    return lambda model, calibration: merge_blocks(model, n, data=calibration, **options)


def variants() -> Iterator[Variant]:
    """Angle and loss often choose the blocks of block influence; these, and small changes, are not trained."""
    yield Variant("dense", lambda model, _: copy.deepcopy(model))
    for count in (1, 2, 3):
        for method in ("block-influence", "angular-distance", "loss", "last"):
            trained = count > 1 and method in ("block-influence", "last")
            yield Variant(f"drop {count}, {method}", dropped(count, method), trained)
        for seed in range(3):
            yield Variant(f"drop {count}, random, seed {seed}", dropped(count, "random", seed), False)
    for n in (2, 3):
        for align in (None, "weights", "activations"):
            how = f", aligned by {align}" if align else ""
            trained = n == 2 and align != "activations"
            yield Variant(f"merged_{n}{how}", merged(n, compress=False, align=align), trained)
            yield Variant(f"compressed_{n}{how}", merged(n, align=align), align is None or trained)
    for stays in ("middle", "last"):
        yield Variant(f"compressed_3, {stays} stays", merged(3, stays=stays), False)
    yield Variant("compressed_2, LaCo", merged(2, how="differences", parts="block"))


def training_data(tokenizer: Any) -> list[Any]:
    """Half stories, half articles, other draws than the calibration's."""
    half = STEPS * ROWS // 2
    rows = [draw(tokenizer, 1, half)[0]["input_ids"] for draw in (stories, articles)]
    both = torch.stack(rows, dim=1).flatten(0, 1)
    return [{"input_ids": part} for part in both.split(ROWS)]


def perplexities(model: nn.Module, texts: dict[str, Tensor]) -> dict[str, float]:
    return {name: evaluate.perplexity(model, text, context=CONTEXT).value for name, text in texts.items()}


def measure(variant: Variant, dense: nn.Module, tokenizer: Any, texts: dict[str, Tensor]) -> dict[str, Any]:
    calibration = mixed(tokenizer, 0, 32)
    started = time.process_time()
    model = variant.make(dense, calibration)
    seconds = time.process_time() - started
    line: dict[str, Any] = {"variant": variant.name, "seconds": seconds, "before": perplexities(model, texts)}
    line["blocks"] = len(model.transformer.h)
    line["parameters"] = evaluate.parameters(model).value
    example = {"input_ids": texts["TinyStories"][None, :128], "use_cache": False}
    pair = evaluate.paired_latency({"dense": dense, "other": model}, example, repeats=30)
    for key, found in (("ms", pair.latency["other"]), ("speedup", pair.speedup["other"])):
        line[key] = [found.value, found.spread.low, found.spread.high]
    if variant.tuned:
        started = time.process_time()
        finetune_(model, training_data(tokenizer), epochs=1, lr=RATE, warm_up=0.1, loss="language-model")
        line |= {"after": perplexities(model.eval(), texts), "tuning": time.process_time() - started}
    return line


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def table(found: list[dict[str, Any]]) -> str:
    """Perplexity before and after fine-tuning; the random draws in one line."""
    texts = [f"{text}, {when}" for when in ("as made", "fine-tuned") for text in TEXTS]
    head = ["variant", "blocks", "parameters", *texts, "ms", "speed-up (quartiles)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in found:
        groups.setdefault(point["variant"].partition(", seed")[0], []).append(point)
    for name, points in groups.items():
        cells = [name, str(points[0]["blocks"]), f"{points[0]['parameters'] / 1e6:.2f} M"]
        for when in ("before", "after"):
            for text in TEXTS:
                values = [p[when][text] for p in points if when in p]
                several = f" ({', '.join(map(short, values))})" if len(values) > 1 else ""
                cells.append(short(mean(values)) + several if values else "-")
        cells.append(f"{mean(p['ms'][0] for p in points):.1f}")
        low, high = min(p["speedup"][1] for p in points), max(p["speedup"][2] for p in points)
        cells.append(f"{mean(p['speedup'][0] for p in points):.2f} ({low:.2f} to {high:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/depth"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "points.jsonl"
    if not args.table:
        loaded = models.load(model_folder(), offline=True)
        texts = {name: ids(path, loaded.tokenizer) for name, path in TEXTS.items()}
        for variant in variants():
            if variant.name not in {point["variant"] for point in read(file)}:
                line = measure(variant, loaded.model, loaded.tokenizer, texts)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    print(table(read(file)))


if __name__ == "__main__":
    main()
