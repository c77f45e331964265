"""What blocks do to the stream, against the definition; padding, shapes, convolutions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.core.depth import series
from secateur.core.passage import passages
from secateur.errors import NumericError, UsageError


class Block(nn.Module):
    def __init__(self, width: int, out: int | None = None):
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, out or width)

    def forward(self, stream):
        y = self.down(torch.relu(self.up(stream)))
        return (y + stream if y.shape == stream.shape else y, "something else")


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, inputs, attention_mask=None):
        for block in self.blocks:
            inputs = block(stream=inputs)[0]
        return inputs


def streams(model, x):
    found = [x]
    for block in model.blocks:
        found.append(block(stream=found[-1])[0])
    return found


@pytest.mark.parametrize("span", [1, 2, 3])
def test_cosine_and_angle_are_those_of_the_definition(span):
    model, data = Net(*[Block(6) for _ in range(3)]), [torch.randn(4, 5, 6), torch.randn(2, 6)]
    found = passages(model, series(model), data, span=span)["blocks"]
    with torch.no_grad():
        every = [streams(model, x) for x in data]
        for start in range(4 - span):
            cosines = torch.cat(
                [F.cosine_similarity(s[start], s[start + span], dim=-1).flatten() for s in every]
            ).double()
            assert math.isclose(found["cosine"][start], cosines.mean(), rel_tol=1e-5)
            assert math.isclose(found["angle"][start], (cosines.acos() / math.pi).mean(), rel_tol=1e-4)
    assert len(found["cosine"]) == 4 - span


def test_padding_does_not_count():
    model, x = Net(Block(6), Block(6)), torch.randn(3, 5, 6)
    padded = torch.cat([x, torch.randn(3, 2, 6)], dim=1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[:, 5:] = 0
    plain = passages(model, series(model), [x])["blocks"]
    told = passages(model, series(model), [{"inputs": padded, "attention_mask": mask}])["blocks"]
    torch.testing.assert_close(plain["cosine"], told["cosine"])


def test_the_channels_of_images_are_one_vector_a_pixel():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model = nn.Sequential(nn.ModuleList([block])[0], nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    x = torch.randn(2, 4, 3, 3)
    found = passages(model, series(model), [x])[""]
    with torch.no_grad():
        expected = F.cosine_similarity(x, block(x), dim=1).mean()
    assert math.isclose(found["cosine"][0], expected, rel_tol=1e-5)


def test_a_run_that_changes_the_shape_has_no_answer():
    model = Net(Block(6), Block(6, 8), Block(8))
    found = passages(model, series(model), [torch.randn(2, 3, 6)])["blocks"]
    assert found["cosine"].isnan().tolist() == [False, True, False]
    assert found["angle"].isnan().tolist() == [False, True, False]


def test_the_model_notices_nothing():
    model = Net(Block(6), Block(6)).train()
    state = torch.get_rng_state()
    passages(model, series(model), [torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))])
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_words_for_what_cannot_be_compared():
    model = Net(Block(6), Block(6))
    lists = series(model)
    with pytest.raises(UsageError, match="data holds no batch; comparing blocks needs at least one"):
        passages(model, lists, [])
    with pytest.raises(UsageError, match="data is one batch"):
        passages(model, lists, {"inputs": torch.randn(2, 6)})
    with pytest.raises(NumericError, match=r"blocks\.0: NaN or Inf in what it reads or writes"):
        passages(model, lists, [torch.full((2, 6), float("nan"))])
    twice = Net(Block(6), Block(6))
    twice.forward = lambda inputs: twice.blocks[1](twice.blocks[1](inputs)[0])
    with pytest.raises(UsageError, match=r"blocks\.1 is used several times in one pass"):
        passages(twice, series(twice), [torch.randn(2, 6)])
    twice.forward = lambda inputs: twice.blocks[0](inputs)
    with pytest.raises(UsageError, match=r"blocks\.1: no calibration token reached this block"):
        passages(twice, series(twice), [torch.randn(2, 6)])
    mute = Net(Block(6), Block(6))
    for block in mute.blocks:
        block.forward = lambda stream: "no tensor"
    mute.forward = lambda inputs: mute.blocks[1](mute.blocks[0](inputs))
    with pytest.raises(UsageError, match="gives no tensor"):
        passages(mute, series(mute), [torch.randn(2, 6)])
