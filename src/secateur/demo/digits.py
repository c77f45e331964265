"""The life cycle of a classifier's weights: initial, trained, trained under a threshold, pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur import evaluate, report
from secateur.core.where import select
from secateur.errors import UsageError
from secateur.evaluate import Measurement
from secateur.measure import Tell
from secateur.prune import prune_
from secateur.recipes import threshold
from secateur.training import Thresholding

__all__ = ["Stage", "classifier", "digits", "life_cycle", "train"]

LOOP_TAU = 0.02  # every step of training sets weights this small to zero
TAU = 0.4
EPOCHS = 15


@dataclass(frozen=True)
class Stage:
    """The classifier at one moment of its life."""

    name: str
    size: int
    zeros: int
    accuracy: Measurement
    histograms: dict[str, report.Histogram]


def classifier() -> nn.Module:
    """Two convolutions, a hidden layer and a classification head for images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits as `(images, labels)` for training and for testing, three to one."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UsageError("the digits need scikit-learn: pip install 'secateur[metrics]'") from None
    given = load_digits()
    images = torch.tensor(given.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(given.target)
    rows = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=given.target)
    train_rows, test_rows = (torch.tensor(part) for part in rows)
    return (images[train_rows], labels[train_rows]), (images[test_rows], labels[test_rows])


def train(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, tau: float | None, seed: int
) -> None:
    """Adam; with `tau`, every step ends by setting the weights of magnitude at most tau to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    pruner = Thresholding(model, tau, regrow=True) if tau is not None else None
    for rows in _batches(len(labels), epochs, seed):
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


def _batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(64)


def life_cycle(tell: Tell) -> list[Stage]:
    """Initial, trained, trained with a threshold in the loop, and the trained one pruned at tau."""
    train_set, test_set = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classifier()
    start = copy.deepcopy(model)
    stages = [_stage("initial", model, test_set)]
    tell("training the classifier", 0, 2)
    train(model, *train_set, epochs=EPOCHS, tau=None, seed=0)
    stages.append(_stage("trained", model, test_set))
    tell("training the classifier", 1, 2)
    train(start, *train_set, epochs=EPOCHS, tau=LOOP_TAU, seed=0)
    stages.append(_stage(f"trained, threshold {LOOP_TAU} in the loop", start, test_set))
    tell("training the classifier", 2, 2)
    for tau in (0.05, 0.1, 0.2, TAU):
        pruned = copy.deepcopy(model)
        prune_(pruned, recipe=threshold(tau))
        stages.append(_stage(f"trained, pruned at tau = {tau}", pruned, test_set))
    return stages


def _stage(name: str, model: nn.Module, test_set: tuple[Tensor, Tensor]) -> Stage:
    layers = select(model).chosen
    histograms = {layer.name: report.histogram(layer.weight, name=layer.name) for layer in layers}
    zeros = sum(histogram.zeros for histogram in histograms.values())
    accuracy = evaluate.accuracy(model, [test_set], dataset="digits, held-out quarter")
    return Stage(name, sum(layer.size for layer in layers), zeros, accuracy, histograms)
