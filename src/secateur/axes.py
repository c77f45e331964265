"""`secateur inspect --axes`: every axis along which a model can shrink, in words, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur import data, own
from secateur.core.axes.blocks import analyse_blocks
from secateur.core.example import analysis_of, prepared
from secateur.core.misfit import MisfitError
from secateur.core.units import Analysis, Units
from secateur.deploy.decoupling import Decoupling, decouple_, decoupling, entries_of
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.model import Loaded
from secateur.sources import example_of, input_of

__all__ = ["Axes", "axes_of", "input_for"]


@dataclass(frozen=True)
class Axes:
    """The axes of a model.

    Attributes:
        analyses: submodule path -> its analysis; "" is the whole model, several where it cannot be exported as a whole.
        refused: submodule path -> why nothing in it can be pruned.
        why: why the model was taken apart, "" where it was not.
        decoupled: what was decoupled first, and its cost.
    """

    analyses: Mapping[str, Analysis]
    refused: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    decoupled: Decoupling | None = None

    def __str__(self) -> str:
        lines = [] if self.decoupled is None else [f"decoupled:\n{self.decoupled}", ""]
        if self.why:
            lines += [f"not exported as a whole, so its parts were, their borders frozen: {self.why}", ""]
        for path, analysis in self.analyses.items():
            lines += [f"{path}:"] if path else []
            lines += [_said(analysis), ""]
        lines += [f"not analysed: {path}: {reason}" for path, reason in self.refused.items()]
        return "\n".join(lines).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every member by name."""
        rows: list[Any] = []
        frozen: list[Any] = []
        unused: list[str] = []
        unruled: dict[str, str] = {}
        for path, analysis in self.analyses.items():
            at = f"{path}." if path else ""
            rows += [_row(analysis, units, path) for units in analysis.units]
            frozen += [
                {"reason": str(each.reason), "members": [[at + name, dim] for name, dim in each.members]}
                for each in analysis.frozen
            ]
            unused += [at + name for name in analysis.unused]
            unruled |= analysis.unruled
        return {"axes": rows, "frozen": frozen, "unused": unused, "operators without a rule": unruled,
                "not analysed": dict(self.refused), "taken apart": self.why,
                "decoupled": self._decoupled()}  # fmt: skip

    def _decoupled(self) -> dict[str, Any] | None:
        made = self.decoupled
        if made is None:
            return None
        cost = {"bytes of indices": made.bytes_kept, "bytes moved a token": made.bytes_moved, "macs": made.macs}
        return {"taps": entries_of(made.taps), **cost}


def _row(analysis: Analysis, units: Units, path: str) -> dict[str, Any]:
    at = f"{path}." if path else ""
    return {
        "name": units.name,
        "in": path,
        "kind": units.kind,
        "size": units.size,
        "parameters of a unit": analysis.unit_size(units.name),
        "exact": units.exact,
        "reason": units.reason,
        "made in the forward": list(units.constants),
        "members": [
            {"name": at + m.name, "dim": m.dim, "width": m.indices.shape[1], "tied": list(m.aliases)}
            for m in units.members
        ],
    }


def _said(analysis: Analysis) -> str:
    """The analysis in words, with what a unit holds, and a line of sums."""
    kinds: dict[str, list[int]] = {}
    for units in analysis.units:
        kinds.setdefault(units.kind, []).append(units.size)
    sums = [f"{len(sizes)} of kind {kind} with {sum(sizes):,} units" for kind, sizes in kinds.items()]
    total = f"{analysis.parameter_count():,} parameters"
    return f"{analysis}\n{len(analysis.units)} prunable axes: {', '.join(sums) or 'none'}; {total}"


def axes_of(loaded: Loaded, batches: str | None, tell: Tell, decouple: Sequence[str] = ()) -> Axes:
    """Find the axes of a loaded model.

    Args:
        loaded: the model.
        batches: file.py:function whose first batch is followed through the model; None where an input is known.
        tell: progress.
        decouple: what is decoupled first, in the loaded model; see `decoupling`.

    Raises:
        UsageError: no input is known, or neither the model nor any part of it can be exported.
    """
    given = input_for(loaded, batches)
    tell("axes of the model", 0, 1)
    made = None
    if decouple:
        made = decoupling(loaded.model, given, decouple)
        decouple_(loaded.model, made, given)
    try:
        found = Axes({"": analysis_of(loaded.model, given)[0]})
    except MisfitError:
        raise
    except UsageError as error:
        example = prepared(loaded.model, given)
        try:
            parts = analyse_blocks(loaded.model, example.args, example.kwargs)
        except UsageError as none:
            raise UsageError(f"{error} Nor can its parts: {none}") from None
        found = Axes(parts.analyses, parts.refused, str(error))
    tell("axes of the model", 1, 1)
    return replace(found, decoupled=made)


def input_for(loaded: Loaded, batches: str | None) -> Any:
    """One input of a loaded model: the user's, the function's own, a few words, or an image of the config's size.

    Raises:
        UsageError: nothing says what the model takes.
    """
    if batches is not None:
        if not own.is_own(batches):
            raise UsageError(
                f"--data {batches}: axes need one input, not text; give file.py:function, or leave it out"
            )
        return input_of(data.read_batches(batches, seed=0, limit=1)[0])
    if loaded.example is not None:
        return loaded.example
    if loaded.tokenizer is not None:
        found = example_of(loaded.model, data.stream(["one two three four five six seven"], loaded.tokenizer))
        if found is not None:
            return found
    found = _image(loaded.model)
    if found is None:
        raise UsageError(
            "axes are found by following one input through the model, and nothing says what it takes; give --data "
            "file.py:function (its first batch serves), or a model function that returns (model, example)"
        )
    return found


def _image(model: nn.Module) -> Any:
    """Two images of the size that a config names."""
    config: Any = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if getattr(model, "main_input_name", "") != "pixel_values" or not isinstance(channels, int):
        return None
    height, width = size if isinstance(size, list | tuple) else (size or 224,) * 2
    kind = next(model.parameters()).dtype
    return {"pixel_values": torch.randn(2, channels, height, width).to(kind)}
