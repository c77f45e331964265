"""What tests of whole runs share."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    found = other.state_dict()
    return all(torch.equal(value, found[name]) for name, value in one.state_dict().items())


def is_attention(name: str) -> bool:
    return ".attn.c_" in name and name.endswith("weight")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target
