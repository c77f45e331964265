"""Data in parts: the same statistics and the same order as with all data at once, up to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur import recipes
from secateur.core.masks import Masks
from secateur.core.visit import merge, visit
from secateur.core.where import select
from secateur.errors import UsageError
from secateur.model import load
from secateur.stream import blocks, prune_checkpoint
from secateur.stream.hidden import Hidden, write_hidden
from secateur.stream.stages import in_parts, visit_in_stages
from secateur.stream.walk import Call, Running

from .conftest import WORDS, build, padded_batches


def test_parts_hold_whole_sequences_and_all_of_them():
    batches = padded_batches()
    whole = merge(batches)  # 6 sequences of 14 tokens
    assert len(in_parts(batches, 84)) == 1
    for most, count in ((83, 2), (28, 3), (14, 6), (1, 6)):
        parts = in_parts(batches, most)
        assert len(parts) == count
        for key, value in whole.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), value)
    assert [len(part) for part in in_parts([torch.zeros(5, 4)], 8)] == [2, 2, 1]
    assert in_parts([torch.zeros(5)], 1)[0].shape == (5,)
    labelled = [{"input_ids": torch.zeros(3, 4, dtype=torch.long), "flag": True}]
    assert [part["flag"] for part in in_parts(labelled, 4)] == [True] * 3


def running(kind: str, tmp_path, states: list[torch.Tensor], masks: list[torch.Tensor]) -> Running:
    """The first block of a model as it is walked, with hidden states in a file."""
    torch.manual_seed(2)
    block = build(kind).eval().model.layers[0]
    calls, channels = [], states[0].shape[-1] // 4
    for part, mask in zip(states, masks, strict=True):
        length = part.shape[1]
        angle = torch.zeros(1, length, channels)
        given = {"position_embeddings": (angle.cos(), angle.sin()), "attention_mask": None}
        calls.append(Call(part.shape, mask, [((), given)]))
    with write_hidden(tmp_path / "hidden.bin") as put:
        for part in states:
            put(part)
    return Running(block, 0, calls, Hidden(tmp_path / "hidden.bin", [call.shape for call in calls]))


def seen_by(visiting, block: Running) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Order and second moments of the layers, each of them changed once it is met."""
    order, found = [], {}

    def at(layer, known) -> None:
        order.append(layer.name)
        found[layer.name] = known["second_moment"].clone()
        with torch.no_grad():
            layer.weight.mul_(0.5)

    layers = select(block, None, None).chosen
    visiting(block, layers, ["second_moment"], block, at)
    return order, found


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_stages_see_what_one_flow_sees(tmp_path, kind):
    draw = torch.Generator().manual_seed(1)
    states = [torch.randn(2, 7, 32, generator=draw) for _ in range(3)]
    masks = [torch.ones(2, 7, dtype=torch.long) for _ in range(3)]
    masks[1][0, 5:] = 0
    (tmp_path / "a").mkdir()
    order, at_once = seen_by(visit, running(kind, tmp_path / "a", [torch.cat(states)], [torch.cat(masks)]))
    again, in_stages = seen_by(visit_in_stages, running(kind, tmp_path, states, masks))
    assert sorted(again) == sorted(order)
    assert [name for name in order if "proj" in name] == [name for name in again if "proj" in name]
    for name, moment in at_once.items():
        torch.testing.assert_close(in_stages[name], moment, rtol=1e-4, atol=1e-4)


def test_a_layer_that_no_part_reaches(tmp_path):
    block = running("llama", tmp_path, [torch.randn(1, 3, 32)], [torch.zeros(1, 3)])
    with pytest.raises(UsageError, match="no calibration token reached this layer"):
        seen_by(visit_in_stages, block)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.thorough
def test_a_checkpoint_pruned_in_parts_is_nearly_the_same(checkpoints, tmp_path, monkeypatch, kind):
    recipe, data = replace(recipes.sparsegpt, score=recipes.magnitude.score), padded_batches(4)
    prune_checkpoint(checkpoints(kind), tmp_path / "whole", 0.5, recipe, data=data)
    monkeypatch.setattr(blocks, "in_parts", lambda batches: in_parts(batches, 30))
    prune_checkpoint(checkpoints(kind), tmp_path / "parts", 0.5, recipe, data=data)
    one, other = (Masks.load(tmp_path / name / "run" / "masks.safetensors") for name in ("whole", "parts"))
    assert one.zeros == other.zeros
    assert sum(int((one[name] != other[name]).sum()) for name in one) < 0.002 * one.size
    ids = torch.arange(3, 3 + WORDS // 2)[None]
    with torch.no_grad():
        logits = [load(tmp_path / name).model(ids).logits for name in ("whole", "parts")]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
