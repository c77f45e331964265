"""Blocks chosen by what they do: against exhaustive search, hand-made models, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn

from secateur import Recipe, magnitude
from secateur.core.depth import chosen, without
from secateur.core.loss import loss_of
from secateur.deploy import drop_blocks
from secateur.depth import choose_blocks
from secateur.errors import UsageError
from secateur.pattern import Layers
from secateur.recipes import (
    DEPTH_METHODS,
    angular_distance,
    block_influence,
    last_blocks,
    loss_without,
    random_blocks,
)


class Block(nn.Module):
    def __init__(self, weight: float):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.scale = weight

    def forward(self, x):
        return x + self.scale * self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Blocks that do more or less, and a head."""

    def __init__(self, *weights: float):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([Block(weight) for weight in weights])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(3)), torch.arange(64) % 3
DATA = [(X, Y)]


def paths(*numbers: int) -> tuple[str, ...]:
    return tuple(f"blocks.{number}" for number in numbers)


def test_the_blocks_that_do_least_go():
    model = Net(3, 0.1, 2, 0.01, 4, 0.2)
    assert choose_blocks(model, 3, block_influence, DATA) == paths(1, 3, 5)
    assert choose_blocks(model, 1, angular_distance, DATA) == paths(3)
    assert choose_blocks(model, 3, replace(block_influence, pattern=Layers(again=True)), DATA) == paths(1, 3, 5)
    assert len(model.blocks) == 6


def test_neighbours_are_scored_as_one_run():
    model = Net(3, 0.1, 2, 0.3, 0.3, 2)
    assert choose_blocks(model, 2, angular_distance, DATA) == paths(3, 4)
    assert choose_blocks(model, 2, replace(block_influence, pattern=Layers(together=True)), DATA) == paths(3, 4)
    assert choose_blocks(model, 2, block_influence, DATA) != paths(3, 4)


@pytest.mark.thorough
def test_one_block_by_loss_is_the_best_of_all_and_several_are_greedy():
    model = Net(3, 1, 2, 1.5, 1)

    def loss(numbers):
        with torch.no_grad(), without(model, chosen(model, numbers)):
            return float(loss_of(model, DATA[0])[0])

    best = min(range(5), key=lambda number: loss([number]))
    assert choose_blocks(model, 1, loss_without, DATA) == paths(best)
    second = min((n for n in range(5) if n != best), key=lambda number: loss(sorted([best, number])))
    assert choose_blocks(model, 2, loss_without, DATA) == paths(*sorted((best, second)))
    run = min(((n, n + 1) for n in range(4)), key=loss)
    assert choose_blocks(model, 2, replace(loss_without, pattern=Layers(together=True)), DATA) == paths(*run)
    assert loss([best]) == min(loss([number]) for (number,) in combinations(range(5), 1))


def test_a_loss_of_ones_own_decides():
    model = Net(3, 1, 2, 1.5, 1)
    worst = choose_blocks(
        model, 1, loss_without, DATA, loss=lambda out, y: -nn.functional.cross_entropy(out, y)
    )
    assert worst != choose_blocks(model, 1, loss_without, DATA)


@pytest.mark.thorough
def test_controls_need_no_data():
    model = Net(1, 1, 1, 1, 1)
    assert choose_blocks(model, 2, last_blocks) == paths(3, 4)
    one = choose_blocks(model, 2, random_blocks, seed=1)
    assert one == choose_blocks(model, 2, random_blocks, seed=1)
    assert len({choose_blocks(model, 2, random_blocks, seed=seed) for seed in range(20)}) > 3


def test_what_is_skipped_stays_and_ties_go_by_position():
    model = Net(1, 1, 1, 1)
    constant = Recipe(lambda position: torch.zeros_like(position), pattern=Layers())
    assert choose_blocks(model, 2, constant) == paths(0, 1)
    assert choose_blocks(model, 2, constant, skip=["blocks.0", "*.2"]) == paths(1, 3)


def test_every_list_keeps_a_block():
    model = nn.Sequential(Net(3, 3, 3), Net(0.1, 0.1))
    model.forward = lambda x: model[0](x) + model[1](x)
    found = choose_blocks(model, 3, block_influence, DATA)
    assert sum(path.startswith("1.") for path in found) == 1
    with pytest.raises(UsageError, match="4 blocks cannot be taken out; of 5 at most 3 may go"):
        choose_blocks(model, 4, block_influence, DATA)


def test_blocks_that_change_the_shape_are_never_chosen():
    model = Net(1, 1, 1)
    model.blocks[1].down = nn.Linear(9, 12)
    model.blocks[1].forward = lambda x: model.blocks[1].down(torch.relu(model.blocks[1].up(x)))[..., :7]
    model.forward = lambda x: model.head(model.blocks[2](model.blocks[1](model.blocks[0](x))[..., :6]))
    assert "blocks.1" not in choose_blocks(model, 2, block_influence, DATA)
    with pytest.raises(UsageError, match="only 1 of the 2 blocks asked for hand the stream on in its shape"):
        choose_blocks(model, 2, block_influence, DATA, skip=["blocks.0"])
    with pytest.raises(UsageError, match="there are no 2 neighbours that may go"):
        choose_blocks(model, 2, angular_distance, DATA, skip=["blocks.2"])


@pytest.mark.parametrize("method", DEPTH_METHODS)
@pytest.mark.thorough
def test_on_t5_the_block_that_holds_the_positions_is_left_alone(method):
    """Whatever the score says, what is chosen can be taken out, and the config can say it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=53, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 53, (2, 9))
    data = [{"input_ids": ids, "decoder_input_ids": ids[:, :5], "labels": ids[:, :5].clone()}]
    found = choose_blocks(model, 2, DEPTH_METHODS[method], data, stack="decoder")
    assert found == ("decoder.block.1", "decoder.block.2")
    small = drop_blocks(model, found, example=data[0])
    assert small.config.num_decoder_layers == 1


def test_words_for_what_cannot_be_chosen():
    model = Net(1, 1, 1)
    with pytest.raises(UsageError, match="block_influence needs calibration data; pass data="):
        choose_blocks(model, 1)
    with pytest.raises(UsageError, match="loss_without needs calibration data"):
        choose_blocks(model, 1, loss_without)
    with pytest.raises(UsageError, match="data holds no batch"):
        choose_blocks(model, 1, block_influence, [])
    with pytest.raises(UsageError, match="data holds no batch"):
        choose_blocks(model, 1, loss_without, [])
    with pytest.raises(UsageError, match="data is one batch"):
        choose_blocks(model, 1, block_influence, {"x": X})
    with pytest.raises(UsageError, match=r"cuts Weights\(\), no blocks; expected a recipe on Layers\(\)"):
        choose_blocks(model, 1, magnitude)
    with pytest.raises(UsageError, match="asks for 'cosin', which is not known of blocks; nearest: cosine"):
        choose_blocks(model, 1, Recipe(lambda cosin: cosin, pattern=Layers()))
    with pytest.raises(UsageError, match="0 blocks cannot be taken out; of 3 at most 2 may go"):
        choose_blocks(model, 0, last_blocks)
    with pytest.raises(UsageError, match="what the model is trained for cannot be told"):
        choose_blocks(model, 1, loss_without, [X])
    assert len(model.blocks) == 3
