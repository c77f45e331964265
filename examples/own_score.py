"""A score of your own is a function; the names of its arguments say which statistics it needs.

Trains a small classifier of scikit-learn's digits, prunes it to 80 % by three scores, and prints what each costs.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from secateur import Recipe, magnitude, per_row, prune_, wanda


def squared_times_input(weight, input_norm):
    """Wanda's score, squared: the same order of weights, so the same masks."""
    return (weight * input_norm) ** 2


def accuracy(model):
    with torch.no_grad():
        return (model(test).argmax(1) == test_labels).float().mean().item()


torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = images[order[:1400]], images[order[1400:]]
train_labels, test_labels = labels[order[:1400]], labels[order[1400:]]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(train), train_labels).backward()
    optimizer.step()
print(f"dense                {accuracy(model):.1%}")

masks = {}
mine = Recipe(squared_times_input, allocate=per_row)
for name, recipe in {"magnitude": magnitude, "Wanda": wanda, "squared_times_input": mine}.items():
    pruned = copy.deepcopy(model)
    masks[name] = prune_(pruned, 0.8, recipe, data=[train[:256]])
    print(f"{name:20} {accuracy(pruned):.1%}  {masks[name]}")
assert masks["squared_times_input"] == masks["Wanda"]
