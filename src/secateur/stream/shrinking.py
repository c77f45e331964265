"""shrink_checkpoint: whole units taken out of a checkpoint from file to file; the model itself is never in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import pretrained
from secateur.checkpoint import TOKENIZER_FILES, Checkpoint
from secateur.compact import COMPACT, compact_text
from secateur.core.axes.program import narrow_tensor
from secateur.core.masks import Masks
from secateur.deploy.cuts import cut
from secateur.deploy.describe import describe
from secateur.deploy.shrunk import Shrunk
from secateur.deploy.twin import built_empty
from secateur.deploy.unseen import plan_cuts
from secateur.errors import UsageError
from secateur.folder import new_folder, write_json
from secateur.manifest import sha256
from secateur.measure import Tell
from secateur.run import check_apart
from secateur.shrunken import check_form
from secateur.stream.architecture import Architecture
from secateur.stream.job import read_source
from secateur.stream.memory import parse_memory
from secateur.stream.places import Places, find_places
from secateur.stream.shards import open_shards

__all__ = ["shrink_checkpoint"]

LENGTH = 13  # tokens of the inputs on which it is analysed; no width of a model


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


def shrink_checkpoint(
    source: str | Path,
    masks: Masks | Mapping[str, Any],
    target: str | Path,
    *,
    to: str = "auto",
    shard: str | int = "2 GB",
    if_exists: str = "fail",
    tell: Tell = _silent,
) -> str:
    """Take whole units out of a checkpoint that may be larger than memory.

    The model is built, analysed and cut on the meta device. There is no output to compare, so the graph of the small
    model is compared with the pruned graph, operator by operator. Then one tensor after another is read, sliced and
    written.

    Args:
        source: a local folder in Hugging Face format with safetensors files, of a model that reads tokens.
        masks: whole units; or axis name -> units that stay, which needs no memory.
        target: the folder to write.
        to: "hf", "compact" or "auto", see `secateur.save`.
        shard: size of a weight file, which is what is held in memory.
        if_exists: "fail" or "overwrite".
        tell: progress.

    Returns:
        "hf" or "compact".

    Raises:
        UsageError: masks that are no whole units; an axis that the modules cannot follow; tensors that are stored in
            pieces; a form that cannot say the result.
        InputError: the files are unsound.

    Cost: a read for the digests, another to write; memory for one weight file and one tensor.
    """
    check_form(to)
    if to == "padded":
        raise UsageError('to="padded": the source with its zeros is that already')
    check_apart(str(source), target)
    size = parse_memory(shard)
    with new_folder(target, if_exists) as folder:
        checkpoint = read_source(source, tell)
        with pretrained.quiet():
            kind, config = pretrained._class_and_config(checkpoint, False)
        with pretrained.quiet(), pretrained._bounded(checkpoint):
            model: Any = built_empty(kind, config).eval()
        tell("analysing", 0, 1)
        note = plan_cuts(model, masks, _tokens(model))
        tell("analysing", 1, 1)
        whole = built_empty(kind, kind.config_class.from_dict(config.to_dict()), buffers=True).eval()
        small = cut(whole, note)
        described = _described(small, to)
        places = find_places(Architecture(model, True), open_shards(checkpoint))
        written = _written(model, note, places, folder, size or 0, plain=described is not None, tell=tell)
        _copied(checkpoint, folder)
        if described is None:
            apart = _apart(small, folder)
            text = compact_text(note, {**written, **apart[1]}, apart[0], _made_from(checkpoint))
            write_json(folder / COMPACT, text)
            return "compact"
        with pretrained.quiet():
            described.architectures = [kind.__name__]
            described.dtype = checkpoint.dtype
            described.save_pretrained(folder)
        return "hf"


def _tokens(model: Any) -> dict[str, Tensor]:
    if getattr(model, "main_input_name", "") != "input_ids":
        raise UsageError(
            f"{type(model).__name__}: does not read tokens; load it, use shrink and save, or secateur export --data"
        )
    ids = torch.zeros((2, LENGTH), dtype=torch.long, device="meta")
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :-2]} if model.config.is_encoder_decoder else {})}


def _described(small: nn.Module, to: str) -> Any:
    """The config that says the small model; None where there is none and none has to be."""
    if to == "compact":
        return None
    try:
        return describe(small)
    except UsageError:
        if to == "hf":
            raise
        return None


def _made_from(checkpoint: Checkpoint) -> dict[str, str]:
    return {"name": checkpoint.folder.resolve().name, "sha256": checkpoint.fingerprint}


def _written(
    model: nn.Module, note: Shrunk, places: Places, folder: Path, size: int, *, plain: bool, tell: Tell
) -> dict[str, str]:
    """Slice tensor after tensor into files of about `size` bytes; file -> SHA-256."""
    stored = _stored(model, places)
    parts: list[list[str]] = [[]]
    held = 0
    for name in stored:
        length = places.shards.tensors[places.pieces[name][0].name].size
        if held and held + length > size:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += length
    found: dict[str, str] = {}
    where: dict[str, str] = {}
    total = 0
    for at, names in enumerate(parts):
        file = f"model-{at + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            value = narrow_tensor(places.read(name), list(note.index.get(name, ())))
            tensors[places.pieces[name][0].name if plain else name] = value.contiguous()
        total += sum(value.numel() * value.element_size() for value in tensors.values())
        where |= dict.fromkeys(tensors, file)
        _save(tensors, folder / file, _tied(model, names, stored, places, plain))
        found[file] = sha256(folder / file)
        tell("writing", at + 1, len(parts))
    if plain and len(parts) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )
    return found


def _stored(model: nn.Module, places: Places) -> list[str]:
    """One name for every tensor that is stored, all in one piece; in the order of the files."""
    state = model.state_dict()
    places.check(state)
    names: dict[str, str] = {}
    for name in state:
        pieces = places.pieces[name]
        if len(pieces) > 1 or pieces[0].region:
            raise UsageError(
                f"{name}: the files hold it in {len(pieces)} pieces (experts); load the model and use shrink and save"
            )
        names.setdefault(pieces[0].name, name)
    order = {name: at for at, name in enumerate(places.shards.tensors)}
    return [names[key] for key in sorted(names, key=order.__getitem__)]


def _tied(
    model: nn.Module, names: Sequence[str], stored: Sequence[str], places: Places, plain: bool
) -> dict[str, str]:
    """Other name -> name of tensors in this file, for the compact form."""
    if plain:
        return {}
    own = {places.pieces[name][0].name: name for name in names}
    return {
        alias: own[places.pieces[alias][0].name]
        for alias in model.state_dict()
        if alias not in stored and places.pieces[alias][0].name in own
    }


def _save(tensors: dict[str, Tensor], path: Path, tied: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"tied": json.dumps(tied, sort_keys=True)} if tied else {"format": "pt"})


def _apart(small: nn.Module, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Buffers that are in no state, in a file of their own."""
    saved = small.state_dict(keep_vars=True)
    found = {
        n: b.contiguous().clone() for n, b in small.named_buffers(remove_duplicate=False) if n not in saved
    }
    if not found:
        return [], {}
    _save(found, folder / "buffers.safetensors", {})
    return sorted(found), {"buffers.safetensors": sha256(folder / "buffers.safetensors")}


def _copied(checkpoint: Checkpoint, folder: Path) -> None:
    for path in _beside(checkpoint):
        (folder / path.name).write_bytes(path.read_bytes())


def _beside(checkpoint: Checkpoint) -> Iterator[Path]:
    for name in (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json"):
        if name in checkpoint.files:
            yield checkpoint.folder / name
