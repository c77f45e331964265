"""Which form and which way to multiply are fastest here: measured once a machine, and kept in a file.

What is timed are whole layers, dense beside packed, in turns, for each batch of `BATCHES`. A measurement serves every
layer of the same type, values, block and about the same size and share of zeros, with the same number of threads.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import native
from secateur.deploy.sparse import kernels, semi, table
from secateur.deploy.sparse.modules import SparseConv2d, SparseLayer, SparseLinear
from secateur.deploy.sparse.ops import BATCHES, DENSE, STREAM, TILES, UNPACK, streams
from secateur.deploy.sparse.packed import CODEBOOK, Packed, pack, pack_integers, reformed

__all__ = ["Choice", "Kind", "choose", "kind_of", "measured"]

SIZES = (64, 2048)  # rows and columns of matrices that are timed: powers of two between
SLOWEST = 0.95  # of the dense layer's speed, at every batch
WORTH = 1.05  # times as fast as dense, at some batch
CACHES = 1 << 25  # bytes; a model of more finds its weights in main memory
ROUNDS, SECONDS = 24, 0.1  # for each batch: whichever comes first, but three rounds
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
THIN = 0.25  # share of non-zeros below which the index form is looked at
SAME_ROOM = 1.02
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
ROOM = 1.5  # bytes that N:M may take, times those of the smaller of the other forms
_known: dict[str, list[list[float]]] = {}


@dataclass(frozen=True)
class Kind:
    """What of a dense layer its speed depends on.

    Attributes:
        layer: "Linear", "Conv1D" or "Conv2d".
        dtype: of its weight and inputs.
        kernel: height and width, for a convolution.
        cold: whether its model is larger than a processor's caches.
    """

    layer: str
    dtype: torch.dtype
    kernel: tuple[int, int] = (1, 1)
    cold: bool = False


@dataclass(frozen=True)
class Choice:
    """How a layer runs.

    Attributes:
        packed: in the form that is fastest; None where the layer had better be dense.
        ways: for each of `BATCHES` and beyond; DENSE where the dense weight is kept beside and multiplied with.
    """

    packed: Packed | None
    ways: tuple[int, ...]

    @property
    def keeps_dense(self) -> bool:
        """Whether some batch multiplies with the dense weight."""
        return self.packed is None or DENSE in self.ways


def kind_of(module: nn.Module, dtype: torch.dtype, cold: bool = False) -> Kind:
    """What the speed of a dense linear layer or convolution depends on."""
    if isinstance(module, nn.Conv2d):
        return Kind("Conv2d", dtype, tuple(module.kernel_size), cold)  # type: ignore[arg-type]
    return Kind("Conv1D" if type(module).__name__ == "Conv1D" else "Linear", dtype, cold=cold)


def choose(packed: Packed, kind: Kind, *, keep_dense: bool = False, always: bool = False) -> Choice:
    """The fastest form and ways of a matrix.

    Without native kernels every matrix is unpacked and torch multiplies: right, and slower than dense.

    Args:
        packed: the matrix, in any form.
        kind: of the layer that it belongs to.
        keep_dense: let batches at which every packed way is slower use the dense weight, kept beside the packed one.
            Otherwise a layer with such a batch is dense.
        always: packed, in the fastest packed way, even where dense is faster, in its form or one that takes no more.
    """
    if native.library() is None:
        return Choice(packed, (UNPACK,) * (len(BATCHES) + 1))
    if always:
        return _in_no_more_room(packed, kind)
    best, gain = Choice(None, ()), WORTH
    for form in _forms(packed):
        times = measured(packed, kind, form)
        ratios = [dense / min(others) for dense, *others in times]
        ways = tuple(
            others.index(min(others)) if ratio >= SLOWEST else DENSE
            for ratio, (_, *others) in zip(ratios, times, strict=True)
        )
        if max(ratios) < WORTH or (DENSE in ways and not keep_dense):
            continue
        mean = _mean(max(ratio, 1.0) if keep_dense else ratio for ratio in ratios)
        if mean > gain or best.packed is None:
            best, gain = Choice(packed if form == packed.form else reformed(packed, form), ways), mean
    return best


def _mean(ratios: Iterable[float]) -> float:
    """The geometric mean over batches, in which one token counts as much as all else: decoding."""
    first, *rest = map(math.log, ratios)
    return math.exp(first / 2 + sum(rest) / len(rest) / 2)


def _in_no_more_room(packed: Packed, kind: Kind) -> Choice:
    """The fastest of a matrix's own form and an N:M that takes no more, give or take what fills its vectors."""
    held = SAME_ROOM * 8 * packed.nbytes / (packed.rows * packed.columns)
    smaller = (form for form in _forms(packed) if form in semi.PATTERNS and _bits(packed, form) <= held)
    times = {form: measured(packed, kind, form) for form in {packed.form: None, **dict.fromkeys(smaller)}}
    best = min(times, key=lambda form: _mean(min(others) for _, *others in times[form]))
    return Choice(reformed(packed, best), tuple(others.index(min(others)) for _, *others in times[best]))


def _forms(packed: Packed) -> tuple[str, ...]:
    """Forms a matrix could have: the index form where it is smaller or nearly so, N:M where it fits."""
    own = packed.codebook is not None and not torch.equal(packed.codebook, CODEBOOK)
    if packed.form == "dense" or packed.block > 1 or own:
        return (packed.form,)
    found = ["bitmask"]
    if packed.density < THIN or packed.form == "index":
        found.append("index")
    offered = (packed.form,) if packed.in_lanes else semi.fitting(kernels.mask_of(packed))
    bits = packed.density * BITS[packed.kind] + min(1, 8 * packed.density)
    nm = next((form for form in offered if _bits(packed, form) <= ROOM * bits), None)
    return (*found, nm) if nm is not None else tuple(found)


def _bits(packed: Packed, form: str) -> float:
    """What N:M would take, bits a weight; infinite where it does not go with the scales."""
    lanes = semi.lanes_of(form, packed.kind, packed.columns)
    if not lanes.scales_fit(1 if packed.scale is None else packed.scale.shape[1]):
        return math.inf
    return (lanes.stored * BITS[packed.kind] + 8 * lanes.bytes) / packed.columns


def measured(packed: Packed, kind: Kind, form: str | None = None) -> list[list[float]]:
    """Seconds of dense, STREAM, TILES and UNPACK for each of `BATCHES` and for twice the last."""
    form = form or packed.form
    density = semi.PATTERNS[form][0] / semi.CHUNK if form in semi.PATTERNS else packed.density
    zeros = min(LEVELS, key=lambda level: abs(level - (1 - density)))
    rows, columns = _about(packed.rows), _about(packed.columns // math.prod(kind.kernel))
    dtype, where = str(kind.dtype).removeprefix("torch."), "cold" if kind.cold else "warm"
    size = f"{rows}x{columns}" + "x{}x{}".format(*kind.kernel) * (kind.layer == "Conv2d")
    name = f"{kind.layer} {size}/{packed.kind} {form} {packed.block} {zeros}/{dtype} {where}"
    key = f"{_machine()}/{torch.get_num_threads()} threads/{name}"
    if key not in _known:
        _known.update({k: v for k, v in table.read(len(BATCHES) + 1, 4).items() if k not in _known})
    if key not in _known:
        _known[key] = _measure(replace(packed, form=form), kind, rows, columns, zeros)
        table.add({key: _known[key]}, len(BATCHES) + 1, 4)
    return _known[key]


def _about(size: int) -> int:
    return min(SIZES[1], max(SIZES[0], 1 << round(math.log2(max(size, 1)))))


@torch.inference_mode()
def _measure(like: Packed, kind: Kind, rows: int, columns: int, zeros: float) -> list[list[float]]:
    """Times of a random layer of a kind; of several in turns where weights come from main memory."""
    generator = torch.Generator().manual_seed(0)
    width = columns * math.prod(kind.kernel)
    weight = torch.randn(rows, width, generator=generator)
    weight = weight.masked_fill(_cut(like, rows, width, zeros, generator), 0)
    stored = weight if like.kind.startswith("int") else weight.to(getattr(torch, like.kind))
    made = _packed(stored, like)
    count = math.ceil(2 * CACHES / (weight.numel() * kind.dtype.itemsize)) if kind.cold else 1
    dense = [_dense(kind, weight) for _ in range(min(64, count))]
    sparse = {
        way: [_sparse(kind, _copied(made), each, way) for each in dense] for way in (STREAM, TILES, UNPACK)
    }
    found = []
    for batch in (*BATCHES, 2 * BATCHES[-1]):
        runs: dict[int, Sequence[nn.Module]] = {DENSE: dense}
        runs |= {way: each for way, each in sparse.items() if way != STREAM or streams(made, batch)}
        found.append(_times(runs, _inputs(kind, columns, batch, generator)))
    return found


def _packed(weight: Tensor, like: Packed) -> Packed:
    """Packed as a matrix is; where scales of this many columns do not go with N:M, with one a row."""
    columns = weight.shape[1]
    if like.form not in semi.PATTERNS or like.kind != "int4":
        return pack(weight, like.kind, form=like.form, block=like.block)
    groups = columns // 128 if columns % 128 == 0 else 1
    groups = groups if semi.lanes_of(like.form, like.kind, columns).scales_fit(groups) else 1
    integers = (2 * weight).round().clamp(-7, 7).to(torch.int8)
    return pack_integers(integers, torch.ones(len(weight), groups), "int4", form=like.form)


def _cut(like: Packed, rows: int, columns: int, zeros: float, generator: torch.Generator) -> Tensor:
    """Which weights of a random layer are zero: single ones, blocks, or all but N of every M."""
    if like.form in semi.PATTERNS:
        kept, among = map(int, like.form.split(":"))
        order = torch.rand(rows, -(-columns // among), among, generator=generator).argsort(2).argsort(2)
        return (order >= kept).flatten(1)[:, :columns]
    cut = torch.rand(-(-rows // like.block), -(-columns // like.across), generator=generator) < zeros
    return cut.repeat_interleave(like.block, 0)[:rows].repeat_interleave(like.across, 1)[:, :columns]


def _times(runs: dict[int, Sequence[nn.Module]], x: Tensor) -> list[float]:
    """The least seconds of each way; ways that are far behind are given up."""
    # one thread's own time does not count what other processes take from it
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys((DENSE, STREAM, TILES, UNPACK), 1e9)
    turns, spent = {way: cycle(layers) for way, layers in runs.items()}, 0.0
    for number in range(ROUNDS):
        for way, layers in turns.items():
            if number > 1 and best[way] > 2 * min(best.values()):
                continue
            layer = next(layers)
            start = clock()
            layer(x)
            seconds = clock() - start
            spent += seconds
            best[way] = min(best[way], max(seconds, 1e-9))
        if number >= 2 and spent > SECONDS:
            break
    return list(best.values())


def _dense(kind: Kind, weight: Tensor) -> nn.Module:
    rows, width = weight.shape
    if kind.layer == "Conv2d":
        columns = width // math.prod(kind.kernel)
        layer: Any = nn.Conv2d(columns, rows, kind.kernel, padding="same", bias=False, dtype=kind.dtype)
    else:
        layer = nn.Linear(width, rows, bias=False, dtype=kind.dtype)
    if kind.layer == "Conv1D":
        layer.weight = nn.Parameter(weight.to(kind.dtype).t().contiguous().t(), requires_grad=False)
    else:
        layer.weight.data.copy_(weight.view(layer.weight.shape))
    return layer.eval()


def _sparse(kind: Kind, packed: Packed, like: nn.Module, way: int) -> SparseLayer:
    ways = (way,) * (len(BATCHES) + 1)
    if isinstance(like, nn.Conv2d):
        return SparseConv2d(packed, like, ways)
    return SparseLinear(packed, None, kind.dtype, ways)


def _copied(packed: Packed) -> Packed:
    """With bytes of its own, as other layers have."""
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    return replace(packed, **copies)


def _inputs(kind: Kind, columns: int, batch: int, generator: torch.Generator) -> Tensor:
    """So many tokens, or an image of so many places."""
    if kind.layer != "Conv2d":
        return torch.randn(batch, columns, generator=generator).to(kind.dtype)
    height = 1 << (batch.bit_length() - 1) // 2
    return torch.randn(1, columns, height, batch // height, generator=generator).to(kind.dtype)


@cache
def _machine() -> str:
    """Processor, torch, and the kernels by their own bytes: another build is measured anew."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    built = hashlib.sha256(native.FILE.read_bytes()).hexdigest()[:12] if native.FILE.is_file() else "none"
    kernel = f"kernels {native.ABI} {built} {kernels.LEVELS[kernels.level()]}"
    return f"{model or platform.processor() or platform.machine()}/torch {torch.__version__}/{kernel}"
