"""The modules of a checkpoint without its weights: built on the meta device, to know layers and roles.

Where transformers does not know the architecture a stand-in is made of the names and shapes in the files: good
enough to choose layers and to prune them without data, not to run them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from secateur import named_class, pretrained
from secateur.checkpoint import Checkpoint
from secateur.errors import InputError, UsageError
from secateur.stream.shards import FLOATING, Shards

__all__ = ["Architecture", "build_empty"]

_EMBEDDING = re.compile(r"emb|^wte$|^wpe$|position|token_type")
_NORM = re.compile(r"norm|^ln(_|\d|$)|layer_?norm|^bn(\d|$)")


@dataclass(frozen=True)
class Architecture:
    """A model whose parameters have shapes and no values; its buffers have both.

    Attributes:
        model: the modules.
        known: whether transformers knows the architecture, so that the model can be run.
        note: a sentence for the plan where it is not known.
    """

    model: Any
    known: bool
    note: str = ""


def build_empty(checkpoint: Checkpoint, shards: Shards, *, trust_remote_code: bool = False) -> Architecture:
    """Build the modules of a checkpoint without reading a weight.

    Raises:
        InputError: config.json and the files do not belong together.
        UsageError: the model needs the folder's own code, or its weights are quantized.
    """
    reason = _unknown(checkpoint, trust_remote_code)
    if reason:
        return Architecture(
            _stand_in(checkpoint, shards),
            False,
            f"{reason}, so layers are found by names and shapes: every floating-point matrix NAME.weight that is "
            "no embedding and no norm",
        )
    with pretrained.quiet():
        model_class, config = named_class.class_and_config(checkpoint, trust_remote_code)
        with (
            named_class.told(checkpoint, f"cannot be built as {model_class.__name__}"),
            named_class.bounded(checkpoint),
            hooks.register_module_parameter_registration_hook(_without_values),  # type: ignore[arg-type]
            torch.random.fork_rng([]),
        ):
            model = model_class(config)
    return Architecture(model.eval(), True)


def _unknown(checkpoint: Checkpoint, trust_remote_code: bool) -> str:
    """Why the model cannot be built; empty where it can."""
    try:
        named_class.import_transformers()
    except UsageError:
        return "transformers is not installed"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return ""
    if "auto_map" in checkpoint.config and trust_remote_code:
        return ""
    return f'model_type "{kind}" is not known to transformers'


def _without_values(owner: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
    """Take a parameter's memory away as soon as it is registered."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _stand_in(checkpoint: Checkpoint, shards: Shards) -> nn.Module:
    root = nn.Module()
    found = False
    for name, stored in shards.tensors.items():
        path, _, last = name.rpartition(".")
        words = path.lower().split(".")
        if last != "weight" or not path or len(stored.shape) != 2 or stored.kind not in FLOATING:
            continue
        out, columns = stored.shape
        if not (out and columns) or any(_NORM.search(word) for word in words):
            continue
        if any(_EMBEDDING.search(word) for word in words):
            made: nn.Module = nn.Embedding(out, columns, device="meta")
        else:
            made, found = nn.Linear(columns, out, bias=False, device="meta"), True
        _place(root, path, made)
    if not found:
        raise InputError(f"{checkpoint.folder}: no floating-point matrix NAME.weight that could be pruned.")
    return root


def _place(root: nn.Module, path: str, made: nn.Module) -> None:
    *around, last = path.split(".")
    owner = root
    for word in around:
        if word not in owner._modules:
            owner.add_module(word, nn.Module())
        owner = owner._modules[word]  # type: ignore[assignment]
    if last not in owner._modules:
        owner.add_module(last, made)
        return
    inner = owner._modules[last]  # a matrix that has modules below it as well: keep both
    assert inner is not None
    inner.register_parameter("weight", made.weight)  # type: ignore[arg-type]
