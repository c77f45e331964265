"""What the sparsity of each layer alone costs: a loss, a divergence from the dense model, or its output's error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import report
from secateur.core.digest import digest
from secateur.core.forward import call, device_of, logits_of, move, undisturbed
from secateur.core.loss import Loss, loss_of
from secateur.core.masks import Masks
from secateur.core.statistics import gather
from secateur.core.where import Layer, Only, select
from secateur.errors import InputError, NumericError, UsageError, nearest
from secateur.measure import Tell
from secateur.prune import prune_
from secateur.recipes import Recipe, magnitude

__all__ = ["MEASURES", "Journal", "sensitivity"]

MEASURES = {
    "kl": "KL divergence from the dense model, nats a prediction",
    "loss": "loss",
    "error": "relative squared error of the layer's output",
}


class Journal:
    """Points that are measured already, in a file that a killed run leaves whole; a line each.

    Args:
        path: the file; made when the first point is kept.
        identity: what the points depend on; a file of another identity is refused.

    Raises:
        UsageError: the file belongs to another model, data, recipe or measure, naming what differs.
        InputError: the file is no journal.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path, self.identity = path, dict(identity)
        self.points: dict[tuple[str, float], float] = {}
        if path.is_file():
            self._read()

    def keep(self, layer: str, sparsity: float, value: float) -> None:
        """Write one point down, so that it survives whatever comes."""
        new = not self.path.is_file()
        with open(self.path, "a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps({"identity": self.identity}) + "\n")
            file.write(json.dumps({"layer": layer, "sparsity": sparsity, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.points[layer, sparsity] = value

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line of a killed run may be half
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            points = {(str(e["layer"]), float(e["sparsity"])): float(e["value"]) for e in lines[1:]}
            identity = dict(lines[0]["identity"]) if lines else {}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: no journal of a sensitivity analysis ({error}); remove it"
            ) from None
        if not lines:
            self.path.unlink()
            return
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise UsageError(
                    f"{self.path}: was begun with another {key} ({identity.get(key)!r} instead of {value!r}); finish "
                    "it as it was begun, or start anew with --if-exists overwrite"
                )
        if whole != content:
            self.path.write_bytes(whole)
        self.points = points


def sensitivity(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    measure: str = "kl",
    sparsities: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    recipe: Recipe = magnitude,
    only: Only = None,
    skip: Only = None,
    loss: Loss | None = None,
    journal: Journal | None = None,
    tell: Tell = lambda label, done, total: None,
) -> report.Sensitivity:
    """Prune one layer after the other, each at several sparsities and all others dense, and measure what it costs.

    Args:
        model: put back as it was after every point.
        batches: what it is measured on, and what scores are calibrated on; see `core.statistics.gather`.
        measure: "kl" runs the model once a point and compares all predictions with the dense model's; "loss" likewise
            takes the mean loss; "error" needs one pass of the data for all points together: with the second moments
            H = X^T X of a layer's inputs, the squared error of its output is tr(D H D^T) for whatever change D of its
            weights.
        sparsities: in (0, 1].
        recipe: score and pattern; layers are cut alone, so nothing is allocated between them, and nothing is updated.
        only, skip: which layers.
        loss: for "loss"; by default the one that the batches imply.
        journal: points that are there already are not measured again, new ones are kept.
        tell: progress.

    Returns:
        A curve for each layer, for `report.sensitivity_section`.

    Raises:
        UsageError: an unknown measure, no batches, sparsities out of range, or a recipe that updates or decides.
        NumericError: NaN or Inf in what the model says.

    Cost: one calibration pass a sparsity where the score needs one; then for "error" one pass in all, for "kl" and
        "loss" one pass of the batches a point.
    """
    if measure not in MEASURES:
        raise UsageError(f"measure {measure!r} is not known; {nearest(measure, MEASURES)}")
    wanted = sorted(set(sparsities))
    if not batches or not wanted or not all(0 < s <= 1 for s in wanted):
        raise UsageError(
            f"needs batches and sparsities in (0, 1], got {len(batches)} batches and {list(sparsities)}"
        )
    if recipe.update is not None:
        raise UsageError(
            f"{recipe}: weights that are updated depend on each other's masks; take a recipe without update"
        )
    layers = {layer.name: layer for layer in select(model, only, skip).chosen}
    known = dict(journal.points) if journal is not None else {}
    masks = {s: _masks(model, batches, s, recipe, only, skip) for s in wanted if _missing(known, layers, s)}
    judge = _judge(model, batches, measure, loss, layers, needed=bool(masks))
    points = [(name, s) for name in layers for s in wanted]
    for done, (name, s) in enumerate(points):
        tell("sensitivity", done, len(points))
        if (name, s) not in known:
            known[name, s] = judge(layers[name], masks[s][name])
            if journal is not None:
                journal.keep(name, s, known[name, s])
    tell("sensitivity", len(points), len(points))
    dense = judge(None, None) if measure == "loss" else None
    values = {name: [known[name, s] for s in wanted] for name in layers}
    return report.Sensitivity(wanted, values, MEASURES[measure], reference=dense)


def identity(fingerprint: str, batches: Sequence[Any], measure: str, recipe: Recipe) -> dict[str, str]:
    """What the points of an analysis depend on, for a `Journal`."""
    return {"model": fingerprint, "data": digest(batches), "measure": measure, "recipe": str(recipe)}


def _missing(known: Mapping[tuple[str, float], float], layers: Mapping[str, Layer], sparsity: float) -> bool:
    return any((name, sparsity) not in known for name in layers)


def _masks(
    model: nn.Module, batches: Sequence[Any], sparsity: float, recipe: Recipe, only: Only, skip: Only
) -> Masks:
    """Every layer's mask at one sparsity: alone or together is the same, since each is cut by its own scores."""
    return prune_(deepcopy(model), sparsity, recipe, data=batches, only=only, skip=skip)


Judge = Callable[[Layer | None, Tensor | None], float]


def _judge(
    model: nn.Module,
    batches: Sequence[Any],
    measure: str,
    loss: Loss | None,
    layers: Mapping[str, Layer],
    *,
    needed: bool,
) -> Judge:
    """A function that says what one mask costs."""
    if measure == "error":
        moments = gather(model, list(layers.values()), ["second_moment"], batches) if needed else {}
        return lambda layer, mask: _output_error(layer, mask, moments)
    if measure == "loss":
        return lambda layer, mask: _with(layer, mask, lambda: _mean_loss(model, batches, loss))
    dense = [_log_probabilities(model, batch) for batch in batches] if needed else []
    return lambda layer, mask: _with(layer, mask, lambda: _divergence(model, batches, dense))


def _with(layer: Layer | None, mask: Tensor | None, measured: Callable[[], float]) -> float:
    """Measured with one layer pruned; its weights are put back, bit for bit."""
    if layer is None or mask is None:
        return measured()
    weight = layer.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.masked_fill_(~mask.to(weight.device), 0)
        return measured()
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _output_error(
    layer: Layer | None, mask: Tensor | None, moments: Mapping[str, Mapping[str, Tensor]]
) -> float:
    assert layer is not None
    assert mask is not None
    weight = layer.layout.to_matrices(layer.weight.detach()).double()
    change = weight.masked_fill(layer.layout.to_matrices(mask).to(weight.device), 0)
    moment = moments[layer.name]["second_moment"].double().to(weight.device)
    whole = float(((weight @ moment) * weight).sum())
    lost = float(((change @ moment) * change).sum())
    return lost / whole if whole else 0.0


def _mean_loss(model: nn.Module, batches: Sequence[Any], loss: Loss | None) -> float:
    total, count = 0.0, 0
    with undisturbed(model):
        for batch in batches:
            value, many = loss_of(model, batch, loss)
            total, count = total + float(value) * many, count + many
    return total / count


def _log_probabilities(model: nn.Module, batch: Any) -> Tensor:
    """Of every real prediction: "predictions classes"."""
    inputs = _inputs(batch)
    with undisturbed(model):
        logits = logits_of(call(model, move(inputs, device_of(model)))).float()
    if not bool(logits.isfinite().all()):
        raise NumericError("the model says NaN or Inf; look at its weights and at the data")
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if logits.dim() == 3 and isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool().to(logits.device)]
    return logits.reshape(-1, logits.shape[-1]).log_softmax(-1).cpu()


def _divergence(model: nn.Module, batches: Sequence[Any], dense: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for batch, truth in zip(batches, dense, strict=True):
        found = _log_probabilities(model, batch)
        total += float((truth.exp() * (truth - found)).sum())
        count += len(truth)
    return max(total / count, 0.0)


def _inputs(batch: Any) -> Any:
    first = batch[0] if isinstance(batch, tuple | list) else batch
    return (
        {key: value for key, value in first.items() if key != "labels"} if isinstance(first, Mapping) else first
    )
