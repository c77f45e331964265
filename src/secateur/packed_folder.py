"""`secateur export DIR --to sparse`: a pruned model's folder without the zeros, which `secateur.load` runs packed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import model as models
from secateur import named_class, own, pretrained
from secateur.card import plain
from secateur.checkpoint import TOKENIZER_FILES, Checkpoint, look_through, read_object
from secateur.compact import is_compact, open_compact, read_compact, write_compact, write_instead
from secateur.deploy import Shrunk
from secateur.deploy.slots import ATTRIBUTE
from secateur.deploy.sparse import Sparsified, load_sparse_, save_sparse, sparsify_
from secateur.deploy.sparse.packed import Block
from secateur.deploy.twin import configuration
from secateur.errors import UsageError
from secateur.export import check_source
from secateur.folder import new_folder, write_json, write_text
from secateur.measure import Tell
from secateur.request import spec_name
from secateur.run import check_apart

__all__ = ["FILE", "export_packed", "is_packed", "load_packed", "opened", "source_of"]

FILE = "model.sparse.safetensors"
_OTHER = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def export_packed(
    spec: str,
    out: str | Path,
    *,
    kind: str | None = None,
    outer: str | None = None,
    block: Block = 1,
    if_exists: str = "fail",
    seed: int = 0,
    tell: Tell,
    **loading: Any,
) -> tuple[Sparsified, int, int]:
    """Load a pruned model, pack it, and write it with a manifest of checksums.

    Args:
        spec: a run's folder, or `file.py:function@FOLDER/model.safetensors`.
        out: the folder to write.
        kind, outer, block: see `sparsify_`. Every layer that is smaller packed is packed; which way it multiplies, and
            whether it had better be dense, is for the machine that loads it.
        if_exists: "fail" or "overwrite".
        seed: of everything random.
        tell: progress.
        loading: `offline`, `trust_remote_code`, `allow_pickle`.

    Returns:
        What was packed, and the bytes of the weights before and after.

    Raises:
        UsageError: nothing to pack.
        InputError: a file of the run is altered.
    """
    check_apart(spec.partition("@")[2] if own.is_own(spec) else spec, out)
    with new_folder(out, if_exists) as folder:
        tell("loading the model", 0, 1)
        loaded = models.load(spec, dtype=None if own.is_own(spec) else "auto", seed=seed, **loading)
        check_source(loaded)
        tell("packing", 0, 1)
        before = sum(tensor.nbytes for tensor in {id(p): p for p in loaded.model.parameters()}.values())
        small = isinstance(vars(loaded.model).get(ATTRIBUTE), Shrunk)
        config = None if small else configuration(loaded.model)
        if small:  # what was cut is said beside, as in a compact folder
            source = {"name": spec_name(spec), "sha256": loaded.fingerprint}
            write_compact(loaded.model, folder, source=source)
        done = sparsify_(loaded.model, kind, outer=outer, block=block, measure=False)
        save_sparse(loaded.model, folder / FILE)
        if small:
            write_instead(folder, folder / FILE)
        if config is not None:
            write_json(folder / "config.json", config)
        for name in (*TOKENIZER_FILES, *_OTHER):
            if loaded.folder is not None and (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, folder / name)
        after = (folder / FILE).stat().st_size
        write_text(folder / "README.md", _card(spec_name(spec), done, before, after))
        tell("packing", 1, 1)
    return done, before, after


def is_packed(folder: str | Path | None) -> bool:
    """Whether `export_packed` wrote this folder."""
    return folder is not None and (Path(folder) / FILE).is_file()


def load_packed(
    folder: Path, build: Callable[[], Any] | None = None, *, prefer: str | None = "speed", dense: bool = False
) -> nn.Module:
    """The model of such a folder in eval mode, its packed layers running packed.

    Args:
        folder: written by `export_packed`.
        build: for a module of one's own: gives the architecture with any weights.
        prefer, dense: see `load_sparse_`.

    Raises:
        UsageError: a module of one's own without `build`.
        InputError: a file is altered, or does not fit.
    """
    if is_compact(folder):
        how: dict[str, Any] = {"dense": True} if dense else {"prefer": prefer}
        return read_compact(open_compact(folder), build, **how)
    checkpoint = _described(folder, build is not None)
    if build is None:
        model = _of_config(checkpoint)
    else:
        built = build()
        model = copy.deepcopy(built[0] if isinstance(built, tuple) else built)
    return load_sparse_(model, folder / FILE, dense=dense, prefer=prefer).eval()


def opened(
    spec: str, *, device: torch.device | str = "cpu", seed: int = 0, speed: bool = True, **loading: Any
) -> models.Loaded:
    """A packed folder as the verbs that measure take a model: packed, with the same numbers dense beside, for counts.

    Args:
        spec: a folder that `export_packed` wrote, or `file.py:function@FOLDER`.
        device: where the packed model goes.
        seed: of the function.
        speed: on a CPU, multiply in the packed forms and ways that are fastest here, which are measured once; no dense
            weights are kept beside.
        loading: `dtype`, which has to be left out; others do not matter.

    Raises:
        UsageError: a dtype, an unusable device; a module of one's own without its function.
        InputError: a file is altered, or does not fit.
    """
    if loading.get("dtype") is not None:
        raise UsageError(f"{spec}: packed weights stay in the type that they were packed in; leave --dtype out")
    where = models.usable_device(device)
    place, build = source_of(spec, seed)
    assert place is not None
    checkpoint = _described(place, build is not None)
    model: Any = load_packed(place, build, prefer="memory" if speed and where.type == "cpu" else None)
    dense = load_packed(place, build, prefer=None, dense=True)
    made = build() if build is not None else None
    tokenizer = None
    if build is None:
        with pretrained.quiet():
            tokenizer = pretrained.tokenizer_of(checkpoint, model.config, False)
    loaded = models.Loaded(
        model, tokenizer, spec, "transformers" if build is None else "python", checkpoint.fingerprint, place,
        dict(checkpoint.files), example=made[1] if isinstance(made, tuple) else None, dense=dense,
    )  # fmt: skip
    return models.placed(where, loaded)


def source_of(spec: str, seed: int) -> tuple[Path | None, Callable[[], Any] | None]:
    """The folder of `FOLDER` or `file.py:function@FOLDER`, None where there is none; what builds one's own module.

    The file of packed weights stands for the folder in which it lies.
    """
    if not own.is_own(spec):
        return Path(spec).expanduser(), None
    path, function, weights = own.split(spec)
    place = Path(weights).expanduser() if weights else None
    if place is not None and place.name == FILE and place.is_file():
        place = place.parent
    return place, lambda: own.call(f"{path}:{function}", seed=seed)


def _described(folder: Path, built: bool) -> Checkpoint:
    """The folder's files, checked against its manifest."""
    if is_compact(folder):
        return open_compact(folder).checkpoint
    described = (folder / "config.json").is_file()
    if not built and not described:
        raise UsageError(
            f"{folder}: holds a model of your own code; say what builds it: secateur.load(folder, build), or "
            f"file.py:function@{folder}."
        )
    config = read_object(folder / "config.json") if described else {}
    return look_through(folder, config, [folder / FILE], [])


def _of_config(checkpoint: Checkpoint) -> nn.Module:
    """A model of transformers as its config builds it."""
    named_class.import_transformers()
    with pretrained.quiet(), own.seeded(0):
        model_class, config = named_class.class_and_config(checkpoint, False)
        whole = replace(checkpoint, elements=2**60)  # what is packed holds fewer numbers than the model
        with (
            named_class.told(checkpoint, f"cannot be built as {model_class.__name__}"),
            named_class.bounded(whole),
        ):
            model = model_class(config)
        dtype = models._DTYPES.get(str(config.dtype).removeprefix("torch."))
        model = model if dtype is None else model.to(dtype)
        pretrained.read_generation_(model, checkpoint)
    return model


def _card(name: str, done: Sparsified, before: int, after: int) -> str:
    """How to load it, and a table of its weights; names from outside can neither leave their place nor be code."""
    build = f", {name.partition('@')[0]!r}" if own.is_own(name) else ""
    call = " ".join(f"model = secateur.load('THIS FOLDER'{build})".replace("`", "'").split())
    name = plain(name)
    rows = "\n".join(
        f"| {plain(layer.name)} | {layer.kind} {layer.form} | {layer.sparsity:.1%} | {layer.dense_bytes:,} | "
        f"{layer.packed_bytes:,} |"
        for layer in done.layers
    )
    return (
        f"# {name}, packed\n\nThe weights of {name} without their zeros, written by secateur: {before:,} bytes are "
        f"{after:,}.\n\n```python\nimport secateur\n\n{call}\n```\n\n"
        f"| weight | held as | zeros | bytes | packed |\n|---|---|---|---|---|\n{rows}\n"
    )
