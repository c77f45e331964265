"""The language model of the demonstration, dense and pruned six ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from torch import Tensor, nn

from secateur import data, evaluate, model, report
from secateur.core.masks import Masks
from secateur.core.where import select
from secateur.documents import PYTHON_DOCS
from secateur.evaluate import Measurement
from secateur.measure import Tell
from secateur.prune import prune_
from secateur.recipes import magnitude, wanda
from secateur.request import spec_name

__all__ = ["Variant", "model_folder", "variants"]

SPARSITIES = (0.3, 0.5, 0.7)
TOKENS = 16_384  # of each text
SEED = 0


@dataclass(frozen=True)
class Variant:
    """The model pruned in one way, or not at all, and what was measured of it."""

    name: str
    method: str
    sparsity: float
    model: nn.Module
    tokenizer: Any
    masks: Masks | None
    perplexity: dict[str, Measurement]
    measurements: list[Measurement]
    agreement: Measurement | None = None
    histograms: dict[str, report.Histogram] = field(default_factory=dict)
    layers: list[report.LayerRow] = field(default_factory=list)


def model_folder() -> str:
    """Where the package keeps the demonstration's language model."""
    return str(resources.files("secateur.demo") / "gpt2_3m")


def variants(texts: Sequence[str], tell: Tell) -> list[Variant]:
    """The dense model, then magnitude and Wanda at 30, 50 and 70 %."""
    loaded = model.load(model_folder(), offline=True)
    streams = {}
    for spec in [PYTHON_DOCS, *texts]:
        streams[spec_name(spec)] = data.stream(data.read_text(spec), loaded.tokenizer)[:TOKENS]
    tell("the model writes its own calibration text", 0, 1)
    batches = data.self_generated(loaded.model, loaded.tokenizer, context=256, samples=64, seed=SEED, batch=64)
    tell("the model writes its own calibration text", 1, 1)
    found = [_measured("dense", "dense", 0.0, loaded.model, loaded, None, None, streams)]
    jobs = [
        (name, recipe, s) for name, recipe in (("magnitude", magnitude), ("Wanda", wanda)) for s in SPARSITIES
    ]
    for done, (name, recipe, sparsity) in enumerate(jobs):
        tell("pruning and measuring", done, len(jobs))
        pruned = copy.deepcopy(loaded.model)
        masks = prune_(pruned, sparsity, recipe, data=batches)
        found.append(
            _measured(
                f"{name} {sparsity:.0%}".replace("%", " %"),
                name,
                sparsity,
                pruned,
                loaded,
                masks,
                found[0],
                streams,
            )
        )
    tell("pruning and measuring", len(jobs), len(jobs))
    return found


def _measured(
    name: str,
    method: str,
    sparsity: float,
    pruned: nn.Module,
    loaded: model.Loaded,
    masks: Masks | None,
    dense: Variant | None,
    streams: dict[str, Tensor],
) -> Variant:
    perplexity = {text: evaluate.perplexity(pruned, ids, dataset=text) for text, ids in streams.items()}
    measured = [*perplexity.values(), evaluate.nonzeros(pruned)]
    agreement = None
    if dense is not None:
        first = next(iter(streams))
        close = evaluate.divergence(pruned, dense.model, streams[first], dataset=first)
        measured += close.values()
        agreement = close["top1_agreement"]
    chosen = select(pruned).chosen
    histograms = {layer.name: report.histogram(layer.weight, name=layer.name) for layer in chosen}
    rows = [
        report.LayerRow(
            layer.name, tuple(layer.weight.shape), layer.role, layer.size, histograms[layer.name].zeros
        )
        for layer in chosen
    ]
    return Variant(
        name,
        method,
        sparsity,
        pruned,
        loaded.tokenizer,
        masks,
        perplexity,
        measured,
        agreement,
        histograms,
        rows,
    )
