"""`save` and `load`: a shrunk model in a folder, and back, in a process that knows nothing of how it was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import model as models
from secateur import own
from secateur.compact import is_compact, open_compact, read_compact
from secateur.errors import UsageError
from secateur.folder import new_folder
from secateur.packed_folder import is_packed, load_packed
from secateur.shrunken import check_form

__all__ = ["load", "save"]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    to: str = "auto",
    tokenizer: Any = None,
    source: str | Path | None = None,
    if_exists: str = "fail",
) -> str:
    """Write a model, shrunk or not, into a folder from which it loads again.

    Args:
        model: not changed. What `shrink` made may have been trained further.
        folder: written beside its place and renamed, with a manifest of checksums.
        to: "hf": a plain checkpoint, smaller, that stock `from_pretrained` loads, where a config can say the widths;
            "padded": one at the whole size with zeros where it cannot; "compact": safetensors and what was
            cut, for `secateur.load`; "auto": hf where that can be, else compact.
        tokenizer: saved beside the model.
        source: the folder of the model it was made from; its tokenizer files are copied, and its hash is noted.
        if_exists: "fail" or "overwrite".

    Returns:
        "hf", "padded" or "compact".

    Raises:
        UsageError: the form cannot say this model; why, and what can.

    Cost: a copy of the state; for a plain checkpoint the model is loaded again and run once on two rows.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from secateur import load, save, shrink
        >>> def build():
        ...     return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = shrink(build(), {"feed-forward units of 0,2": [1, 5, 6]}, torch.randn(4, 3))
        >>> with TemporaryDirectory() as place:
        ...     save(small, f"{place}/small"), load(f"{place}/small", build)[0]
        ('compact', Linear(in_features=3, out_features=3, bias=True))
    """
    check_form(to)
    made_from: dict[str, Any] = {}
    if source is not None:
        if not Path(source).is_dir():
            raise UsageError(f"source={source}: no such folder.")
        made_from = {"name": Path(source).resolve().name, "sha256": models.weights_digest(Path(source))}
    with new_folder(folder, if_exists) as place:
        return models.save(model, tokenizer, place, source=source, to=to, made_from=made_from)


def load(
    folder: str | Path,
    build: Callable[[], Any] | str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    prefer: str = "speed",
) -> nn.Module:
    """The model of a folder that `save` or the command line wrote, in eval mode; no code in a file is ever run.

    Args:
        folder: plain, padded, compact, or packed by `secateur export --to sparse`: then layers run packed, on the CPU
            and in the type they were stored in.
        build: for a module of one's own: a function without arguments, or `file.py:function`, that builds it as it
            was before it was shrunk, with any weights.
        dtype: of the floating-point parameters; "auto" is what the files hold.
        device: where it goes.
        prefer: for a packed folder. "speed": every layer in the form and way that is fastest at each batch on this
            machine, which is measured once and kept (`SECATEUR_CACHE`); dense weights are held beside or instead where
            those are faster. "memory": packed weights alone.

    Raises:
        UsageError: no such folder; a module of one's own, or a folder that says nothing of its model, without `build`.
        InputError: a file is truncated, garbled, altered, or does not fit, by name.

    Cost: memory for the model as it is stored.
    """
    place = Path(folder).expanduser()
    if is_packed(place):
        given = own.split(build)[:2] if isinstance(build, str) else None
        code = (lambda: own.call(f"{given[0]}:{given[1]}", seed=0)) if given else build
        return load_packed(place, code, prefer=prefer)  # type: ignore[arg-type]
    if isinstance(build, str):
        path, function, _ = own.split(build)
        return models.load(f"{path}:{function}@{place}", dtype=dtype, device=device, offline=True).model
    if build is None:
        if is_compact(place) and not open_compact(place).pretrained:
            read_compact(open_compact(place))  # says that it needs build
        if place.is_dir() and not is_compact(place) and not (place / "config.json").exists():
            raise UsageError(
                f"{place}: no config.json says what model these weights are of; say what builds it: "
                "secateur.load(folder, build), with a function or 'file.py:function'"
            )
        return models.load(place, dtype=dtype, device=device, offline=True).model
    if not place.is_dir():
        raise UsageError(f"{place}: no such folder.")
    return models.load_built(build, place, dtype=dtype, device=device)
