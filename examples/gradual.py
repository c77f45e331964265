"""Prune while training: 90 % of a classifier's weights go, a few at a time, and the rest learn to do without them.

The same number of steps is spent three ways on scikit-learn's digits: dense, pruned at once after training, gradually.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from secateur import Gradual, cubic, magnitude, prune_

STEPS, SPARSITY = 600, 0.95

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1300], order[1300:]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def fit(model, optimizer, pruner=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()  # zeros stay exactly zero here: momentum and weight decay cannot move them
        if pruner is not None:
            pruner.step()  # prunes when due


@torch.no_grad()
def accuracy(model):
    return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


dense = classifier()
fit(dense, torch.optim.AdamW(dense.parameters(), 2e-3, weight_decay=0.01))
at_once = copy.deepcopy(dense)
prune_(at_once, SPARSITY)

slowly = classifier()
optimizer = torch.optim.AdamW(slowly.parameters(), 2e-3, weight_decay=0.01)
pruner = Gradual(slowly, magnitude, cubic(0.0, SPARSITY), 100, 400, 10, optimizer=optimizer)
fit(slowly, optimizer, pruner)

print(f"dense                      {accuracy(dense):.1%}")
print(f"pruned at once to {SPARSITY:.0%}      {accuracy(at_once):.1%}")
print(f"gradually, same training   {accuracy(slowly):.1%}   {pruner.masks}")
assert pruner.done
assert all((p[~pruner.masks[n]] == 0).all() for n, p in slowly.named_parameters() if n in pruner.masks)
