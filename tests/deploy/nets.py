"""Small modules whose integers follow widths in different ways, and models made of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Heads in a fused projection, cut by `split_size` and viewed by `num_heads` and `head_dim`."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_heads, config.hidden_size // config.num_heads
        self.split_size = config.hidden_size
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * self.split_size)
        self.out = nn.Linear(self.split_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).split(self.split_size, -1)
        q, k, v = (t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        y = (q @ k.transpose(-1, -2) * self.scaling).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class Block(nn.Module):
    """Attention and feed-forward with a residual stream and no norm, so that every axis is exact."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.gelu(self.up(x)))


class Language(nn.Module):
    """A language model with tied embeddings; one configuration is shared by all modules."""

    def __init__(self, **changed: int) -> None:
        super().__init__()
        sizes = {"vocab": 29, "hidden_size": 24, "num_heads": 4, "intermediate_size": 20, "num_layers": 2}
        self.config = SimpleNamespace(**(sizes | changed))
        self.embed = nn.Embedding(self.config.vocab, self.config.hidden_size)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.num_layers))
        self.last = nn.Linear(self.config.hidden_size, self.config.vocab, bias=False)
        self.last.weight = self.embed.weight
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.mul_(3.0 if "qkv" in name else 1.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Net(nn.Module):
    """Submodules and numbers, and a function for the forward."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.computation = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.computation(self, *args, **kwargs)


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 29, (rows, length))


def masked(model: nn.Module, masks) -> nn.Module:
    """A copy with zeros, made without the graph: the oracle."""
    out = copy.deepcopy(model).eval()
    masks.apply_(out)
    return out
