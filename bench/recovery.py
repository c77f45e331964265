"""How much of what pruning cost comes back? Fine-tuning for 1, 3 and 5 epochs, distillation, and a small file.

    OMP_NUM_THREADS=1 python bench/recovery.py --work runs/recovery

A CIFAR-10 ResNet-20, a bag of embeddings that classifies SST-2 sentences, the repository's own language model; three
seeds each (of the order of batches, and of the windows drawn). Every point is one JSON line in WORK/points.jsonl;
points that are there are not computed again. The table is printed at the end, or alone with --table. Needs the folder
of real data, pyarrow, pillow and torchao.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import when
from cifar import ResNet, images
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import data, distill_, evaluate, finetune_, load_quantized_, prune_, quantize_, save_quantized
from secateur import model as models
from secateur.demo.language import model_folder
from secateur.documents import read_text
from secateur.recipes import global_magnitude, magnitude

SHARED = Path(__file__).resolve().parents[2] / "shared"
NAMES = ["ResNet-20", "Bag", "gpt2_3m"]
WAYS = ("fine-tuned 1", "fine-tuned 3", "fine-tuned 5", "distilled 5")


@dataclass(frozen=True)
class Subject:
    """A dense model, how it is pruned, trained on and judged, and where its weights lie."""

    dense: nn.Module
    file: Path
    sparsity: float
    small: tuple[float, str, str]  # of the small file: sparsity, scheme, scheme of the outer layers
    recipe: Any
    how: dict[str, Any]
    batches: Callable[[int], tuple[list[Any], list[Any]]]  # seed -> to train on, to choose the epoch by
    judge: Callable[[nn.Module], float]
    higher: bool
    only: list[str] | None = None


def resnet(train: int, test: int) -> Subject:
    file = SHARED / "models/cifar10_resnet20_jpegft/model.safetensors"
    dense = ResNet(20).eval()
    dense.load_state_dict(load_file(file))
    dense.to(memory_format=torch.channels_last)
    pictures = images(SHARED / "data/images/cifar10_jpeg_train.parquet", train + 500, 50)
    held_out = images(SHARED / "data/images/cifar10_jpeg_test.parquet", test, 250)
    cut = train // 50
    return Subject(
        dense,
        file,
        0.8,
        (0.6, "int8", "int8"),
        global_magnitude,
        {"lr": 1e-3},
        lambda seed: (pictures[:cut], pictures[cut:]),
        lambda model: evaluate.accuracy(model, held_out).value,
        True,
    )


def language(windows: int, tokens: int) -> Subject:
    loaded = models.load(model_folder(), offline=True)
    texts = read_text(SHARED / "data/lm/tinystories_train.txt")
    judged = [text[:100_000] for text in read_text(SHARED / "data/lm/tinystories_test.txt")[:200]]
    ids = data.stream(judged, loaded.tokenizer)[:tokens]

    def batches(seed: int) -> tuple[list[Any], list[Any]]:
        drawn = data.tokens(texts, loaded.tokenizer, context=256, samples=windows + 16, seed=seed, batch=8)
        return drawn[:-2], drawn[-2:]

    return Subject(
        loaded.model,
        Path(model_folder()) / "model.safetensors",
        0.6,
        (0.6, "int4", "int4"),
        magnitude,
        {"original_lr": 3e-3},
        batches,
        lambda model: evaluate.perplexity(model, ids, context=256).value,
        False,
    )


def classifier(work: Path) -> Subject:
    """The text classifier of when.py, trained for 600 steps on all but the last 640 sentences."""
    learned = when.text(SHARED)
    inputs, labels = learned.train
    dense = learned.make(0)
    when.fit(dense, replace(learned, train=(inputs[:-640], labels[:-640])), 600, 0)
    file = work / "bag.safetensors"
    save_file(dense.eval().state_dict(), file)
    pairs = list(zip(inputs.split(128), labels.split(128), strict=True))
    return Subject(
        dense,
        file,
        0.9,
        (0.6, "int8", "int8"),
        magnitude,
        {"lr": 2e-3},
        lambda seed: (pairs[:-6], pairs[-5:]),
        lambda model: when.measured(model, learned.test),
        True,
        learned.only,
    )


def train(subject: Subject, model: nn.Module, masks: Any, way: str, seed: int) -> Any:
    """One way of recovery; the epoch is chosen by held-out training data, never by what is judged at the end."""
    kind, epochs = way.split()
    batches, held_out = subject.batches(seed)
    how = {**subject.how, "epochs": int(epochs), "seed": seed, "validation": held_out}
    if kind == "distilled":
        return distill_(model, subject.dense, batches, masks, **how)
    return finetune_(model, batches, masks, **how)


def points(subject: Subject, seeds: list[int], work: Path, name: str) -> Iterator[tuple[str, int, Callable]]:
    def pruned() -> tuple[float, dict]:
        model = copy.deepcopy(subject.dense)
        prune_(model, subject.sparsity, subject.recipe, only=subject.only)
        return subject.judge(model), {}

    def recovered(way: str, seed: int) -> tuple[float, dict]:
        model = copy.deepcopy(subject.dense)
        masks = prune_(model, subject.sparsity, subject.recipe, only=subject.only)
        tuned = train(subject, model, masks, way, seed)
        assert all(not model.get_parameter(key)[~mask].any() for key, mask in masks.items())
        return subject.judge(model), {"kept epoch": tuned.best}

    def small(seed: int) -> tuple[float, dict]:
        """Pruned, distilled and quantized; judged after it was written and read again into a fresh model."""
        sparsity, scheme, outer = subject.small
        model = copy.deepcopy(subject.dense)
        masks = prune_(model, sparsity, subject.recipe, only=subject.only)
        train(subject, model, masks, "distilled 3", seed)
        before = subject.judge(model)
        quantized = quantize_(model, scheme, outer=outer)
        file = work / f"{name}-{seed}.safetensors"
        save_quantized(model, file)
        again = load_quantized_(copy.deepcopy(subject.dense), file, dense=True)
        assert all(not again.get_parameter(key)[~mask].any() for key, mask in masks.items())
        size = {"bytes": file.stat().st_size, "of": subject.file.stat().st_size}
        return subject.judge(again), {"before quantizing": before, "zeros": quantized.sparsity, **size}

    yield "dense", 0, lambda: (subject.judge(subject.dense), {})
    yield "pruned", 0, pruned
    for seed in seeds:
        yield "small file", seed, lambda seed=seed: small(seed)
        for way in WAYS:
            yield way, seed, lambda way=way, seed=seed: recovered(way, seed)


def run(args: argparse.Namespace, file: Path) -> None:
    done = {(p["model"], p["way"], p["seed"]) for p in read(file)}
    built = {
        "ResNet-20": lambda: resnet(args.images, args.test),
        "Bag": lambda: classifier(args.work),
        "gpt2_3m": lambda: language(args.windows, args.tokens),
    }
    for name in args.models:
        subject = built[name]()
        for way, seed, work in points(subject, args.seeds, file.parent, name):
            if (name, way, seed) in done:
                continue
            began = time.process_time()
            value, more = work()
            line = {"model": name, "way": way, "seed": seed, "value": value, "higher": subject.higher, **more}
            line |= {"sparsity": subject.sparsity, "cpu seconds": round(time.process_time() - began, 1)}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(line, flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def table(found: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    for name in dict.fromkeys(p["model"] for p in found):
        mine = [p for p in found if p["model"] == name]
        first = {p["way"]: p for p in mine if p["way"] in ("dense", "pruned")}
        if len(first) < 2:
            continue
        unit = "accuracy" if first["dense"]["higher"] else "perplexity"
        dense, pruned = first["dense"]["value"], first["pruned"]["value"]
        lines += ["", f"{name}: {unit} dense {_shown(dense)}, pruned {_shown(pruned)}", ""]
        lines += ["| | mean | spread | comes back | seeds | CPU-s |", "|---" * 6 + "|"]
        for way in (*WAYS, "small file"):
            rows = [p for p in mine if p["way"] == way]
            values = [p["value"] for p in rows]
            if not values:
                continue
            share = mean(_share(value, dense, pruned) for value in values)
            spread = _shown(stdev(values)) if len(values) > 1 else "-"
            back = "-" if way == "small file" else f"{share:.0%}"
            seconds = mean(p["cpu seconds"] for p in rows)
            lines.append(
                f"| {way} | {_shown(mean(values))} | {spread} | {back} | {len(rows)} | {seconds:.0f} |"
            )
        for p in (p for p in mine if p["way"] == "small file"):
            lines.append(
                f"\nsmall file, seed {p['seed']}: {p['bytes']:,} of {p['of']:,} bytes ({p['bytes'] / p['of']:.1%}), "
                f"{_shown(p['before quantizing'])} before quantizing, {_shown(p['value'])} after"
            )
    return "\n".join(lines).strip()


def _share(value: float, dense: float, pruned: float) -> float:
    """Of what pruning cost, what came back; perplexities by their logarithms."""
    if dense > 1:
        value, dense, pruned = math.log(value), math.log(dense), math.log(pruned)
    return (value - pruned) / (dense - pruned)


def _shown(value: float) -> str:
    return f"{value:.2%}" if value < 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--images", type=int, default=2000, help="to train on")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens to train on")
    parser.add_argument("--tokens", type=int, default=8192, help="to judge by")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "points.jsonl"
    if not args.table:
        run(args, file)
    print(table(read(file)))


if __name__ == "__main__":
    main()
