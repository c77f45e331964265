"""Units to masks and back: an inverse on whole units, refused with the nearest unit on anything else."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from secateur.core.masks import Masks
from secateur.core.unit_masks import keep_of
from secateur.core.units import Analysis, analyse
from secateur.errors import UsageError


class Attention(nn.Module):
    """Heads in a fused projection, an embedding tied to the output, a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.last = nn.Linear(12, 13, bias=False)
        self.last.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12)
        x = x + self.out(y)
        return self.last(x + self.down(F.relu(self.up(x))))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(Attention().eval(), (torch.randint(0, 13, (2, 5)),))


def test_masks_are_zero_exactly_where_a_unit_of_the_axes_lies(analysis: Analysis) -> None:
    kinds = {units.kind: units.name for units in analysis.units}
    masks = analysis.masks({kinds["head"]: [0, 2], kinds["hidden"]: range(0, 12, 2)})
    qkv = torch.ones(36, 12, dtype=torch.bool)
    for part in range(3):
        qkv[part * 12 + 4 : part * 12 + 8] = False
    qkv[:, 1::2] = False
    assert torch.equal(masks["qkv.weight"], qkv)
    assert set(masks) == {
        "embed.weight", "qkv.weight", "qkv.bias", "out.weight", "out.bias", "up.weight", "down.weight", "down.bias",
    }  # fmt: skip
    assert torch.equal(masks["embed.weight"].any(0), torch.arange(12) % 2 == 0)


@given(data=st.data())
def test_keep_of_is_the_inverse_of_masks(analysis: Analysis, data) -> None:
    keep = {}
    for units in analysis.units:
        kept = data.draw(st.sets(st.integers(0, units.size - 1), min_size=1), label=units.name)
        if len(kept) < units.size:
            keep[units.name] = sorted(kept)
    found = keep_of(analysis, analysis.masks(keep))
    assert {name: index.tolist() for name, index in found.items()} == keep


def test_a_tied_tensor_may_be_masked_under_any_of_its_names(analysis: Analysis) -> None:
    name = next(units.name for units in analysis.units if units.kind == "hidden")
    masks = dict(analysis.masks({name: range(8)}))
    masks["last.weight"] = masks.pop("embed.weight")
    assert keep_of(analysis, Masks(masks))[name].tolist() == list(range(8))
    with pytest.raises(UsageError, match=r"last.weight and embed.weight are one tensor; their masks differ"):
        keep_of(analysis, Masks({**masks, "embed.weight": ~masks["last.weight"]}))


def masks_of_rows(analysis: Analysis, **rows: int) -> Masks:
    masks = {}
    for name, row in rows.items():
        masks[f"{name}.weight"] = torch.ones(analysis.shapes()[f"{name}.weight"], dtype=torch.bool)
        masks[f"{name}.weight"][row] = False
    return Masks(masks)


def test_zeros_that_are_no_whole_units_name_the_layer_and_the_nearest_unit(analysis: Analysis) -> None:
    with pytest.raises(UsageError) as caught:
        keep_of(analysis, masks_of_rows(analysis, up=3))
    assert str(caught.value) == (
        "up.weight: 12 pruned weights, the first at (3, 0), are no whole units; nearest is unit 3 of "
        "'feed-forward units of up, down', of which 12 of 25 weights are pruned, none or not all in up.bias. "
        "Prune whole units: analysis.masks(keep) makes such masks."
    )
    with pytest.raises(UsageError, match=r"embed.weight: 12 pruned weights, the first at \(2, 0\)"):
        keep_of(analysis, masks_of_rows(analysis, last=2))


def test_all_units_gone_is_refused(analysis: Analysis) -> None:
    (units,) = (units for units in analysis.units if units.kind == "feed-forward unit")
    masks = {
        name: torch.zeros(analysis.shapes()[name], dtype=torch.bool)
        for name in ("up.weight", "up.bias", "down.weight")
    }
    with pytest.raises(UsageError, match=re.escape(f"{units.name}: the masks remove all 10 units")):
        keep_of(analysis, Masks(masks))


def test_masks_of_another_model_are_refused(analysis: Analysis) -> None:
    with pytest.raises(
        UsageError, match=r"mask of upp.weight: .* no parameter of that name; nearest: up.weight"
    ):
        keep_of(analysis, Masks({"upp.weight": torch.zeros(3, dtype=torch.bool)}))
    with pytest.raises(UsageError, match=r"mask of up.weight: expected shape \(10, 12\), got \(3,\)"):
        keep_of(analysis, Masks({"up.weight": torch.zeros(3, dtype=torch.bool)}))
    assert keep_of(analysis, Masks({"upp.weight": torch.ones(3, dtype=torch.bool)})) == {}


def test_zeros_in_a_tensor_without_a_prunable_axis() -> None:
    found = analyse(nn.Linear(3, 4), (torch.zeros(2, 3),))
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(
        UsageError, match=r"first at \(1, 2\).*no prunable axis runs through this tensor \(an output"
    ):
        keep_of(found, Masks({"weight": mask}))
