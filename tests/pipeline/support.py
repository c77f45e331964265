"""Experiments on the small classifier."""

from __future__ import annotations

from pathlib import Path

OWN = Path(__file__).with_name("own.py")
STAGES = [
    {"train": {"epochs": 4, "lr": 3e-2}},
    {"prune": {"sparsity": 0.85}},
    {"fine-tune": {"epochs": 4, "lr": 2e-2}},
]


def spec(stages=STAGES, **more):
    """An experiment as plain values."""
    return {
        "model": f"{OWN}:build",
        "train": f"{OWN}:train",
        "labelled": f"{OWN}:test",
        "stages": stages,
        **more,
    }
