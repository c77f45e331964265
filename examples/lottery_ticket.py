"""Lottery ticket: train, prune, rewind to the first weights, again; then a random ticket of equal sparsity.

Frankle and Carbin 2019 on scikit-learn's digits, each run with equally many steps.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from secateur import geometric, hold_, magnitude, prune_, rewind_

STEPS, ROUNDS, SPARSITY = 200, 4, 0.97

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1300], order[1300:]


def fit(model, masks=None):
    """A new optimizer every time: momentum belongs to weights that are gone."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    hold = hold_(model, masks, optimizer) if masks is not None else None
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    if hold is not None:
        hold.remove()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
start = copy.deepcopy(model.state_dict())  # a copy: state_dict() alone is the weights themselves
masks = None
print(f"dense            {fit(model):.1%}")
for sparsity in geometric(rounds=ROUNDS, end=SPARSITY):
    masks = prune_(model, sparsity, magnitude, masks=masks)
    rewind_(model, start, masks)
    print(f"ticket at {masks.sparsity:.1%}  {fit(model, masks):.1%}")

control = masks.shuffled(seed=0)  # as many weights of every layer, elsewhere
rewind_(model, start, control)
print(f"random at {control.sparsity:.1%}  {fit(model, control):.1%}")
assert control.zeros == masks.zeros
