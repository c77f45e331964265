"""Texts become vectors as sentence-embedding models make them, and a map becomes a module of such a model.

The folder format is the one of the package sentence-transformers: `modules.json` lists a transformer, a pooling,
and whatever follows. A map stored as its module `Dense` is loaded by that package without anything of ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.align import Affine
from secateur.checkpoint import read_object
from secateur.core.forward import call, device_of, undisturbed
from secateur.core.stored import save_tensors
from secateur.errors import UsageError, nearest
from secateur.manifest import write_json
from secateur.measure import Tell

__all__ = ["POOLINGS", "encode", "encode_batches", "pooling_of", "write_modules"]

POOLINGS = ("mean", "cls", "last")
_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
_MODULES = "sentence_transformers.models."


def encode(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    context: int = 256,
    batch: int = 32,
    tell: Tell = lambda label, done, total: None,
    label: str = "embedding texts",
) -> Tensor:
    """One vector a text: the last hidden states, pooled over the real tokens, not normalised.

    Args:
        model: gives `last_hidden_state` "batch tokens width"; its mode is put back afterwards.
        tokenizer: a transformers tokenizer.
        texts: at least one.
        pooling: "mean" over the real tokens, "cls" (the first) or "last".
        context: tokens of a text that are read; the rest is cut off.
        batch: texts at once; texts of like length are put together, and how does not change a vector but by rounding.
        tell: progress.
        label: what the progress is called.

    Returns:
        "texts width" in single precision on the CPU, in the order of the texts.

    Raises:
        UsageError: no texts, an unknown pooling, no tokenizer, or a model that gives no hidden states.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"pooling {pooling!r} is not known; {nearest(pooling, POOLINGS)}")
    if not texts or tokenizer is None or min(context, batch) < 1:
        raise UsageError("embedding needs texts, a tokenizer, and a context and batch of at least 1")
    order = sorted(range(len(texts)), key=lambda at: (-len(texts[at]), at))
    rows: list[Tensor] = []
    with undisturbed(model):
        for start in range(0, len(order), batch):
            tell(label, start, len(order))
            given = tokenizer(
                [texts[at] for at in order[start : start + batch]],
                padding=True,
                truncation=True,
                max_length=context,
                return_tensors="pt",
            ).to(device_of(model))
            rows.append(_pooled(_hidden(model, given), given["attention_mask"], pooling).float().cpu())
        tell(label, len(order), len(order))
    found = torch.cat(rows)
    result = torch.empty_like(found)
    result[order] = found
    return result


def encode_batches(model: nn.Module, batches: Sequence[Any], *, label: str, tell: Tell) -> Tensor:
    """One vector an example, of a model that gives a tensor "batch width", for batches of the user's own.

    Args:
        batches: tensors, tuples of which the first entry is the input, or mappings of named arguments.

    Raises:
        UsageError: the model gives something else.
    """
    rows = []
    with undisturbed(model):
        for at, batch in enumerate(batches):
            tell(label, at, len(batches))
            first = batch[0] if isinstance(batch, tuple | list) else batch
            output = call(model, first)
            if not isinstance(output, Tensor) or output.dim() != 2:
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UsageError(
                    f"expected one vector an example from the model, shape (batch, width), got {got}"
                )
            rows.append(output.float().cpu())
        tell(label, len(batches), len(batches))
    return torch.cat(rows)


def pooling_of(folder: Path | None) -> str | None:
    """The pooling that a folder of sentence-transformers names; None where it names none.

    Raises:
        UsageError: a pooling that is not among `POOLINGS`, or several at once.
    """
    if folder is None or not (folder / "1_Pooling" / "config.json").is_file():
        return None
    config = read_object(folder / "1_Pooling" / "config.json")
    if isinstance(config.get("pooling_mode"), str):
        chosen = [{"lasttoken": "last"}.get(config["pooling_mode"], config["pooling_mode"])]
    else:
        chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        chosen = [next((name for name, flag in _FLAGS.items() if flag == key), key) for key in chosen]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UsageError(
            f"{folder}/1_Pooling: {' and '.join(chosen) or 'no pooling'} is not one of {', '.join(POOLINGS)}; "
            "say which with --pooling"
        )
    return chosen[0]


def write_modules(folder: Path, map: Affine, *, pooling: str, context: int) -> None:
    """Make a transformers folder one of sentence-transformers, with the map as its module Dense.

    The order is transformer, pooling, normalisation, map, normalisation: the map was fitted on vectors of length 1, and
    gives vectors whose cosines count.

    Raises:
        UsageError: an unknown pooling.
    """
    if pooling not in _FLAGS:
        raise UsageError(f"pooling {pooling!r} is not known; {nearest(pooling, _FLAGS)}")
    width_in, width_out = map.matrix.shape
    names = ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize", "3_Dense", "4_Normalize"]
    for path in paths[1:]:
        (folder / path).mkdir(exist_ok=True)
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": _MODULES + name}
        for at, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": context, "do_lower_case": False})
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width_in, **{flag: name == pooling for name, flag in _FLAGS.items()}},
    )
    write_json(
        folder / "3_Dense" / "config.json",
        {
            "in_features": width_in,
            "out_features": width_out,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    dense = {"linear.weight": map.matrix.T.float().contiguous(), "linear.bias": map.shift.float()}
    save_tensors(folder / "3_Dense" / "model.safetensors", dense, {"format": "pt"})
    for path in ("2_Normalize", "4_Normalize"):
        write_json(folder / path / "config.json", {})


def _hidden(model: nn.Module, given: Any) -> Tensor:
    output = model(**given)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UsageError(
            f"{type(model).__name__} gives no last_hidden_state, so it is no embedding model; take one without a head"
        )
    return hidden


def _pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Padding, on whichever side, takes no part."""
    if pooling == "mean":
        weight = mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "cls":
        at = torch.where(mask.bool(), positions, mask.shape[1] - 1).min(1).values
    else:
        at = torch.where(mask.bool(), positions, 0).max(1).values
    return hidden[torch.arange(len(hidden), device=hidden.device), at]
