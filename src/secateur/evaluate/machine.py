"""The machine a measurement was taken on, in words that hold no path, user or host name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from secateur.measurement import Condition

__all__ = ["hardware"]


def hardware(device: torch.device | str | None = None) -> dict[str, Condition]:
    """What a speed or a memory figure depends on, ready to be the conditions of a Measurement.

    Args:
        device: where the model lies; an accelerator is named, the CPU is described in any case.

    Returns:
        `cpu` (model name), `instructions` (the widest vector instructions torch uses), `cores` (logical
        cores this process may use), `threads` (torch's), `torch` (version) and, for a device that is not
        the CPU, `accelerator`.

    Example:
        >>> sorted(hardware())
        ['cores', 'cpu', 'instructions', 'threads', 'torch']
    """
    found: dict[str, Condition] = {
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    place = torch.device("cpu" if device is None else device)
    if place.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(place)
    elif place.type not in ("cpu", "meta"):
        found["accelerator"] = place.type
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    # Not platform.node(): that is the host's name.
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
