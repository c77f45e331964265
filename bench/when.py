"""When to prune: at once, gradually or as a lottery ticket, with equal training budget, on a CNN and a text classifier.

    OMP_NUM_THREADS=1 python bench/when.py --work runs/when            # resumable: every finished run is a line on disk
    OMP_NUM_THREADS=1 python bench/when.py --work runs/when --task text --steps 400

ResNet-20 starts from its trained weights (../shared) and has 100 steps of 64 images from the first 10,000 of the
training set. The text classifier (a bag of embeddings with one hidden layer) starts at random and learns SST-2
sentences in 600 steps of 128; its layers are pruned alike, because magnitudes of embeddings and of linear layers do not
compare, where those of the ResNet compete. Every method spends the same number of steps:

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
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Gradual, Masks, Recipe, cubic, evaluate, geometric, hold_, prune_, rewind_
from secateur.recipes import global_magnitude, magnitude

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """What is learned, from what, and how."""

    make: Callable[[int], nn.Module]
    train: Pair
    test: Pair
    rate: float
    batch: int
    steps: int
    only: list[str] | None
    recipe: Recipe


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


NAMES = ("task", "budget", "method", "sparsity", "seed")


def text(shared: Path) -> Data:
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

    def tensors(given: list[tuple[str, int]]) -> Pair:
        ids = torch.zeros(len(given), 48, dtype=torch.long)
        for row, (sentence, _) in enumerate(given):
            known = [number[word] for word in sentence.lower().split() if word in number][:48]
            ids[row, : len(known)] = torch.tensor(known, dtype=torch.long)
        return ids, torch.tensor([label for _, label in given])

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Bag(len(number) + 1)

    return Data(make, tensors(train), tensors(test), 2e-3, 128, 600, ["all", "embedding"], magnitude)


def cifar(shared: Path) -> Data:
    from cifar import ResNet, images
    from safetensors.torch import load_file

    weights = load_file(shared / "models" / "cifar10_resnet20_jpegft" / "model.safetensors")

    def make(seed: int) -> nn.Module:
        model = ResNet(20)
        model.load_state_dict(weights)
        return model.to(memory_format=torch.channels_last)

    folder = shared / "data" / "images"
    ((train, labels),) = images(folder / "cifar10_jpeg_train.parquet", 10_000, 10_000)
    ((test, wanted),) = images(folder / "cifar10_jpeg_test.parquet", 2_000, 2_000)
    return Data(make, (train, labels), (test, wanted), 5e-4, 64, 100, None, global_magnitude)


def fit(model: nn.Module, data: Data, steps: int, seed: int, attach: Callable | None = None) -> None:
    """AdamW with a cosine to zero; `attach(optimizer)` gives what steps after it."""
    optimizer = torch.optim.AdamW(model.parameters(), data.rate, weight_decay=1e-4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    pruner = None if attach is None else attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = data.train
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (data.batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        falling.step()
        if pruner is not None:
            pruner.step()
    if pruner is not None:
        pruner.remove()


def holding(model: nn.Module, masks: Masks) -> Callable:
    return lambda optimizer: hold_(model, masks, optimizer)


class Budget:
    """The ways to spend one budget from one start; what several of them begin with is trained once.

    Args:
        data: what is learned.
        start: the model before.
        steps: of every way.
        seed: of the order of the examples.
    """

    def __init__(self, data: Data, start: nn.Module, steps: int, seed: int):
        self.data, self.start, self.steps, self.seed = data, start, steps, seed
        self.trained = cache(self._trained)
        self.ticket_masks = cache(self._ticket_masks)

    def _trained(self, steps: int) -> nn.Module:
        """The dense model after so many steps."""
        model = copy.deepcopy(self.start)
        fit(model, self.data, steps, self.seed)
        return model

    def dense(self, sparsity: float) -> nn.Module:
        return self.trained(self.steps)

    def one_shot(self, sparsity: float) -> nn.Module:
        model = copy.deepcopy(self.trained(self.steps // 2))
        masks = prune_(model, sparsity, self.data.recipe, only=self.data.only)
        left = self.steps - self.steps // 2
        fit(model, self.data, left, self.seed + 100, holding(model, masks))
        return model

    def gradual(self, sparsity: float) -> nn.Module:
        model = copy.deepcopy(self.start)
        begin, every = self.steps // 10, max(1, self.steps // 50)
        end = begin + every * (self.steps * 6 // 10 // every)
        schedule = cubic(0.0, sparsity)

        def attach(optimizer: torch.optim.Optimizer) -> Gradual:
            return Gradual(
                model,
                self.data.recipe,
                schedule,
                begin,
                end,
                every,
                optimizer=optimizer,
                only=self.data.only,
            )

        fit(model, self.data, self.steps, self.seed, attach)
        return model

    def _ticket_masks(self, sparsity: float) -> Masks:
        """Three rounds of a quarter of the budget, each pruned and rewound."""
        model, masks = copy.deepcopy(self.start), None
        for number, share in enumerate(geometric(rounds=3, end=sparsity)):
            if masks is None:
                model = copy.deepcopy(self.trained(self.steps // 4))
            else:
                fit(model, self.data, self.steps // 4, self.seed + number, holding(model, masks))
            masks = prune_(model, share, self.data.recipe, masks=masks, only=self.data.only)
            rewind_(model, self.start, masks)
        assert masks is not None
        return masks

    def ticket(self, sparsity: float) -> nn.Module:
        return self._last_round(self.ticket_masks(sparsity))

    def random(self, sparsity: float) -> nn.Module:
        return self._last_round(self.ticket_masks(sparsity).shuffled(self.seed))

    def _last_round(self, masks: Masks) -> nn.Module:
        model = copy.deepcopy(self.start)
        masks.apply_(model)
        left = self.steps - 3 * (self.steps // 4)
        fit(model, self.data, left, self.seed + 3, holding(model, masks))
        return model


METHODS = {
    "dense": Budget.dense,
    "one-shot": Budget.one_shot,
    "gradual": Budget.gradual,
    "ticket": Budget.ticket,
    "random": Budget.random,
}


def measured(model: nn.Module, test: Pair) -> float:
    model.eval()
    return evaluate.accuracy(model, list(zip(test[0].split(250), test[1].split(250), strict=True))).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--work", type=Path, default=Path("runs/when"))
    parser.add_argument("--task", nargs="+", choices=["text", "cifar"], default=["text", "cifar"])
    parser.add_argument("--steps", type=int, default=None, help="default 600 for text, 100 for cifar")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {tuple(r[name] for name in NAMES): r["accuracy"] for r in done}
    for task in args.task:
        data = {"text": text, "cifar": cifar}[task](args.shared)
        steps = args.steps or data.steps
        began = time.process_time()
        for seed in args.seeds:
            budget = Budget(data, data.make(seed), steps, seed)
            for sparsity in args.sparsities:
                for method, spend in METHODS.items():
                    key = (task, steps, method, 0.0 if method == "dense" else sparsity, seed)
                    if key in known:
                        continue
                    known[key] = measured(spend(budget, sparsity), data.test)
                    line = dict(zip(NAMES, key, strict=True)) | {"accuracy": known[key]}
                    print(line, flush=True)
                    with open(path, "a") as file:
                        file.write(json.dumps(line) + "\n")
        show(known, task, steps, data.batch, args)
        print(f"\n{time.process_time() - began:.0f} CPU-s in this process\n")


def show(known: dict, task: str, budget: int, batch: int, args: argparse.Namespace) -> None:
    print(
        f"{task}: {budget} steps of {batch}, test accuracy, mean +- standard deviation over seeds {args.seeds}\n"
    )
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
