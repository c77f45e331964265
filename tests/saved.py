"""Small shrunk models to be saved."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tests.deploy.models import build, example
from torch import nn

from secateur import shrink
from secateur.core.units import Analysis


def kept(analysis: Analysis, *kinds: str, seed: int | None = 0) -> dict[str, list[int]]:
    """Half of the units of these kinds, or with a seed any number of them."""
    generator = torch.Generator().manual_seed(seed or 0)
    out = {}
    for units in analysis.units:
        if not kinds or units.kind in kinds:
            low = units.size // 2
            count = low if seed is None else int(torch.randint(1, units.size, (), generator=generator))
            out[units.name] = sorted(torch.randperm(units.size, generator=generator)[:count].tolist())
    return out


def axes(model: nn.Module, given: Any) -> Analysis:
    from secateur.core.example import analysis_of

    return analysis_of(model, given)[0]


def shrunken(kind: str, *kinds: str, seed: int | None = 0, **changed: Any) -> nn.Module:
    model = build(kind, 2, **changed)
    inputs = example(model)
    analysis = axes(model, inputs)
    return shrink(model, kept(analysis, *kinds, seed=seed), inputs, analysis=analysis)


WIDTHS = ("head", "KV group", "feed-forward unit")


def logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    model.set_attn_implementation("eager")  # as the models here were built
    with torch.no_grad():
        return model(**example(model), use_cache=False)["logits"]


@cache
def uneven_gpt2() -> nn.Module:
    """A GPT-2 whose layers differ; no test changes it."""
    torch.manual_seed(0)
    return shrunken("gpt2", *WIDTHS)
