"""A tiny language model of two blocks that understands padding, and token ids for it."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(mixed.transpose(1, 2).flatten(2)), None


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x, mask=None):
        x = x + self.attn(self.norms[0](x), mask=mask)[0]
        return x + self.mlp(self.norms[1](x))


class Tiny(nn.Module):
    """A language model of two blocks that understands padding."""

    def __init__(self, words: int = 24, width: int = 16, blocks: int = 2):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, words)

    def forward(self, input_ids, attention_mask=None):
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def ids(count: int = 24, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 24, (count, length), generator=torch.Generator().manual_seed(seed))
