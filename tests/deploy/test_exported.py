"""Static int8: close to the model, zeros where they were, and the same again from its file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur import prune_
from secateur.deploy.exported import load_static, quantize_static, save_static
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


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="data holds no batch"):
        quantize_static(network(), [])
    with pytest.raises(UsageError, match="takes models of one tensor; got a batch of dict"):
        quantize_static(network(), [{"input_ids": torch.zeros(1)}])
    with pytest.raises(UsageError, match=r"the model cannot be exported \(.*quantize_\) need no export"):
        quantize_static(network(), [torch.randn(2, 5)])
    with pytest.raises(UsageError, match="holds no static integers"):
        save_static(network(), tmp_path / "x")
    (tmp_path / "x").write_bytes(b"junk")
    with pytest.raises(InputError, match="no file of a static model"):
        load_static(network(), torch.randn(1, 3, 8, 8), tmp_path / "x")
