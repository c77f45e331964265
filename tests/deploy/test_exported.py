"""Static int8: close to the model, zeros where they were, and the same again from its file."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from secateur import finetune_, prune_
from secateur.deploy.exported import load_static, quantize_static, quantize_static_aware, save_static
from secateur.errors import InputError, UsageError

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own, of what it will rename


def network(channels=8):
    layers = [
        nn.Conv2d(3, channels, 3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 36, 5),
    ]
    return nn.Sequential(*layers).eval()


def integers(graph):
    return [t for _, t in (*graph.named_parameters(), *graph.named_buffers()) if t.dtype == torch.int8]


def test_static_integers_keep_zeros_and_come_back(tmp_path):
    model = network()
    masks = prune_(model, 0.5)
    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(4)]
    graph = quantize_static(model, data)
    x = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        expected, found = model(x), graph(x)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    by_shape = {tuple(tensor.shape): tensor for tensor in integers(graph)}
    assert len(by_shape) == 2
    for mask in masks.values():
        assert not by_shape[tuple(mask.shape)][~mask].any()
    assert not any(t.dtype == torch.float32 and t.dim() > 1 for t in graph.parameters())
    save_static(graph, tmp_path / "static.safetensors")
    again = load_static(network(), x[:1], tmp_path / "static.safetensors")
    assert torch.equal(again(x), found)
    size = (tmp_path / "static.safetensors").stat().st_size
    assert size < 0.6 * sum(4 * p.numel() for p in model.parameters())
    with pytest.raises(InputError, match="does not fit the model"):
        load_static(network(6), x[:1], tmp_path / "static.safetensors")


class Two(nn.Module):
    """Takes two tensors, one of them by name if one likes."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left, right, scale=1.0):
        return self.out(torch.relu(self.left(left) + self.right(right) * scale))


def rows(count):
    return torch.randn(count, 6), torch.randn(count, 4)


@pytest.mark.parametrize("form", [tuple, lambda pair: dict(zip(("left", "right"), pair, strict=True))])
def test_several_inputs_in_place_and_by_name(tmp_path, form):
    model = Two().eval()
    masks = prune_(model, 0.5)
    graph = quantize_static(model, [form(rows(8)) for _ in range(4)])
    given = rows(5)
    left, right = given
    found = graph(left, right) if form is tuple else graph(left=left, right=right)
    expected = model(*given)
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    by_shape = {tuple(tensor.shape): tensor for tensor in integers(graph)}
    assert len(by_shape) == 3
    for mask in masks.values():
        assert not by_shape[tuple(mask.shape)][~mask].any()
    save_static(graph, tmp_path / "two.safetensors")
    again = load_static(Two(), form(rows(2)), tmp_path / "two.safetensors")
    assert torch.equal(again(left, right) if form is tuple else again(left=left, right=right), found)


def test_a_bert_with_its_attention_mask(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=12, initializer_range=0.4, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    masks = prune_(model, 0.5, only="encoder")

    def batch(count):
        mask = torch.ones(count, 10, dtype=torch.long)
        mask[0, 6:] = 0
        labels = torch.zeros(count, dtype=torch.long)
        return {"input_ids": torch.randint(0, 30, (count, 10)), "attention_mask": mask, "labels": labels}

    graph = quantize_static(model, [batch(4) for _ in range(3)])
    given = {key: value for key, value in batch(3).items() if key != "labels"}
    with torch.no_grad():
        expected, found = model(**given).logits, graph(**given).logits
        alone = model(given["input_ids"]).logits
        without = graph(**{**given, "attention_mask": torch.ones(3, 10, dtype=torch.long)}).logits
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert (without - alone).abs().max() < 0.5 * (found - without).abs().max()  # the mask is heard
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    held = [tensor for tensor in integers(graph) if tensor.dim() == 2]
    assert len(held) >= len(masks)
    assert sum(int((tensor == 0).sum()) for tensor in held) >= zeros
    save_static(graph, tmp_path / "bert.safetensors")
    again = load_static(
        transformers.BertForSequenceClassification(config), batch(2), tmp_path / "bert.safetensors"
    )
    assert torch.equal(again(**given).logits, found)


def test_training_with_rounding_in_view_keeps_zeros_and_learns(tmp_path):
    torch.manual_seed(0)
    model = network(4)
    masks = prune_(model, 0.7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(64, 3, 8, 8)
    data = [(part, part.mean((1, 2, 3)).gt(0).long()) for part in x.split(16)]
    started = time.process_time()
    seen = {}

    def fit(graph):
        seen["names"] = {name for name, _ in graph.named_parameters()}
        seen["tuned"] = finetune_(graph, data, masks, epochs=4, lr=1e-2, loss="single-label")

    graph = quantize_static_aware(model, data[0], fit)
    assert time.process_time() - started < 120  # mostly torchao's pattern matching
    assert seen["names"] == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    by_shape = {tuple(tensor.shape): tensor for tensor in integers(graph)}
    for mask in masks.values():
        held = by_shape[tuple(mask.shape)]
        assert not held[~mask].any()
        assert (held != 0).any()
    y = torch.cat([labels for _, labels in data])
    with torch.no_grad():
        right = (graph(x).argmax(1) == y).double().mean()
        plain = (quantize_static(model, data)(x).argmax(1) == y).double().mean()
    assert right > plain
    save_static(graph, tmp_path / "aware.safetensors")
    again = load_static(network(4), data[0], tmp_path / "aware.safetensors")
    assert torch.equal(again(x), graph(x))


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="data holds no batch"):
        quantize_static(network(), [])
    with pytest.raises(UsageError, match="example: it holds no tensor"):
        quantize_static(network(), [{"input_ids": 1}])
    with pytest.raises(UsageError, match="other inputs than the first"):
        quantize_static(Two(), [rows(4), {"left": rows(4)[0]}])
    with pytest.raises(UsageError, match=r"the model cannot be exported \(.*quantize_\) need no export"):
        quantize_static(network(), [torch.randn(2, 5)])
    with pytest.raises(UsageError, match="holds no static integers"):
        save_static(network(), tmp_path / "x")
    (tmp_path / "x").write_bytes(b"junk")
    with pytest.raises(InputError, match="no file of a static model"):
        load_static(network(), torch.randn(1, 3, 8, 8), tmp_path / "x")
