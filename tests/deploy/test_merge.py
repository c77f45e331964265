"""Neighbouring feed-forwards merged: counts, oracles by hand, and orders of neurons that change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.depth import series
from secateur.core.feedforward import feed_forwards
from secateur.deploy import merge_blocks, merge_blocks_
from secateur.deploy.align import match, orders
from secateur.deploy.merge import groups_of
from secateur.errors import NumericError, UsageError

from .models import build, example


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("n", "millions"), [(2, 81.91), (4, 60.65), (6, 53.56)])
@pytest.mark.thorough
def test_gpt2_compressed_has_the_published_sizes(n, millions):
    """GPT-2 small on the meta device: 124.44 M parameters; merged keeps them, compressed has one block a group."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert size(model) == 124_439_808
    assert size(merge_blocks(model, n, compress=False)) == 124_439_808
    small = merge_blocks(model, n)
    assert round(size(small) / 1e6, 2) == millions
    assert size(small) == 124_439_808 - (12 - 12 // n) * 7_087_872
    assert small.config.n_layer == 12 // n == len(small.transformer.h)


def test_merged_and_compressed_against_averages_by_hand():
    model = build("gpt2", 5)
    blocks = list(model.transformer.h)
    merged, small = merge_blocks(model, 2, compress=False), merge_blocks(model, 2)
    assert [len(m.transformer.h) for m in (merged, small)] == [5, 3]
    for group, (first, *rest) in enumerate(((0, 1), (2, 3), (4,))):
        for name, parameter in blocks[first].mlp.named_parameters():
            mean = torch.stack([parameter, *(blocks[b].mlp.get_parameter(name) for b in rest)]).mean(0)
            for block in (merged.transformer.h[first], *(merged.transformer.h[b] for b in rest)):
                torch.testing.assert_close(block.mlp.get_parameter(name), mean)
            torch.testing.assert_close(small.transformer.h[group].mlp.get_parameter(name), mean)
        for part in ("ln_1", "attn", "ln_2"):  # everything but the feed-forward is the first block's own
            for name, parameter in blocks[first].get_submodule(part).named_parameters():
                kept = small.transformer.h[group].get_submodule(part).get_parameter(name)
                assert torch.equal(kept, parameter)
    assert torch.equal(merged.transformer.h[1].attn.c_attn.weight, blocks[1].attn.c_attn.weight)


@pytest.mark.parametrize(("stays", "which"), [("first", 0), ("middle", 1), ("last", 2)])
def test_which_block_of_a_group_keeps_its_attention(stays, which):
    model = build("llama", 3)
    small = merge_blocks(model, 3, stays=stays)
    kept = small.model.layers[0].self_attn
    assert torch.equal(kept.q_proj.weight, model.model.layers[which].self_attn.q_proj.weight)
    assert kept.layer_idx == 0
    mean = torch.stack([block.mlp.up_proj.weight for block in model.model.layers]).mean(0)
    torch.testing.assert_close(small.model.layers[0].mlp.up_proj.weight, mean)


def test_differences_are_laco():
    """The first block plus its differences to the others, over whole blocks."""
    model = build("gpt2", 3)
    small = merge_blocks(model, 3, how="differences", parts="block")
    a, b, c = model.transformer.h
    for name, parameter in small.transformer.h[0].named_parameters():
        base = a.get_parameter(name)
        expected = base + (b.get_parameter(name) - base) + (c.get_parameter(name) - base)
        torch.testing.assert_close(parameter, expected)


def test_equal_blocks_merge_into_themselves():
    model = build("mixtral", 2)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    for options in ({}, {"parts": "block"}, {"how": "differences"}):
        small = merge_blocks(model, 2, **options)
        for name, parameter in small.model.layers[0].named_parameters():
            torch.testing.assert_close(parameter, model.model.layers[0].get_parameter(name))


class Fused(nn.Module):
    """Gate and up in one matrix, as in Phi-3."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(6, 20), nn.Linear(10, 6)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return x + self.down_proj(torch.relu(gate) * up)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi"])
def test_an_order_of_neurons_changes_nothing(kind):
    """Also where gate and up are one matrix (phi)."""
    if kind == "phi":
        block = Fused()
        model, inputs = nn.Sequential(nn.ModuleList([block, Fused()])), torch.randn(3, 6)
        feed, run = feed_forwards(model, series(model)[0].blocks)[0], lambda: block(inputs)
    else:
        model = build(kind, 2)
        ids = example(model)
        feed, run = feed_forwards(model, series(model)[0].blocks)[0], lambda: model(**ids).logits
    before = run()
    order = torch.randperm(feed.closing.layout.shape[2])
    changed = feed.ordered(order)
    assert any(not torch.equal(value, feed.parameters[name]) for name, value in changed.items())
    with torch.no_grad():
        for name, value in changed.items():
            feed.parameters[name].copy_(value.clone())
    torch.testing.assert_close(run(), before)


class Beside(nn.Module):
    """Two blocks that read the same."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Fused(), Fused()])

    def forward(self, x):
        return self.blocks[0](x) + self.blocks[1](x)


@pytest.mark.parametrize("align", ["weights", "activations"])
def test_a_block_with_shuffled_neurons_is_put_in_order_again(align):
    """Averaging a block with a shuffled copy of itself gives the block back, once aligned; without, it does not."""
    model, data = Beside(), [torch.randn(200, 6), torch.randn(3, 50, 6)]
    first, second = series(model)[0].blocks
    second.module.load_state_dict(first.module.state_dict())
    feed = feed_forwards(model, [second])[0]
    shuffled = feed.ordered(torch.randperm(10))
    with torch.no_grad():
        for name, value in shuffled.items():
            feed.parameters[name].copy_(value.clone())
    aligned = merge_blocks(model, 2, compress=False, align=align, data=data).blocks
    plain = merge_blocks(model, 2, compress=False).blocks
    for name, parameter in first.module.named_parameters():
        torch.testing.assert_close(aligned[0].get_parameter(name), parameter)
        torch.testing.assert_close(aligned[1].get_parameter(name), parameter)
    assert not torch.allclose(plain[0].down_proj.weight, first.module.down_proj.weight)


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_matching_is_the_best_of_all(size, seed):
    from itertools import permutations

    gain = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    best = max(sum(gain[row, column] for row, column in enumerate(p)) for p in permutations(range(size)))
    found = match(gain)
    assert sorted(found.tolist()) == list(range(size))
    torch.testing.assert_close(gain[torch.arange(size), found].sum(), best)


def test_padding_does_not_count_when_neurons_are_compared():
    model = build("llama", 2)
    given = example(model, 4)
    padded = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in given.items()}
    feeds = feed_forwards(model, series(model)[0].blocks)
    one = orders(model, [tuple(feeds)], "activations", [given])
    other = orders(model, [tuple(feeds)], "activations", [padded])
    assert torch.equal(one["model.layers.1"], other["model.layers.1"])


@pytest.mark.thorough
def test_groups_start_at_the_first_block_and_the_rest_is_smaller():
    model = build("bart", 5)
    cut = [[block.path.rpartition(".")[2] for block in group] for group in groups_of(model, 2, "encoder")]
    assert cut == [["0", "1"], ["2", "3"], ["4"]]
    small = merge_blocks(model, 2, stack="encoder")
    assert (small.config.encoder_layers, small.config.decoder_layers) == (3, 5)


def test_in_place_returns_the_model_and_a_refusal_leaves_it_alone():
    model = build("deepseek")  # two dense blocks, then two of experts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        UsageError, match=r"model\.layers\.0 and model\.layers\.2 cannot be merged: .* has shape"
    ):
        merge_blocks_(model, 3)
    with pytest.raises(UsageError, match=r"is nothing that its config can describe"):
        merge_blocks_(build("t5"), 2, stays="last")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert merge_blocks_(model, 2) is model
    assert len(model.model.layers) == 2


def test_words_for_what_cannot_be_merged():
    model = build("gpt2", 2)
    with pytest.raises(UsageError, match="groups of 1 blocks have nothing to merge; expected at least 2"):
        merge_blocks(model, 1)
    with pytest.raises(UsageError, match="align='heads' is not known; expected 'weights' or 'activations'"):
        merge_blocks(model, 2, align="heads")
    with pytest.raises(UsageError, match="by their activations needs calibration data; pass data="):
        merge_blocks(model, 2, align="activations")
    with pytest.raises(UsageError, match="data holds no batch"):
        merge_blocks(model, 2, align="activations", data=[])
    with pytest.raises(UsageError, match="data is one batch"):
        merge_blocks(model, 2, align="activations", data=example(model))
    with pytest.raises(UsageError, match="neurons of its feed-forward cannot be put in order"):
        merge_blocks(build("mixtral", 2), 2, align="weights")
    with pytest.raises(UsageError, match="has no feed-forward that could be merged"):
        merge_blocks(nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)]), 2)
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"transformer\.h\.1: NaN or Inf when its neurons are compared"):
        merge_blocks(model, 2, align="weights")
