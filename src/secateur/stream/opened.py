"""A checkpoint in files and its modules on the meta device: enough to analyse it, to plan cuts, and to slice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import named_class, pretrained
from secateur.checkpoint import INTEGERS, Checkpoint, read_checkpoint
from secateur.core.example import analysis_of
from secateur.core.units import Analysis
from secateur.deploy.twin import built_empty
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.stream.architecture import Architecture
from secateur.stream.places import Places, find_places
from secateur.stream.shards import open_shards

__all__ = ["Opened", "analysed", "open_units", "read_source"]

LENGTH = 13  # tokens of the inputs on which it is analysed; no width of a model


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has not been read, but for its digests.

    Attributes:
        checkpoint: its files.
        kind: the class of its model.
        config: what that is built from.
        model: the modules on the meta device, buffers too.
        example: inputs to follow through it.
        places: where every tensor lies.
    """

    checkpoint: Checkpoint
    kind: Any
    config: Any
    model: Any
    example: dict[str, Tensor]
    places: Places

    def whole(self) -> Any:
        """The modules anew, buffers with their values."""
        config = self.kind.config_class.from_dict(self.config.to_dict())
        return built_empty(self.kind, config, buffers=True).eval()


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


def read_source(source: str | Path, tell: Tell = _silent) -> Checkpoint:
    """Find and check the files of a checkpoint; every file is read once, for its digest."""
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; streaming needs a local folder with safetensors files")
    tell("reading the checkpoint", 0, 1)
    checkpoint = read_checkpoint(path)
    tell("reading the checkpoint", 1, 1)
    if INTEGERS in checkpoint.files:
        raise UsageError(
            f"{path / INTEGERS}: holds integers, which are not pruned from file to file; leave --stream out, or write "
            "a checkpoint first (secateur.load and secateur.save)"
        )
    return checkpoint


def open_units(source: str | Path, tell: Tell) -> Opened:
    """Read the headers of a checkpoint and build its modules without values.

    Raises:
        UsageError: a model that reads no tokens; an unknown architecture.
        InputError: the files are unsound.

    Cost: a read of all files, for their digests.
    """
    checkpoint = read_source(source, tell)
    kind, config, model = _built(checkpoint, False)
    places = find_places(Architecture(model, True), open_shards(checkpoint))
    return Opened(checkpoint, kind, config, model, _tokens(model), places)


def analysed(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Analysis:
    """The axes of a checkpoint's model, found on the meta device; no weight is read.

    Raises:
        UsageError: a model that reads no tokens, or that cannot be exported.
    """
    _, _, model = _built(checkpoint, trust_remote_code)
    return analysis_of(model, _tokens(model))[0]


def _built(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any, Any]:
    """Class, config and modules, everything on the meta device."""
    with pretrained.quiet():
        kind, config = named_class.class_and_config(checkpoint, trust_remote_code)
    with pretrained.quiet(), named_class.bounded(checkpoint):
        return kind, config, built_empty(kind, config).eval()


def _tokens(model: Any) -> dict[str, Tensor]:
    if getattr(model, "main_input_name", "") != "input_ids":
        raise UsageError(
            f"{type(model).__name__}: does not read tokens; load it, use shrink and save, or secateur export --data"
        )
    ids = torch.zeros((2, LENGTH), dtype=torch.long, device="meta")
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :-2]} if model.config.is_encoder_decoder else {})}
