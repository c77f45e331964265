"""Small modules that hold matrices of every kind."""

import torch
import torch.nn.functional as F
from torch import nn


class Mixed(nn.Module):
    """One of everything that holds a matrix."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.conv = nn.Conv1d(24, 16, 3, padding=1, groups=2)
        self.linear = nn.Linear(16, 40)
        self.last = nn.Linear(40, 20, bias=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids):
        x = self.norm(self.table(ids))
        x = self.attention(x, x, x)[0]
        return self.last(F.relu(self.linear(self.conv(x.transpose(1, 2)).transpose(1, 2))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.middle, self.head = (
            nn.Embedding(20, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 20, bias=False),
        )
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(F.relu(self.middle(self.table(ids))))
