"""How much of a trained classifier is inactive? Neurons under lambda go; parameters against accuracy.

    OMP_NUM_THREADS=1 python bench/lambda_sweep.py

Trains a multilayer perceptron on MNIST (../shared), runs training images through it, averages every neuron's
absolute activation, takes out those at most lambda, and tests what is left: the network without these neurons,
really smaller, not the masked one. Nothing is trained afterwards; "mended" is the same with what the neurons gave taken
over by those that stay (least squares on the training images, no labels). One JSON line for each
(seed, lambda) in WORK/points.jsonl; trained weights stay in WORK, so that a second run only sweeps.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import evaluate
from secateur.core.example import analysis_of
from secateur.core.unit_masks import keep_of
from secateur.core.units import pruned_program
from secateur.prune import prune_
from secateur.recipes import inactive
from secateur.recover import TakeOver

SHARED = Path(__file__).resolve().parents[2] / "shared"
LAMBDAS = (0.0, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.02, 0.05, 0.1)


def images() -> dict[str, tuple[Tensor, Tensor]]:
    """Training and test images as rows in [0, 1], with their digits."""
    with np.load(SHARED / "data/images/mnist.npz", allow_pickle=False) as file:
        names = {"train": ("train_images", "train_labels"), "test": ("test_images", "test_labels")}
        return {
            part: (
                torch.from_numpy(file[x].reshape(-1, 784)).float() / 255,
                torch.from_numpy(file[y].astype(np.int64)),
            )
            for part, (x, y) in names.items()
        }


def network(widths: list[int]) -> nn.Sequential:
    sizes = [784, *widths]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def train_(model: nn.Sequential, x: Tensor, y: Tensor, epochs: int, seed: int, penalty: float) -> None:
    """AdamW with a one-cycle rate; `penalty` times the mean activation keeps neurons quiet that are not needed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for at in torch.randperm(len(x), generator=generator)[: len(x) // 128 * 128].view(-1, 128):
            hidden, loud = x[at], torch.zeros(())
            for layer in model:
                hidden = layer(hidden)
                if isinstance(layer, nn.ReLU):
                    loud = loud + hidden.sum(1).mean()
            optimizer.zero_grad()
            (F.cross_entropy(hidden, y[at]) + penalty * loud).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return right / len(x)


def trained(args: argparse.Namespace, data: dict[str, Any], seed: int) -> nn.Sequential:
    file = args.work / f"mlp-{'-'.join(map(str, args.widths))}-{args.penalty:g}-{args.epochs}-{seed}.pt"
    torch.manual_seed(seed)
    model = network(args.widths)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    train_(model, *data["train"], args.epochs, seed, args.penalty)
    torch.save(model.state_dict(), file)
    return model


def point(model: nn.Sequential, tau: float, data: dict[str, Any]) -> dict[str, Any]:
    """Prune a copy at one lambda and measure the smaller network beside the dense one."""
    pruned, mended = copy.deepcopy(model), copy.deepcopy(model)
    x, y = data["test"]
    example = x[:1000]
    axes, _ = analysis_of(model, example)
    calibration = [(part, None) for part in data["train"][0][:10_000].split(1000)]
    try:
        masks = prune_(pruned, recipe=inactive(tau), data=calibration, example=axes)
    except ValueError:  # nothing lies under this lambda
        keep: dict[str, Tensor] = {}
    else:
        keep = keep_of(axes, masks)
        prune_(mended, recipe=replace(inactive(tau), update=TakeOver()), data=calibration, example=axes)
    small, dense = pruned_program(axes, keep), pruned_program(axes, {})
    speed = evaluate.paired_latency({"dense": dense, "pruned": small}, example, repeats=10, warmup=2)
    return {
        "parameters": axes.parameter_count(keep),
        "of": axes.parameter_count(),
        "neurons": [len(keep.get(units.name, range(units.size))) for units in axes.units],
        "accuracy": accuracy(small, x, y),
        "masked": accuracy(pruned, x, y),
        "mended": accuracy(mended, x, y),
        "speedup": float(speed.speedup["pruned"].value),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "seed",
        "lambda",
        "neurons left",
        "parameters left",
        "gone",
        "test accuracy",
        "against dense",
        "mended",
        "speed-up",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        dense = next(each["accuracy"] for each in rows if each["seed"] == row["seed"])
        lines.append(
            f"| {row['seed']} | {row['lambda']:g} | {' + '.join(map(str, row['neurons']))} | {row['parameters']:,} "
            f"| {1 - row['parameters'] / row['of']:.1%} | {row['accuracy']:.2%} "
            f"| {100 * (row['accuracy'] - dense):+.2f} | {row['mended']:.2%} | {row['speedup']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/lambda"))
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 256])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--penalty", type=float, default=0.001, help="of the activations while training; 0: plain"
    )
    parser.add_argument("--lambdas", nargs="+", type=float, default=list(LAMBDAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(
            "the folder of real data (../shared) is not beside this repository; nothing is measured"
        )
    args.work.mkdir(parents=True, exist_ok=True)
    data, rows = images(), []
    for seed in args.seeds:
        started = time.perf_counter()
        model = trained(args, data, seed)
        print(f"seed {seed}: trained or loaded in {time.perf_counter() - started:.0f} s", flush=True)
        for tau in args.lambdas:
            rows.append({"seed": seed, "lambda": tau, **point(model, tau, data)})
            assert abs(rows[-1]["accuracy"] - rows[-1]["masked"]) < 1e-3, (
                "the smaller network computes something else"
            )
            with (args.work / "points.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps({"penalty": args.penalty, "epochs": args.epochs} | rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
