"""When to prune: at once, gradually or as a lottery ticket, with equal training budget, on a CNN and a text classifier.

    OMP_NUM_THREADS=1 python bench/when.py --work runs/when            # resumable: every finished run is a line on disk
    OMP_NUM_THREADS=1 python bench/when.py --work runs/when --task text --budget 400

ResNet-20 starts from its trained weights (../shared) and has `--budget` steps of 128 images from the first 10,000 of
the training set. The text classifier (a bag of embeddings with one hidden layer) starts at random and learns SST-2
sentences. Every method spends the same number of steps:

    one-shot   dense half of the budget, prune, train the other half with the zeros held
    gradual    cubic from 10 % to 70 % of the budget
    ticket     three rounds of a quarter of the budget, each pruned and rewound to the start, then the last quarter
    random     as many weights of every layer as the ticket, elsewhere, trained as long as its last round

A ticket is therefore trained for a quarter of the budget after its last rewinding: that is what equal budget means.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Gradual, cubic, evaluate, geometric, global_magnitude, hold_, prune_, rewind_

METHODS = ("dense", "one-shot", "gradual", "ticket", "random")
Data = tuple[Tensor, Tensor]


class Bag(nn.Module):
    """The mean of word embeddings, a hidden layer, two classes."""

    def __init__(self, words: int):
        super().__init__()
        self.embedding = nn.Embedding(words, 64, padding_idx=0)
        self.hidden, self.head = nn.Linear(64, 256), nn.Linear(256, 2)

    def forward(self, ids: Tensor) -> Tensor:
        real = (ids != 0).float()[:, :, None]
        mean = (self.embedding(ids) * real).sum(1) / real.sum(1).clamp(min=1)
        return self.head(F.relu(self.hidden(mean)))


def text(shared: Path) -> tuple[Callable[[int], nn.Module], Data, Data, float, str]:
    def rows(name: str) -> list[tuple[str, int]]:
        with open(shared / "data" / "classification" / f"sst2_sentences_{name}.tsv", encoding="utf-8") as file:
            found = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [(row[0], int(row[1])) for row in found if row[1].isdigit()]

    train, test = rows("train"), rows("test")
    counted: dict[str, int] = {}
    for sentence, _ in train:
        for word in sentence.lower().split():
            counted[word] = counted.get(word, 0) + 1
    number = {word: k + 1 for k, word in enumerate(w for w, n in counted.items() if n > 1)}

    def tensors(given: list[tuple[str, int]]) -> Data:
        ids = torch.zeros(len(given), 48, dtype=torch.long)
        for row, (sentence, _) in enumerate(given):
            known = [number[word] for word in sentence.lower().split() if word in number][:48]
            ids[row, : len(known)] = torch.tensor(known, dtype=torch.long)
        return ids, torch.tensor([label for _, label in given])

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Bag(len(number) + 1)

    return make, tensors(train), tensors(test), 2e-3, "all"


def cifar(shared: Path) -> tuple[Callable[[int], nn.Module], Data, Data, float, str]:
    from cifar import ResNet, images
    from safetensors.torch import load_file

    weights = load_file(shared / "models" / "cifar10_resnet20_jpegft" / "model.safetensors")

    def make(seed: int) -> nn.Module:
        model = ResNet(20)
        model.load_state_dict(weights)
        return model

    folder = shared / "data" / "images"
    ((train, labels),) = images(folder / "cifar10_jpeg_train.parquet", 10_000, 10_000)
    ((test, wanted),) = images(folder / "cifar10_jpeg_test.parquet", 2_000, 2_000)
    return make, (train, labels), (test, wanted), 5e-4, "default"


def fit(model: nn.Module, data: Data, steps: int, rate: float, seed: int, attach: Callable) -> None:
    """AdamW with a cosine to zero; `attach(optimizer)` gives what steps after it, or None."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    pruner = attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data[1]), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
        falling.step()
        if pruner is not None:
            pruner.step()
    if pruner is not None:
        pruner.remove()


def trained(
    method: str,
    model: nn.Module,
    data: Data,
    sparsity: float,
    budget: int,
    rate: float,
    seed: int,
    only: str | None,
) -> None:
    """Spend the budget; the model is pruned to `sparsity` in the end, the dense one is not."""
    start = copy.deepcopy(model.state_dict())
    if method == "dense":
        fit(model, data, budget, rate, seed, lambda _: None)
    elif method == "one-shot":
        fit(model, data, budget // 2, rate, seed, lambda _: None)
        masks = prune_(model, sparsity, global_magnitude, only=only)
        fit(
            model,
            data,
            budget - budget // 2,
            rate,
            seed + 100,
            lambda optimizer: hold_(model, masks, optimizer),
        )
    elif method == "gradual":
        every = max(1, budget // 50)
        begin, end = budget // 10, budget // 10 + every * (budget * 6 // 10 // every)
        made = lambda optimizer: Gradual(  # noqa: E731
            model, global_magnitude, cubic(0.0, sparsity), begin, end, every, optimizer=optimizer, only=only
        )
        fit(model, data, budget, rate, seed, made)
    else:
        masks = None
        for number, share in enumerate(geometric(rounds=3, end=sparsity)):
            held = masks
            attach = (lambda _: None) if held is None else (lambda o, m=held: hold_(model, m, o))
            fit(model, data, budget // 4, rate, seed + number, attach)
            masks = prune_(model, share, global_magnitude, masks=masks, only=only)
            rewind_(model, start, masks)
        assert masks is not None
        if method == "random":
            masks = masks.shuffled(seed)
            rewind_(model, start, masks)
        last = masks
        fit(model, data, budget - 3 * (budget // 4), rate, seed + 3, lambda o: hold_(model, last, o))


def measured(model: nn.Module, test: Data) -> float:
    model.eval()
    return evaluate.accuracy(model, list(zip(test[0].split(250), test[1].split(250), strict=True))).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--work", type=Path, default=Path("runs/when"))
    parser.add_argument("--task", nargs="+", choices=["text", "cifar"], default=["text", "cifar"])
    parser.add_argument("--budget", type=int, default=None, help="steps; default 600 for text, 120 for cifar")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(r["task"], r["budget"], r["method"], r["sparsity"], r["seed"]): r["accuracy"] for r in done}
    for task in args.task:
        budget = args.budget or {"text": 600, "cifar": 120}[task]
        make, train, test, rate, where = {"text": text, "cifar": cifar}[task](args.shared)
        only = None if where == "default" else ["all", "embedding"]
        began = time.process_time()
        for seed in args.seeds:
            for sparsity in args.sparsities:
                for method in METHODS:
                    key = (task, budget, method, 0.0 if method == "dense" else sparsity, seed)
                    if key in known:
                        continue
                    model = make(seed)
                    trained(method, model, train, sparsity, budget, rate, seed, only)
                    known[key] = measured(model, test)
                    names = ("task", "budget", "method", "sparsity", "seed")
                    with open(path, "a") as file:
                        file.write(
                            json.dumps({**dict(zip(names, key, strict=True)), "accuracy": known[key]}) + "\n"
                        )
        show(known, task, budget, args)
        print(f"\n{time.process_time() - began:.0f} CPU-s in this process\n")


def show(known: dict, task: str, budget: int, args: argparse.Namespace) -> None:
    print(f"{task}: {budget} steps of 128, test accuracy, mean +- standard deviation over seeds {args.seeds}\n")
    print("| method | " + " | ".join(f"{s:.0%}" for s in args.sparsities) + " |")
    print("|---|" + "---|" * len(args.sparsities))
    for method in METHODS:
        cells = []
        for sparsity in args.sparsities:
            keys = [(task, budget, method, 0.0 if method == "dense" else sparsity, seed) for seed in args.seeds]
            values = [100 * known[key] for key in keys]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} +- {spread:.2f}")
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
