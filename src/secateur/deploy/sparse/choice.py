"""Which way to multiply is fastest here: measured once a machine for each kind of matrix, and kept in a file.

A way is chosen by the kind of the values, the share of zeros in tenths, the block, the type of the dense layer and
the number of threads; for each batch of `BATCHES` the candidates are timed in turns with the dense product.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur import __version__
from secateur.core import native
from secateur.deploy.sparse import kernels
from secateur.deploy.sparse.ops import BATCHES, FEW, STREAM, TILES, UNPACK, sparse_linear
from secateur.deploy.sparse.packed import Packed, pack

__all__ = ["CACHE", "measured", "ways_for"]

CACHE = "SECATEUR_CACHE"
SIZE = 1024  # rows and columns of the matrix that is timed
SLOWEST = 0.95  # of the dense layer's speed, at every batch
ROUNDS = 8
_known: dict[str, list[list[float]]] = {}


def ways_for(packed: Packed, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The fastest way for each of `BATCHES` and beyond; None where a batch is slower than dense in every way.

    Without native kernels every matrix is unpacked and torch multiplies: right, and slower than dense.

    Args:
        packed: the matrix.
        dtype: of the layer and its inputs.
    """
    if native.library() is None:
        return (UNPACK,) * (len(BATCHES) + 1)
    ways = []
    for dense, *others in measured(packed, dtype):
        if min(others) * SLOWEST > dense:
            return None
        ways.append(others.index(min(others)))
    return tuple(ways)


def measured(packed: Packed, dtype: torch.dtype) -> list[list[float]]:
    """Seconds of dense, STREAM, TILES and UNPACK for each of `BATCHES` and for twice the last."""
    tenths = min(9, max(0, round((1 - packed.density) * 10)))
    name = f"{packed.kind}/{packed.form}/{packed.block}/{tenths}/{dtype}/{torch.get_num_threads()}".replace(
        "torch.", ""
    )
    key = f"{__version__}/{native.ABI}/{_machine()}/{kernels.level()}/{name}"
    if key not in _known:
        _known.update({k: v for k, v in _stored().items() if k not in _known})
    if key not in _known:
        _known[key] = _measure(packed.kind, packed.form, packed.block, tenths / 10, dtype)
        _store()
    return _known[key]


def _measure(kind: str, form: str, block: int, sparsity: float, dtype: torch.dtype) -> list[list[float]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    cut = torch.rand(SIZE // block, SIZE, generator=generator) < sparsity
    weight = weight.masked_fill(cut.repeat_interleave(block, 0), 0)
    dense = weight.to(dtype)
    packed = pack(
        weight if kind.startswith("int") else weight.to(getattr(torch, kind)), kind, form=form, block=block
    )
    found = []
    for batch in (*BATCHES, 2 * BATCHES[-1]):
        x = torch.randn(batch, SIZE, generator=generator).to(dtype)
        found.append(_times(packed, dense, x))
    return found


def _times(packed: Packed, dense: Tensor, x: Tensor) -> list[float]:
    runs: dict[int, Callable[[], Tensor]] = {-1: lambda: F.linear(x, dense)}
    for way in (STREAM, TILES, UNPACK):
        if way != STREAM or len(x) <= FEW:
            runs[way] = partial(sparse_linear, packed, x, ways=[way] * (len(BATCHES) + 1))
    # one thread's own time does not count what other processes take from it
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys((-1, STREAM, TILES, UNPACK), 1e9)
    for _ in range(ROUNDS if len(x) > FEW else 3 * ROUNDS):
        for way, run in runs.items():
            start = clock()
            run()
            best[way] = min(best[way], clock() - start)
    return list(best.values())


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}/torch {torch.__version__}"


def _file() -> Path:
    place = os.environ.get(CACHE)
    base = (
        Path(place) if place else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
    )
    return base / "sparse.json"


def _stored() -> dict[str, list[list[float]]]:
    """What earlier processes measured; nothing where the file is missing or garbled."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if _sound(value)}


def _sound(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(BATCHES) + 1
        and all(isinstance(row, list) and len(row) == 4 for row in value)
        and all(isinstance(x, float) and 0 < x <= 1e9 for row in value for x in row)
    )


def _store() -> None:
    """Written beside and renamed; a cache that cannot be written is measured again."""
    path = _file()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(_known, sort_keys=True), encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
