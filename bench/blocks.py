"""What the block pattern of CPUs costs in quality, beside what it gives in speed.

    OMP_NUM_THREADS=1 python bench/blocks.py --work runs/blocks

Single weights, `Blocks(4, 1)` and `Blocks(16, 1)`, 4 and 16 rows that share an input, and `Blocks(4, 4)`, for which
int8 has kernels, at the same sparsity of two real language models (perplexity; stories260K has 172 rows, which are
no blocks of 16) and a real CIFAR-10 ResNet-20 (accuracy, batch norms recalibrated; its last layer has 10 rows and
stays whole where blocks go, its first one 27 columns and stays whole where squares go), each with its recipes, no
fine-tuning. Speed is that of a layer of 2048 x 2048 in float32 whose weights come from main memory, the fastest way
by the table that `sparsify_` uses, over dense; bench/products.py has that of squares and of N:M. Then N of every M
weights of a row, for which there are kernels too, beside single weights of the same share (172 columns of
stories260K and 27 of ResNet-20's first layer are no multiple of 16). Every point is a line in
WORK/points.jsonl and is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cifar import ResNet, images
from quality import CONTEXT, MODELS, SAMPLES, SHARED, ids, read
from safetensors.torch import load_file

from secateur import LeastSquares, Recipe, best_, evaluate, prune_, recalibrate_
from secateur import model as models
from secateur.deploy.sparse.choice import Kind, measured
from secateur.deploy.sparse.packed import pack
from secateur.pattern import NM, Blocks, Weights
from secateur.recipes import alps, magnitude, sparsegpt, wanda

SPARSITIES = (0.5, 0.7, 0.9)
OF_BLOCKS = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "Wanda, least squares": replace(wanda, update=LeastSquares()),
    "SparseGPT": sparsegpt,
    "ALPS": alps,
    "best": None,
}
RECIPES: dict[str, dict[str, Recipe | None]] = {
    "single weights": {
        "magnitude": magnitude,
        "Wanda": wanda,
        "SparseGPT": sparsegpt,
        "ALPS": alps,
        "best": None,
    },
    "blocks of 4 x 1": OF_BLOCKS,
    "blocks of 16 x 1": OF_BLOCKS,
    "blocks of 4 x 4": OF_BLOCKS,
}
NM_RECIPES: dict[str, Recipe | None] = RECIPES["single weights"]
OF_NM = {0.5: ("2:4", "8:16"), 0.75: ("1:4", "4:16"), 0.875: ("2:16",)}
PATTERNS = {
    **{name: NM(*map(int, name.split(":"))) for names in OF_NM.values() for name in names},
    "single weights": Weights(), "blocks of 4 x 1": Blocks(4, 1), "blocks of 16 x 1": Blocks(16, 1),
    "blocks of 4 x 4": Blocks(4, 4),
}  # fmt: skip
BEST = {(name, sparsity) for name in ("stories260K", "gpt2_3m") for sparsity in (0.5, *OF_NM)}
BEST |= {("stories260K", 0.7)}
UNEVEN = ["linear", "conv1"]
WHOLE = {  # of ResNet-20; others: ["linear"]
    "single weights": None, "blocks of 4 x 4": UNEVEN, **{name: UNEVEN for names in OF_NM.values() for name in names}
}  # fmt: skip


class Network:
    """ResNet-20 and its images."""

    def __init__(self) -> None:
        folder = SHARED / "data" / "images"
        self.model = ResNet(20)
        self.model.load_state_dict(load_file(SHARED / "models/cifar10_resnet20_jpegft/model.safetensors"))
        self.model.eval()
        self.test = images(folder / "cifar10_jpeg_test.parquet", 2000, 250)
        self.train = images(folder / "cifar10_jpeg_train.parquet", 1024, 128)

    def quality(self, model: Any) -> float:
        if model is not self.model:
            recalibrate_(model, [x for x, _ in self.train])
        with torch.inference_mode():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in self.test)
        return right / sum(len(y) for _, y in self.test)

    def batches(self) -> list[Any]:
        return [x for x, _ in self.train]


class Language:
    """A language model and its texts."""

    def __init__(self, name: str):
        folder, self.draw, tests = MODELS[name]
        self.loaded = models.load(folder, offline=True)
        self.model = self.loaded.model
        self.text = ids(SHARED / "data/lm" / tests["TinyStories"], self.loaded.tokenizer)

    def quality(self, model: Any) -> float:
        return evaluate.perplexity(model, self.text, context=CONTEXT).value

    def batches(self) -> list[Any]:
        return self.draw(self.loaded.tokenizer, 0, SAMPLES)


def points() -> Iterator[tuple[str, str, str, float]]:
    """The cheap ones first: language models, then blocks, then single weights."""
    for name in ("stories260K", "gpt2_3m", "ResNet-20"):
        yield name, "-", "dense", 0.0
        for shape, recipes in reversed(RECIPES.items()):
            if name == "stories260K" and shape == "blocks of 16 x 1":
                continue
            for method in recipes:
                if name == "ResNet-20" and method == "ALPS" and shape == "single weights":
                    continue  # minutes a point
                for sparsity in SPARSITIES:
                    if method == "best" and (name, sparsity) not in BEST:
                        continue  # many minutes a point
                    yield name, shape, method, sparsity
        for sparsity, names in OF_NM.items():
            for shape in (*names, *["single weights"] * (sparsity not in SPARSITIES)):
                if name == "stories260K" and shape.endswith(":16"):
                    continue
                for method in NM_RECIPES:
                    if name == "ResNet-20" and method in ("ALPS", "best"):
                        continue  # minutes a point
                    yield name, shape, method, sparsity


def run(file: Path) -> None:
    done = {(p["model"], p["shape"], p["method"], p["sparsity"]) for p in read(file)}
    held: dict[str, Any] = {}
    for name, shape, method, sparsity in points():
        if (name, shape, method, sparsity) in done:
            continue
        if name not in held:
            held = {name: Network() if name == "ResNet-20" else Language(name)}
        it, model = held[name], held[name].model
        start = time.process_time()
        if method != "dense":
            model = copy.deepcopy(model)
            recipe, pattern = RECIPES.get(shape, NM_RECIPES)[method], PATTERNS[shape]
            skip = WHOLE.get(shape, ["linear"]) if name == "ResNet-20" else None
            if recipe is None:
                best_(model, sparsity, it.batches(), pattern=pattern)
            else:
                prune_(model, sparsity, replace(recipe, pattern=pattern), skip=skip, data=it.batches(), seed=0)
        line = {"model": name, "shape": shape, "method": method, "sparsity": sparsity}
        line |= {"quality": it.quality(model), "seconds": round(time.process_time() - start, 1)}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        print(line, flush=True)


def speed() -> None:
    """Speed-up over dense of one float32 layer, single weights beside blocks."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    print("\n| float32 layer | 1 token | 16 | 64 | 128 |\n" + "|---" * 5 + "|")
    for sparsity in SPARSITIES:
        for shape, block in (("single weights", 1), ("blocks of 4 x 1", 4), ("blocks of 16 x 1", 16)):
            cut = torch.rand(2048 // block, 2048) < sparsity
            packed = pack(weight.masked_fill(cut.repeat_interleave(block, 0), 0), block=block, form="bitmask")
            kind = Kind("Linear", torch.float32, cold=True)
            tables = [measured(packed, kind, form) for form in ("bitmask", "index")[: 1 + (block == 1)]]
            ratios = [max(times[at][0] / min(times[at][1:]) for times in tables) for at in (0, 4, 6, 7)]
            print(f"| {sparsity:.0%} {shape} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def table(found: list[dict[str, Any]]) -> None:
    for name in ("stories260K", "gpt2_3m", "ResNet-20"):
        cells = {(p["shape"], p["method"], p["sparsity"]): p["quality"] for p in found if p["model"] == name}
        if ("-", "dense", 0.0) not in cells:
            continue
        shown = "{:.1%}" if name == "ResNet-20" else "{:.2f}"
        print(
            f"\n{name}, dense {shown.format(cells['-', 'dense', 0.0])}\n\n| | 50 % | 70 % | 90 % |\n|---|---|---|---|"
        )
        for shape, recipes in RECIPES.items():
            for method in recipes:
                row = [cells.get((shape, method, sparsity)) for sparsity in SPARSITIES]
                if any(value is not None for value in row):
                    words = ("-" if value is None else shown.format(value) for value in row)
                    print(f"| {shape}, {method} | " + " | ".join(words) + " |")


def table_of_nm(found: list[dict[str, Any]]) -> None:
    for name in ("stories260K", "gpt2_3m", "ResNet-20"):
        cells = {(p["shape"], p["method"], p["sparsity"]): p["quality"] for p in found if p["model"] == name}
        heads = [(shape, part) for part, names in OF_NM.items() for shape in ("single weights", *names)]
        shown = "{:.1%}" if name == "ResNet-20" else "{:.2f}"
        said = (f"{part:.1%}" if shape == "single weights" else shape for shape, part in heads)
        print(f"\n| {name} | {' | '.join(said)} |\n{'|---' * (len(heads) + 1)}|")
        for method in NM_RECIPES:
            row = [cells.get((shape, method, part)) for shape, part in heads]
            if any(value is not None for value in row):
                words = ("-" if value is None else shown.format(value) for value in row)
                print(f"| {method} | " + " | ".join(words) + " |")


def main() -> None:
    """Compute what is missing and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/blocks"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    file = given.work / "points.jsonl"
    if not given.table:
        run(file)
    table(read(file))
    table_of_nm(read(file))
    speed()


if __name__ == "__main__":
    main()
