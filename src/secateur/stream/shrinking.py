"""shrink_checkpoint: whole units taken out of a checkpoint from file to file; the model itself is never in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur import pretrained
from secateur.checkpoint import TOKENIZER_FILES, Checkpoint
from secateur.compact import COMPACT, compact_text
from secateur.core.axes.program import narrow_tensor
from secateur.core.masks import Masks
from secateur.core.stored import save_tensors
from secateur.deploy.cuts import cut
from secateur.deploy.describe import describe
from secateur.deploy.shrunk import Shrunk
from secateur.deploy.unseen import plan_cuts
from secateur.errors import UsageError
from secateur.folder import new_folder, write_json
from secateur.manifest import sha256
from secateur.measure import Tell
from secateur.run import check_apart
from secateur.shrunken import check_form
from secateur.stream.memory import parse_memory
from secateur.stream.opened import Opened, open_units
from secateur.stream.places import Places
from secateur.stream.shards import FLOATING
from secateur.stream.writing import Kind, write_tensors

__all__ = ["check_streamed_form", "shrink_checkpoint", "write_small"]

SHARD = "2 GB"


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


def shrink_checkpoint(
    source: str | Path,
    masks: Masks | Mapping[str, Any],
    target: str | Path,
    *,
    to: str = "auto",
    shard: str | int = SHARD,
    if_exists: str = "fail",
    tell: Tell = _silent,
) -> str:
    """Take whole units out of a checkpoint that may be larger than memory.

    The model is built, analysed and cut on the meta device. There is no output to compare, so the graph of the small
    model is compared with the pruned graph, operator by operator. Then one tensor after another is read, sliced and
    written.

    Args:
        source: a local folder in Hugging Face format with safetensors files, of a model that reads tokens.
        masks: whole units; or axis name -> units that stay, which needs no memory, such as `choose_units` gives.
        target: the folder to write.
        to: "hf", "compact" or "auto", see `secateur.save`.
        shard: how much of the source goes into one weight file.
        if_exists: "fail" or "overwrite".
        tell: progress.

    Returns:
        "hf" or "compact".

    Raises:
        UsageError: masks that are no whole units; an axis that the modules cannot follow; tensors that are stored in
            pieces; a form that cannot say the result.
        InputError: the files are unsound.

    Cost: a read for the digests, another to write; memory for one tensor.
    """
    check_streamed_form(to)
    check_apart(str(source), target)
    parse_memory(shard)
    with new_folder(target, if_exists) as folder:
        opened = open_units(source, tell)
        tell("planning the cuts", 0, 1)
        note = plan_cuts(opened.model, masks, opened.example)
        tell("planning the cuts", 1, 1)
        return write_small(opened, note, folder, to=to, shard=shard, tell=tell)


def check_streamed_form(to: str) -> None:
    """Refuse a form that is not written from file to file.

    Raises:
        UsageError: an unknown form, or padded.
    """
    check_form(to)
    if to == "padded":
        raise UsageError('to="padded": the source with its zeros is that already')


def write_small(
    opened: Opened, note: Shrunk, folder: Path, *, to: str, shard: str | int = SHARD, tell: Tell
) -> str:
    """Write the small model into a folder that is there; "hf" or "compact".

    Args:
        opened: the source.
        note: the cuts, from `plan_cuts`.
        folder: written into.
        to, shard, tell: see `shrink_checkpoint`.
    """
    small = cut(opened.whole(), note)
    described = _described(small, to)
    size = parse_memory(shard) or 0
    written = _written(opened.model, note, opened.places, folder, size, described is not None, tell)
    _copied(opened.checkpoint, folder)
    if described is None:
        apart = _apart(small, folder)
        made_from = {
            "name": opened.checkpoint.folder.resolve().name,
            "sha256": opened.checkpoint.fingerprint,
        }
        write_json(folder / COMPACT, compact_text(note, {**written, **apart[1]}, apart[0], made_from))
        return "compact"
    with pretrained.quiet():
        described.architectures = [opened.kind.__name__]
        described.dtype = opened.checkpoint.dtype
        described.save_pretrained(folder)
    return "hf"


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


def _written(
    model: nn.Module, note: Shrunk, places: Places, folder: Path, size: int, plain: bool, tell: Tell
) -> dict[str, str]:
    """Slice tensor after tensor into files of about `size` bytes; file -> SHA-256."""
    stored = _stored(model, places)
    parts = _parts(stored, places, size)
    found: dict[str, str] = {}
    where: dict[str, str] = {}
    total = 0
    for at, names in enumerate(parts):
        file = f"model-{at + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        called = {places.pieces[name][0].name if plain else name: name for name in names}
        kinds = {key: _kind(places, note, name) for key, name in called.items()}
        total += sum(kind.itemsize * _numbers(shape) for kind, shape in kinds.values())
        where |= dict.fromkeys(kinds, file)

        def sliced(key: str, called: Mapping[str, str] = called) -> Tensor:
            return narrow_tensor(places.read(called[key]), list(note.index.get(called[key], ())))

        tied = _tied(model, names, stored, places, plain)
        metadata = {"tied": json.dumps(tied, sort_keys=True)} if tied else {"format": "pt"}
        found[file] = write_tensors(folder / file, kinds, sliced, metadata)
        tell("writing", at + 1, len(parts))
    if plain and len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    return found


def _parts(stored: Sequence[str], places: Places, size: int) -> list[list[str]]:
    """The names of each file, in their order; about `size` bytes of the source go into one."""
    parts: list[list[str]] = [[]]
    held = 0
    for name in stored:
        length = places.shards.tensors[places.pieces[name][0].name].size
        if held and held + length > size:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += length
    return parts


def _kind(places: Places, note: Shrunk, name: str) -> Kind:
    """Type and shape of a tensor after the cut."""
    shape = list(places.shapes[name])
    for dim, kept in enumerate(note.index.get(name, ())):
        if kept is not None:
            shape[dim] = len(kept)
    return places.kind(name), tuple(shape)


def _numbers(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


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
        kind = places.shards.tensors[pieces[0].name].kind
        if kind not in FLOATING:
            raise UsageError(f"{name}: stored as {kind}, which is no floating-point type; use shrink and save")
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


def _apart(small: nn.Module, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Buffers that are in no state, in a file of their own."""
    saved = small.state_dict(keep_vars=True)
    found = {
        n: b.contiguous().clone() for n, b in small.named_buffers(remove_duplicate=False) if n not in saved
    }
    if not found:
        return [], {}
    save_tensors(folder / "buffers.safetensors", found, {"format": "pt"})
    return sorted(found), {"buffers.safetensors": sha256(folder / "buffers.safetensors")}


def _copied(checkpoint: Checkpoint, folder: Path) -> None:
    for path in _beside(checkpoint):
        (folder / path.name).write_bytes(path.read_bytes())


def _beside(checkpoint: Checkpoint) -> Iterator[Path]:
    for name in (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json"):
        if name in checkpoint.files:
            yield checkpoint.folder / name
