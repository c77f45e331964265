"""Statistics are sums over real tokens, whatever the batching, and touch nothing."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core import statistics
from secateur.core.matrix import Layout, layouts
from secateur.core.statistics import STATISTICS, gather
from secateur.errors import NumericError, UsageError


@dataclass
class Watched:
    name: str
    module: nn.Module
    layout: Layout


def watch(model: nn.Module) -> list[Watched]:
    found = []
    for path, module in model.named_modules():
        found += [Watched(f"{path}.{layout.name}", module, layout) for layout in layouts(module) if layout.rows]
    return found


class Tokens(nn.Module):
    """Two layers on a padded batch; padding holds rubbish."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, attention_mask=None):
        return self.b(torch.relu(self.a(x)))


def test_values_against_the_definitions():
    model = Tokens()
    x = torch.randn(2, 5, 3)
    stats = gather(model, watch(model), list(STATISTICS), [x])
    flat, inner = x.reshape(-1, 3), torch.relu(model.a(x)).reshape(-1, 4).detach()
    for name, rows in (("a.weight", flat), ("b.weight", inner)):
        torch.testing.assert_close(stats[name]["input_norm"], rows.norm(dim=0)[None])
        torch.testing.assert_close(stats[name]["input_norm_l1"], rows.abs().sum(0)[None])
        torch.testing.assert_close(stats[name]["input_activation"], rows.abs().mean(0)[None])
        torch.testing.assert_close(stats[name]["input_mean"], rows.mean(0)[None])
        torch.testing.assert_close(stats[name]["input_variance"], rows.var(0, correction=0)[None])
        torch.testing.assert_close(stats[name]["input_zeros"], (rows == 0).float().mean(0)[None])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 3))
def test_padding_and_batching_do_not_matter(lengths, batch_size, extra):
    model = Tokens()
    texts = [torch.randn(n, 3) for n in lengths]
    alone = gather(model, watch(model), list(STATISTICS), [{"x": t[None]} for t in texts])
    batches = []
    for start in range(0, len(texts), batch_size):
        group = texts[start : start + batch_size]
        longest = max(len(t) for t in group) + extra
        x = torch.full((len(group), longest, 3), 1e3)
        mask = torch.zeros(len(group), longest, dtype=torch.long)
        for row, text in enumerate(group):
            x[row, : len(text)], mask[row, : len(text)] = text, 1
        batches.append({"x": x, "attention_mask": mask})
    together = gather(model, watch(model), list(STATISTICS), batches)
    for layer, values in alone.items():
        for name in STATISTICS:
            # sums of products may cancel, so their rounding is judged by the largest of them
            room = max(1e-7, 1e-6 * float(values[name].abs().max()))
            torch.testing.assert_close(together[layer][name], values[name], rtol=1e-6, atol=room)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    gather(model, watch(model), ["input_norm"], [torch.randn(4, 3, generator=torch.Generator().manual_seed(1))])
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("batch_first", [True, False])
def test_every_matrix_of_a_torch_transformer_is_seen(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    x = torch.randn(2, 5, 8)
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    given = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": hidden}
    stats = gather(layer, watch(layer), ["input_norm"], [given])
    assert stats.keys() == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip
    expected = x.masked_fill(hidden[..., None], 0).reshape(-1, 8).norm(dim=0)
    torch.testing.assert_close(stats["self_attn.in_proj_weight"]["input_norm"], expected.expand(3, 8))
    pieces = gather(layer, watch(layer), ["input_norm"], [{"src": x[:1] if batch_first else x[:1].transpose(0, 1)},
        {"src": x[1:, :3] if batch_first else x[1:, :3].transpose(0, 1)}])  # fmt: skip
    for name in stats:
        torch.testing.assert_close(stats[name]["input_norm"], pieces[name]["input_norm"], rtol=1e-5, atol=1e-5)


def test_encoder_and_decoder_have_their_own_padding():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    layers = [w for w in watch(model) if "relative" not in w.name and "lm_head" not in w.name]
    source, target = torch.randint(1, 32, (2, 5)), torch.randint(1, 32, (2, 5))
    mask, target_mask = torch.ones(2, 5).long(), torch.ones(2, 5).long()
    mask[1, 3:], target_mask[0, 2:] = 0, 0
    padded = gather(model, layers, ["input_norm"], [
        {"input_ids": source, "attention_mask": mask,
         "decoder_input_ids": target, "decoder_attention_mask": target_mask}
    ])  # fmt: skip
    alone = gather(model, layers, ["input_norm"], [
        {"input_ids": source[:1], "decoder_input_ids": target[:1, :2]},
        {"input_ids": source[1:, :3], "decoder_input_ids": target[1:]},
    ])  # fmt: skip
    assert any("EncDecAttention.k" in name for name in padded)
    for name in padded:
        torch.testing.assert_close(padded[name]["input_norm"], alone[name]["input_norm"], rtol=1e-4, atol=1e-4)


def test_errors():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    layers = watch(model)
    with pytest.raises(UsageError, match="data holds no batch"):
        gather(model, layers, ["input_norm"], [])
    with pytest.raises(
        UsageError, match=r"0\.weight: no calibration token reached this layer\. Skip it with skip="
    ):
        gather(model, layers, ["input_norm"], [torch.zeros(0, 3)])
    with pytest.raises(NumericError, match=r"0\.weight: NaN or Inf among its input activations"):
        gather(model, layers, ["input_norm"], [torch.full((1, 3), float("nan"))])
    with pytest.raises(UsageError, match="a batch is a tensor, a mapping of keyword arguments or"):
        gather(model, layers, ["input_norm"], ["text"])
    embedding = nn.Embedding(3, 2)
    (layout,) = layouts(embedding)
    with pytest.raises(UsageError, match="an embedding has no input activations"):
        gather(embedding, [Watched("weight", embedding, layout)], ["input_norm"], [torch.tensor([1])])


def test_padding_that_cannot_be_told_is_refused():
    class Shifts(Tokens):
        def forward(self, x, attention_mask=None):
            return self.a(torch.cat([x, x[:, :1]], dim=1))

    model = Shifts()
    batch = {"x": torch.randn(2, 3, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    with pytest.raises(
        UsageError, match=r"a\.weight: its input has shape \(2, 4, 3\), the attention mask \(2, 3\)"
    ):
        gather(model, watch(model)[:1], ["input_norm"], [batch])


def test_a_wide_second_moment_is_computed_by_panels(monkeypatch):
    monkeypatch.setattr(statistics, "PANEL", 16)
    for columns in (31, 32, 33, 48, 70):
        rows = torch.randn(50, columns)
        found = statistics._products(rows)
        torch.testing.assert_close(found, rows.t() @ rows, rtol=1e-5, atol=1e-5)
        if columns >= 32:  # what lies below a panel is a copy
            assert torch.equal(found[16:, :16], found[:16, 16:].t())


def test_sums_in_pieces_are_those_of_float64():
    rows = torch.randn(1000, 7)
    double = rows.double()
    torch.testing.assert_close(statistics._magnitudes(rows), double.abs().sum(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics._squares(rows), rows.square().double().sum(0), rtol=1e-14, atol=0)
    assert statistics._squares(rows[:0]).tolist() == [0.0] * 7


def test_one_input_is_looked_at_once_unless_it_changes(monkeypatch):
    """q and k read the very same tensor; v reads it after a change in place."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 2) for _ in range(3))

        def forward(self, x):
            x = x + 0
            q, k = self.q(x), self.k(x)
            return q + k + self.v(x.mul_(2))

    looked = []
    squares = statistics._squares
    watched = {
        **STATISTICS,
        "input_norm": (lambda rows: looked.append(1) or squares(rows), lambda t, n: t.sqrt()),
    }
    monkeypatch.setattr(statistics, "STATISTICS", watched)
    model, x = Three(), torch.randn(5, 6)
    found = gather(model, watch(model), ["input_norm"], [x, x[:2]])
    assert len(looked) == 4  # two inputs in each of two batches
    expected = torch.cat([x, x[:2]]).norm(dim=0)
    for name, times in (("q", 1), ("k", 1), ("v", 2)):
        torch.testing.assert_close(found[f"{name}.weight"]["input_norm"][0], times * expected)
