"""Models that cannot be exported as a whole: their parts are made smaller, and their borders stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur import Masks, shrink, shrunk
from secateur.core.axes.blocks import analyse_blocks
from secateur.core.units import analyse
from secateur.errors import UsageError

from .nets import masked


class Branching(nn.Module):
    """A forward that looks at values, around blocks that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 7))
        self.second = nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 7, bias=False))
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x - self.second(x) if x.sum() > 0 else x + self.second(x))


class Stubborn(nn.Module):
    """Looks at values where its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if x.sum() > 0 else x


@pytest.fixture
def branching() -> tuple[nn.Module, Tensor, Masks]:
    """The model, inputs, and masks of five of its first units and six of its second."""
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(4, 7)
    kept = {}
    for path, analysis in analyse_blocks(model, (x,)).analyses.items():
        for units in analysis.units:
            masks = analysis.masks({units.name: range(1, units.size, 2)})
            kept |= {f"{path}.{name}": mask for name, mask in masks.items()}
    return model, x, Masks(kept)


def test_the_parts_of_a_model_that_cannot_be_exported_are_made_smaller(branching) -> None:
    model, x, masks = branching
    with pytest.raises(UsageError, match="analyse_blocks"):
        analyse(model, (x,))
    small = shrink(model, masks, x)
    assert [small.first[0].out_features, small.second[0].out_features] == [6, 5]
    wanted = masked(model, masks)
    for inputs in (x, -x, torch.randn(9, 7)):
        torch.testing.assert_close(small(inputs), wanted(inputs), rtol=1e-5, atol=1e-6)
    note = shrunk(small)
    assert {axis.name for axis in note.axes} == {
        "first: feed-forward units of 0,2",
        "second: feed-forward units of 0,2",
    }
    assert [(axis.kept, axis.size, axis.exact) for axis in note.axes] == [(6, 12, True), (5, 10, True)]


def test_the_borders_of_parts_cannot_be_cut(branching) -> None:
    model, x, _ = branching
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 2] = False
    with pytest.raises(UsageError) as told:
        shrink(model, Masks({"last.weight": mask}), x)
    assert "weight" in str(told.value)


def test_what_has_no_part_that_can_be_exported_is_refused_with_the_tracers_words() -> None:
    model = Stubborn()
    with pytest.raises(UsageError, match=r"torch\.export cannot trace the forward"):
        shrink(model, {"anything": [0]}, torch.randn(2, 7))
