"""Reconstruction: closer to the dense model on held-out data or untouched, zeros bit-exact, deterministic."""

import copy

import pytest
import torch
from torch import nn

from secateur.errors import NumericError, UsageError
from secateur.prune import prune_
from secateur.recover.reconstruct import reconstruct_

from ..language import Tiny, ids


class Layers(nn.Module):
    """PyTorch's own encoder layers: their feed-forward has no module of its own."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


def pruned(sparsity: float = 0.6, dtype: torch.dtype = torch.float32):
    dense = Tiny().to(dtype).eval()
    model = copy.deepcopy(dense)
    return dense, model, prune_(model, sparsity)


def change(model: nn.Module, before: dict) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_outputs_come_closer_and_zeros_stay_bit_exact():
    dense, model, masks = pruned()
    new = ids(seed=7)
    distance = float((model(new) - dense(new)).detach().square().mean())
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(dense.state_dict())
    found = reconstruct_(model, dense, masks, [{"input_ids": ids()}])
    assert [each.path for each in found] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert all(each.after <= each.before for each in found)
    assert sum(each.after < each.before for each in found) >= 3
    assert float((model(new) - dense(new)).detach().square().mean()) < 0.7 * distance
    for name, mask in masks.items():
        bits = model.get_parameter(name).detach().view(torch.int32)
        assert bool((bits[~mask] == 0).all())
    changed = change(model, before)
    assert "blocks.0.mlp.0.bias" in changed
    assert not {name for name in changed if "norms" in name or "embed" in name or "head" in name}
    assert change(dense, reference) == set()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_random_state():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        dense, model, masks = pruned()
        state = torch.get_rng_state()
        reconstruct_(model, dense, masks, [ids()], epochs=2, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(model.state_dict())
    assert change(model, states[0]) == set()


def test_what_does_not_come_closer_on_held_out_data_is_left_bit_for_bit():
    dense, model, masks = pruned(0.5)
    before = copy.deepcopy(model.state_dict())
    # a step so large that no epoch is better than none
    found = reconstruct_(model, dense, masks, [ids()], epochs=1, rate=0.99, patience=0, batch=1)
    for each in found:
        names = {name for name in change(model, before) if name.startswith(each.path)}
        assert bool(names) == (each.after < each.before)
    assert any(each.after == each.before for each in found)


def test_a_dense_model_needs_nothing():
    dense = Tiny().eval()
    model = copy.deepcopy(dense)
    masks = prune_(copy.deepcopy(dense), 0.0)
    before = copy.deepcopy(model.state_dict())
    found = reconstruct_(model, dense, masks, [ids()], epochs=2)
    assert [each.after for each in found] == [0.0] * 4
    assert change(model, before) == set()


def test_padding_plays_no_part():
    rows = ids(16, 10)
    mask = torch.ones_like(rows)
    mask[::2, 6:] = 0
    results = []
    for filler in (0, 23):
        torch.manual_seed(0)
        dense, model, masks = pruned()
        batch = {"input_ids": torch.where(mask.bool(), rows, filler), "attention_mask": mask}
        found = reconstruct_(model, dense, masks, [batch], epochs=2)
        results.append([(each.before, each.after) for each in found])
    for first, second in zip(*results, strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_a_feed_forward_without_a_module_of_its_own_is_trained_with_its_block():
    dense = Layers()
    model = copy.deepcopy(dense)
    masks = prune_(model, 0.6)
    data = torch.randn(24, 6, 16, generator=torch.Generator().manual_seed(1))
    found = reconstruct_(model, dense, masks, [data], epochs=3)
    assert [each.path for each in found] == [
        f"encoder.layers.{i}{inner}" for i in range(2) for inner in (".self_attn", "")
    ]
    assert sum(each.after < each.before for each in found) >= 2
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    assert model.training  # as before


def test_half_precision_keeps_its_format():
    dense, model, masks = pruned(dtype=torch.bfloat16)
    found = reconstruct_(model, dense, masks, [ids()], epochs=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(each.after < each.before for each in found)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


def test_only_masked_matrices_are_trained():
    dense = Tiny().eval()
    model = copy.deepcopy(dense)
    masks = prune_(model, 0.6, skip="*.k")
    before = copy.deepcopy(model.state_dict())
    reconstruct_(model, dense, masks, [ids()], epochs=2)
    changed = change(model, before)
    assert "blocks.0.attn.q.weight" in changed
    assert not any(".k." in name for name in changed)


def test_slips_are_named():
    dense, model, masks = pruned()
    with pytest.raises(UsageError, match=r"needs at least two batches of 4 sequences, .*; got 1\."):
        reconstruct_(model, dense, masks, [ids(4)])
    with pytest.raises(UsageError, match=r"rate and held_out between 0 and 1; got epochs=0"):
        reconstruct_(model, dense, masks, [ids()], epochs=0)
    with pytest.raises(UsageError, match="masks belong to another model"):
        reconstruct_(model, Tiny(blocks=1), masks, [ids()])
    flat = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UsageError, match="no masked layer stands in a repeated block"):
        reconstruct_(flat, copy.deepcopy(flat), prune_(flat, 0.5), [torch.rand(8, 8)])
    with torch.no_grad():
        dense.blocks[0].attn.o.weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"blocks\.0\.attn: NaN or Inf among its outputs"):
        reconstruct_(model, dense, masks, [ids()])
