"""Exactly so many non-zeros, undone again, and what is refused instead of guessed."""

import torch
from torch import nn

import secateur
from secateur import global_magnitude, prune_, sparsity, undo_

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
before = {name: value.clone() for name, value in model.state_dict().items()}

masks = prune_(model, recipe=global_magnitude, nonzero=2_000, keep_originals=True)
print(sparsity(model))
assert sum(int(p.count_nonzero()) for p in model.parameters()) == 2_000

undo_(model, masks)
assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

for mistake in ({"sparsity": 50}, {"sparsity": 0.5, "only": "0.wieght"}, {"nonzero": 10**9}):
    try:
        prune_(model, **mistake)
    except secateur.errors.UsageError as error:
        print(f"{mistake}: {error}")
