"""A real CIFAR-10 ResNet-56 with fewer multiply-accumulates: accuracy and clock, beside torch-pruning, same budget.

    OMP_NUM_THREADS=1 python bench/resnet.py --work runs/resnet
    OMP_NUM_THREADS=1 python bench/resnet.py --work runs/resnet --clock

Channels between the two convolutions of every block go until the whole model needs 2.1 and 2.6 times fewer MACs
(torch's counter); then every model is trained on the same images, in the same order, with the same steps. Every point
is a line in WORK/points.jsonl and a file of weights; what is there is not computed again. Latency is measured with
--clock, all models in turns, on 1 and 2 threads.

torch-pruning 1.6 stops with an IndexError on the shortcuts of this network (zeros padded between channels), so it is
told to leave every layer but the first convolutions of blocks alone. Needs the folder of real models and data.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from cifar import ResNet, images

from secateur import Recipe, evaluate, finetune_, mend_units_, prune_, recalibrate_, score, shrink
from secateur.allocate import Normalised, PerCost, globally, per_layer
from secateur.pattern import Axes

SHARED = Path(__file__).resolve().parents[2] / "shared"
FACTORS = (2.1, 2.6)
EXAMPLE = torch.zeros(2, 3, 32, 32)
INNER = Axes("channels of layer?.?")  # between the convolutions of a block


def macs(model: nn.Module) -> float:
    return evaluate.flops(model, EXAMPLE[:1])["macs"].value


@dataclass(frozen=True)
class Data:
    """Calibration and training batches, and the test set."""

    calibration: list[tuple[Tensor, Tensor]]
    train: tuple[Tensor, Tensor]
    test: list[tuple[Tensor, Tensor]]


def read_data(train: int, test: int) -> Data:
    folder = SHARED / "data" / "images"
    x, y = (
        torch.cat(parts)
        for parts in zip(*images(folder / "cifar10_jpeg_train.parquet", train, 500), strict=True)
    )
    calibration = list(zip(x[:1024].split(128), y[:1024].split(128), strict=True))
    return Data(calibration, (x, y), images(folder / "cifar10_jpeg_test.parquet", test, 250))


class Augmented:
    """An epoch of shuffled, shifted and mirrored training images; the same for every model and seed."""

    def __init__(self, x: Tensor, y: Tensor, seed: int, batch: int = 128):
        self.x, self.y, self.batch = F.pad(x, (4, 4, 4, 4)), y, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y), generator=self.generator)
        for number in range(len(self)):
            rows = order[number * self.batch : (number + 1) * self.batch]
            top, left, mirror = torch.randint(0, 9, (3,), generator=self.generator).tolist()
            part = self.x[rows, :, top : top + 32, left : left + 32]
            yield (part.flip(3) if mirror % 2 else part), self.y[rows]


def torch_pruning(importance: str, everywhere: bool) -> Callable[..., nn.Module]:
    def make(dense: nn.Module, factor: float, data: Data) -> nn.Module:
        import torch_pruning as tp

        model: Any = copy.deepcopy(dense)
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
        measure = getattr(tp.importance, importance)()
        pruner = tp.pruner.BasePruner(
            model, EXAMPLE[:1], importance=measure, global_pruning=everywhere, pruning_ratio=1.0, iterative_steps=400,
            ignored_layers=[model.linear, model.conv1, *(block.conv2 for block in blocks)],
        )  # fmt: skip
        target, step = macs(dense) / factor, 0
        while macs(model) > target * 1.002:
            if (
                importance == "GroupTaylorImportance" and step % 10 == 0
            ):  # gradients of 4 batches, 40 times in all
                model.zero_grad()
                for x, y in data.calibration[:4]:
                    F.cross_entropy(model(x), y).backward()
            pruner.step()
            step += 1
        model.zero_grad()
        return model

    return make


def secateur(recipe: Recipe, mended: bool) -> Callable[..., nn.Module]:
    def make(dense: nn.Module, factor: float, data: Data) -> nn.Module:
        masked = copy.deepcopy(dense)
        masks = prune_(
            masked, recipe=recipe, target=f"{factor}x fewer macs", data=data.calibration, example=EXAMPLE
        )
        if mended:
            masked = copy.deepcopy(dense)
            mend_units_(masked, masks, data.calibration)
        small = shrink(masked, masks, EXAMPLE)
        return recalibrate_(small, data.calibration) if mended else small

    return make


METHODS: dict[str, Callable[..., nn.Module]] = {
    "torch-pruning, group l2, local": torch_pruning("GroupMagnitudeImportance", False),
    "torch-pruning, group l2, global": torch_pruning("GroupMagnitudeImportance", True),
    "torch-pruning, Taylor, global": torch_pruning("GroupTaylorImportance", True),
    "secateur, l2, per axis": secateur(Recipe(score.l2, INNER), False),
    "secateur, Taylor, global": secateur(Recipe(score.taylor, INNER, globally), False),
    "secateur, Taylor by mean": secateur(Recipe(score.taylor, INNER, Normalised("mean")), False),
    "secateur, l2 by mean, mended": secateur(Recipe(score.l2, INNER, Normalised("mean")), True),
    "secateur, l2, per axis, mended": secateur(Recipe(score.l2, INNER), True),
    "secateur, Taylor, per axis, mended": secateur(Recipe(score.taylor, INNER, per_layer), True),
    "secateur, Taylor, global, mended": secateur(Recipe(score.taylor, INNER, globally), True),
    "secateur, Taylor per cost, mended": secateur(Recipe(score.taylor, INNER, PerCost()), True),
    "secateur, l2 per cost, mended": secateur(Recipe(score.l2, INNER, PerCost(power=0.25)), True),
    "secateur, Taylor by mean, mended": secateur(Recipe(score.taylor, INNER, Normalised("mean")), True),
}  # fmt: skip
TRAINED = (
    "secateur, Taylor per cost, mended",
    "torch-pruning, group l2, local",
    "torch-pruning, group l2, global",
    "torch-pruning, Taylor, global",
    "secateur, Taylor by mean, mended",
    "secateur, l2 by mean, mended",
)


def name_of(method: str, factor: float) -> str:
    return f"{method}, {factor}x" if method != "dense" else method


def accuracy(model: nn.Module, data: Data) -> float:
    return evaluate.accuracy(model, data.test).value


def train(model: nn.Module, data: Data, args: argparse.Namespace, seed: int, checkpoint: Path) -> float:
    """Seconds of processor time."""
    started = time.process_time()
    finetune_(
        model, Augmented(*data.train, seed), loss="single-label", epochs=args.epochs, lr=args.rate, warm_up=0.05,
        seed=seed, weight_decay=5e-4, clip=None, checkpoint=checkpoint,
        optimizer=lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    )  # fmt: skip
    return time.process_time() - started


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def write(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def run(args: argparse.Namespace, file: Path) -> None:
    dense = ResNet(56).eval()
    dense.load_state_dict(load_file(SHARED / "models/cifar10_resnet56_jpegft/model.safetensors"))
    data = read_data(args.images, args.test)
    done = {(p["name"], p["step"]) for p in read(file)}
    models: dict[str, nn.Module] = {"dense": dense}
    for method in ("dense", *args.methods):
        for factor in FACTORS if method != "dense" else (1.0,):
            name, started = name_of(method, factor), time.process_time()
            model = dense if method == "dense" else METHODS[method](dense, factor, data)
            models[name] = model
            if (name, "made") not in done:
                seconds = time.process_time() - started
                line = {"name": name, "step": "made", "macs": macs(model), "accuracy": accuracy(model, data)}
                write(file, line | {"parameters": evaluate.parameters(model).value, "seconds": seconds})
    for name, model in models.items():
        if name != "dense" and not name.startswith(tuple(args.trained)):
            continue
        for seed in args.seeds:
            weights = args.work / f"{name.replace(' ', '_')}-{seed}.safetensors"
            tuned = copy.deepcopy(model)
            if (name, f"trained {seed}") not in done:
                seconds = train(tuned, data, args, seed, weights.with_suffix(".checkpoint"))
                save_file(tuned.state_dict(), weights)
                line = {"name": name, "step": f"trained {seed}", "accuracy": accuracy(tuned.eval(), data)}
                write(file, line | {"seconds": seconds})
    if args.clock and ("dense", "clock 2") not in done:
        clock(
            {name: m for name, m in models.items() if name == "dense" or name.startswith(tuple(args.trained))},
            file,
        )


def clock(models: dict[str, nn.Module], file: Path) -> None:
    """All models in turns, on 1 and 2 threads, one image and 64."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 64):
            pair = evaluate.paired_latency(
                models, torch.randn(batch, 3, 32, 32), repeats=30 if batch == 1 else 15
            )
            for name, found in pair.latency.items():
                ratio = pair.speedup.get(name)
                line = {"name": name, "step": f"clock {threads}", "batch": batch, "ms": found.value}
                spread = None if ratio is None else [ratio.value, ratio.spread.low, ratio.spread.high]
                write(file, line | {"speedup": spread})
    torch.set_num_threads(1)


def table(found: list[dict[str, Any]], seeds: list[int]) -> str:
    steps = {(p["name"], p["step"], p.get("batch")): p for p in found}
    made = [p for p in found if p["step"] == "made"]
    if not made:
        return ""
    whole = made[0]["macs"]
    clocks = [(threads, batch) for threads in (1, 2) for batch in (1, 64)]
    head = ["model", "MACs", "fewer", "parameters", "as made", "trained"]
    head += [f"clock, {threads} thread, batch {batch}" for threads, batch in clocks]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for point in made:
        name = point["name"]
        trained = [p["accuracy"] for s in seeds if (p := steps.get((name, f"trained {s}", None)))]
        cells = [name, f"{point['macs'] / 1e6:.1f} M", f"{whole / point['macs']:.2f}x"]
        cells.append(f"{point['parameters'] / 1e3:.0f} k")
        cells += [f"{point['accuracy']:.2%}", ", ".join(f"{a:.2%}" for a in trained) or "-"]
        for threads, batch in clocks:
            p = steps.get((name, f"clock {threads}", batch))
            times = "" if not p or not p["speedup"] else " {:.2f}x ({:.2f} to {:.2f})".format(*p["speedup"])
            cells.append(f"{p['ms']:.1f} ms{times}" if p else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/resnet"))
    parser.add_argument("--images", type=int, default=4_000, help="training images, the first of the file")
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--trained", nargs="*", default=list(TRAINED), choices=list(METHODS))
    parser.add_argument(
        "--clock", action="store_true", help="measure latency too, of all that is made and trained"
    )
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "points.jsonl"
    if not args.table:
        run(args, file)
    print(table(read(file), args.seeds))


if __name__ == "__main__":
    main()
