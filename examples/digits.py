"""The model and the data of experiment.yaml: functions without arguments, called by `secateur run --allow-code`."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn


def build():
    """A model that starts at random, and an example of its input."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)), torch.zeros(1, 64)


def _batches(first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[first:last]
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return list(zip(x.split(32), y.split(32), strict=True))


def train():
    """Batches to learn from; a tenth of them is held out by secateur and chooses the epoch."""
    return _batches(0, 1300)


def test():
    """Batches to be judged by, after every stage."""
    return _batches(1300, 1797)


if __name__ == "__main__":
    print(f"{len(train())} batches to learn from, {len(test())} to be judged by")
