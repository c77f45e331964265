"""Wanda, RIA and magnitude against the published algorithms, written here from their descriptions in plain loops.

Wanda: Sun, Liu, Bair, Kolter 2024, equation 1 and algorithm 1. RIA: Zhang et al. 2024, equations 2 and 3. The
published programs differ from secateur in three ways, each shown below: they round counts down (or take one
too many) in every row or layer, and they count padding.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from secateur import NM, magnitude, per_layer, per_row, prune_, ria, wanda


class Reference:
    """What the published program knows of a layer: a running mean, over samples, of squared column norms."""

    def __init__(self, columns: int):
        self.scaler, self.samples = np.zeros(columns), 0

    def add(self, sample: torch.Tensor) -> None:
        """One sample of `(token, in)`; all its tokens count, padding too."""
        self.scaler *= self.samples / (self.samples + 1)
        self.samples += 1
        self.scaler += np.square(sample.double().numpy()).sum(0) / self.samples

    def wanda(self, weight: torch.Tensor) -> np.ndarray:
        return np.abs(weight.detach().double().numpy()) * np.sqrt(self.scaler)

    def ria(self, weight: torch.Tensor) -> np.ndarray:
        size = np.abs(weight.detach().double().numpy())
        score = np.empty_like(size)
        for i in range(size.shape[0]):
            for j in range(size.shape[1]):
                score[i, j] = size[i, j] / size[:, j].sum() + size[i, j] / size[i, :].sum()
        return score * np.sqrt(self.scaler) ** 0.5


def lowest_of_each(scores: np.ndarray, count: int) -> torch.Tensor:
    """Marked: of every row the `count` first in a stable ascending sort."""
    marked = np.zeros(scores.shape, dtype=bool)
    for row, line in enumerate(scores):
        for column in sorted(range(len(line)), key=lambda j: line[j])[:count]:
            marked[row, column] = True
    return torch.from_numpy(marked)


def network(columns: int = 16, hidden: int = 20, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, 12))


def samples(columns: int, count: int = 5) -> list[torch.Tensor]:
    """Of different lengths, and of columns that differ in loudness as activations do."""
    loudness = torch.logspace(-1, 1.5, columns)
    return [torch.randn(3 + 2 * i, columns) * loudness for i in range(count)]


def references(model: nn.Sequential, data: list[torch.Tensor]) -> dict[str, Reference]:
    """One dense pass over the block, as the published program makes for every block."""
    known = {"0.weight": Reference(model[0].in_features), "2.weight": Reference(model[2].in_features)}
    for sample in data:
        known["0.weight"].add(sample)
        known["2.weight"].add(torch.relu(model[0](sample)).detach())
    return known


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("amount", [0.25, 0.5, 0.75])
def test_wanda_agrees_where_rows_can_be_cut_exactly(amount, seed):
    model = network(seed=seed)
    data = samples(16)
    known = references(model, data)
    expected = {
        name: lowest_of_each(r.wanda(model.get_parameter(name)), int(r.scaler.size * amount))
        for name, r in known.items()
    }
    masks = prune_(model, amount, wanda, data=data)
    assert {name: torch.equal(~masks[name], marked) for name, marked in expected.items()} == dict.fromkeys(
        masks, True
    )
    for name, marked in expected.items():
        assert torch.equal(model.get_parameter(name) == 0, marked)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 4)])
def test_wanda_n_of_m_agrees(kept, of, seed):
    model = network(seed=seed)
    data = samples(16)
    known = references(model, data)
    expected = {}
    for name, reference in known.items():
        scores = reference.wanda(model.get_parameter(name))
        groups = lowest_of_each(scores.reshape(-1, of), of - kept)  # the published program counts zeros
        expected[name] = groups.reshape(scores.shape)
    masks = prune_(model, recipe=replace(wanda, pattern=NM(kept, of)), data=data)
    assert all(torch.equal(~masks[name], marked) for name, marked in expected.items())


@pytest.mark.parametrize(
    ("columns", "amount", "theirs", "ours"), [(7, 0.5, 3, 3.5), (100, 0.29, 28, 29), (10, 0.33, 3, 3.3)]
)
def test_where_a_row_cannot_be_cut_exactly_the_total_is_exact_and_the_order_is_the_same(
    columns, amount, theirs, ours
):
    """The published program rounds down in every row; trap 1."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, 10)
    data = samples(columns)
    reference = Reference(columns)
    for sample in data:
        reference.add(sample)
    assert int(columns * amount) == theirs
    marked = lowest_of_each(reference.wanda(layer.weight), theirs)
    one_more = lowest_of_each(reference.wanda(layer.weight), theirs + 1)
    pruned = ~prune_(layer, amount, wanda, data=data)["weight"]
    assert int(pruned.sum()) == ours * 10 != int(marked.sum())
    assert not bool((marked & ~pruned).any())
    assert not bool((pruned & ~one_more).any())


def test_padding_is_counted_there_and_not_here():
    """Trap 10."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    texts = [torch.randn(n, 8) for n in (2, 9)]
    padded = torch.full((2, 9, 8), 0.0)
    padded[..., 3] = 50.0  # what the embedding of a padding token may look like
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    real = torch.tensor([[1] * 2 + [0] * 7, [1] * 9])
    with_padding, without = Reference(8), Reference(8)
    for row, text in enumerate(texts):
        with_padding.add(padded[row])
        without.add(text)
    weight = layer.weight.detach().clone()
    masks = prune_(Taking(layer), 0.5, wanda, data=[{"x": padded, "attention_mask": real}])
    assert torch.equal(~masks["layer.weight"], lowest_of_each(without.wanda(weight), 4))
    assert not torch.equal(~masks["layer.weight"], lowest_of_each(with_padding.wanda(weight), 4))


class Taking(nn.Module):
    """A layer that is given an attention mask."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, attention_mask):
        return self.layer(x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("allocate", [per_layer, per_row])
def test_ria_agrees(allocate, seed):
    """The published default compares within the layer, an option of it within the row."""
    model = network(seed=seed)
    data = samples(16)
    known = references(model, data)
    expected = {}
    for name, reference in known.items():
        scores = reference.ria(model.get_parameter(name))
        rows = scores if allocate is per_row else scores.reshape(1, -1)
        expected[name] = lowest_of_each(rows, rows.shape[1] // 2).reshape(scores.shape)
    masks = prune_(model, 0.5, replace(ria, allocate=allocate), data=data)
    assert all(torch.equal(~masks[name], marked) for name, marked in expected.items())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_magnitude_per_layer_agrees_but_for_the_one_that_the_published_threshold_takes_too_many(amount, seed):
    """Trap 3: `|w| <= sorted[int(n * sparsity)]` prunes n * sparsity + 1 weights, and fails at sparsity 1."""
    model = network(seed=seed)
    before = {name: model.get_parameter(name).detach().abs().clone() for name in ("0.weight", "2.weight")}
    masks = prune_(model, amount, magnitude)
    for name, size in before.items():
        ordered = sorted(size.flatten().tolist())
        cut = round(len(ordered) * amount)
        assert len(ordered) * amount == pytest.approx(cut)  # whole, so that both are asked for the same
        assert torch.equal(~masks[name], size < ordered[cut])
        theirs = size <= ordered[cut]
        assert int(theirs.sum()) == cut + 1
        assert not bool((~masks[name] & ~theirs).any())


def test_sparsity_one_empties_every_layer():
    """Trap 3, its other half."""
    assert prune_(network(), 1.0, magnitude).nonzeros == 0
    assert prune_(network(), 1.0, wanda, data=samples(16)).nonzeros == 0
