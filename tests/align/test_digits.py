"""Does it do what it is for? A small network on real digits, pruned to 70 %, searched in the dense network's index."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur import align, prune_
from secateur.align import Embeddings

datasets = pytest.importorskip("sklearn.datasets")


class Network(nn.Module):
    """Vectors of 32 numbers, and classes from them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)
        )
        self.classify = nn.Linear(32, 10)

    def forward(self, x):
        return self.classify(self.embed(x).relu())


@pytest.fixture(scope="module")
def spaces() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The dense embedding network, a pruned copy, and the images."""
    given = datasets.load_digits()
    x, y = torch.tensor(given.data, dtype=torch.float32) / 16, torch.tensor(given.target)
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    pruned = copy.deepcopy(network.embed)
    prune_(pruned, 0.7, only="all")
    order = torch.randperm(len(x))
    return network.embed, pruned, x[order]


def test_a_map_finds_the_original_neighbours_better_than_a_new_index(spaces):
    dense, pruned, x = spaces
    with torch.no_grad():
        source, target = Embeddings(pruned(x), "pruned"), Embeddings(dense(x), "original")
    held, fitted = slice(0, 400), slice(400, None)

    def judged(map: align.Affine) -> align.Advice:
        return align.advise(map, source[held], target[held])

    ridge, rotated = (
        align.ridge(source[fitted], target[fitted]),
        align.procrustes(source[fitted], target[fitted]),
    )
    best, worse = judged(ridge), judged(rotated)
    print(f"overlap@10: none {best.raw:.3f}, Procrustes {worse.mapped:.3f}, ridge {best.mapped:.3f}", end=", ")
    print(f"new index {best.reindexed:.3f}")
    assert best.raw < worse.mapped < best.mapped
    assert best.mapped > best.reindexed + 2 * best.error
    assert best.keeps_index
    assert judged(align.cca(source[fitted], target[fitted]).across).mapped > worse.mapped
    folded = copy.deepcopy(pruned)
    assert align.fold_(folded, ridge, x[:64]) == "4"
    with torch.no_grad():
        alone = Embeddings(folded(x), "original")
    truth = align.neighbours(target[held], target[held], exclude_self=True)
    found = align.neighbours(alone[held], target[held], exclude_self=True)
    assert float(align.overlap(found, truth).mean()) == pytest.approx(best.mapped, abs=0.002)
