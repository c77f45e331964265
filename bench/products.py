"""Sparse products beside torch, the best dense kernel of the same type, and 8-bit dense, in turns in one process.

    OMP_NUM_THREADS=1 python bench/products.py
    OMP_NUM_THREADS=2 python bench/products.py

Three ratios a line: against torch's `F.linear` of the same type (int8: torch's dynamic 8-bit product; int4: its
4-bit product, inputs in bfloat16, which are faster than float32); against the best dense kernel of that type
(`F.linear`, oneDNN with packed weights, for int8 and int4 secateur's own); against the best 8-bit dense one. Times
are medians, of processor time where there is one thread; the spread is the interquartile range as a share of it. The
last column is the stream's bytes by the time, as a share of what a reader of 256 MB reaches. Weights are random with
a uniform mask; of N:M (`--pattern`) with N of every M weights of a row at random.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.deploy.sparse.ops import STREAM, TILES, UNPACK, sparse_linear, streams
from secateur.deploy.sparse.packed import Block, Packed, pack, pack_integers, shape_of
from secateur.deploy.sparse.semi import PATTERNS

# one thread's own time does not count what other processes take from it
CLOCK = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32, "int4": torch.float32}

BLOCKS: dict[str, Block] = {"1": 1, "4": 4, "16": 16, "4x4": (4, 4)}
WAYS = ("stream", "tiles", "unpack")  # by number: STREAM, TILES, UNPACK
DENSE = (
    "float32 torch",
    "bfloat16 torch",
    "int8 own",
    "int8 torch",
    "float32 oneDNN",
    "int4 torch",
    "int4 own",
)


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = CLOCK()
            run()
            if number:
                times[name].append(CLOCK() - start)
    return times


def held_as(weight: Tensor, kind: str, block: Block = 1, form: str | None = None) -> Packed:
    """Packed; integers by one scale for all, since how well they fit does not matter here."""
    if not kind.startswith("int"):
        return pack(weight, block=block, form=form)
    most = 127 if kind == "int8" else 7
    integers = (weight * most / 3).round().clamp(-most, most).to(torch.int8)
    groups = weight.shape[1] // 128 if kind == "int4" else 1
    return pack_integers(integers, torch.full((len(weight), groups), 3 / most), kind, block=block, form=form)


def dense_runs(weight: Tensor, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Dense competitors by name."""
    rows, columns = weight.shape
    half, half_x = weight.bfloat16(), x.bfloat16()
    linear = nn.Linear(columns, rows, bias=False).eval()
    linear.weight.data.copy_(weight)
    packed_8, own_4 = held_as(weight, "int8", form="dense"), held_as(weight, "int4", form="dense")
    runs: dict[str, Callable[[], Any]] = {
        "float32 torch": lambda: F.linear(x, weight),
        "bfloat16 torch": lambda: F.linear(half_x, half),
        "int8 own": lambda: sparse_linear(packed_8, x),
        "int4 own": lambda: sparse_linear(own_4, x),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = nn.Sequential(linear)
        dynamic = torch.ao.quantization.quantize_dynamic(holder, {nn.Linear})
        runs["int8 torch"] = lambda: dynamic(x)
        from torch.utils import mkldnn

        onednn = mkldnn.to_mkldnn(linear)
        x_onednn = x.to_mkldnn()
        runs["float32 oneDNN"] = lambda: onednn(x_onednn)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed_4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(columns // 128, rows, 2, dtype=torch.bfloat16)  # and zero points, of every 128 columns
    runs["int4 torch"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half_x, packed_4, 128, scales)
    return runs


def line(
    name: str, mine: list[float], times: dict[str, list[float]], kind: str, packed: Packed, speed: float
) -> str:
    """One row of the table."""
    middle = {key: statistics.median(value) for key, value in times.items() if key in DENSE}
    own = statistics.median(mine)
    low, _, high = statistics.quantiles(mine, n=4)
    best = min(value for key, value in middle.items() if key.startswith(kind))
    best_8 = min(value for key, value in middle.items() if key.startswith("int8"))
    return (
        f"| {name} | {own * 1e3:.2f} | {(high - low) / own:.0%} | {middle[f'{kind} torch'] / own:.2f} | "
        f"{best / own:.2f} | {best_8 / own:.2f} | {packed.nbytes / 1e6:.1f} | {packed.nbytes / own / speed:.0%} |"
    )


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MB reads, the best of ten."""
    many = torch.ones(1 << 26)
    return max(many.nbytes / min(timed({"sum": many.sum}, 1)["sum"]) for _ in range(10))


def of_blocks(
    weight: Tensor, kinds: list[str], sparsities: list[float], blocks: list[str]
) -> Iterator[tuple[str, str, Packed]]:
    """Every kind and form of single weights and blocks: name, kind, packed."""
    for sparsity, name in product(sparsities, blocks):
        block = BLOCKS[name]
        high, wide = shape_of(block)
        cut = torch.rand(len(weight) // high, weight.shape[1] // wide) < sparsity
        pruned = weight.masked_fill(cut.repeat_interleave(high, 0).repeat_interleave(wide, 1), 0)
        shape = f" {high}x{wide}" if high > 1 else ""
        for kind in (kind for kind in kinds if wide == 1 or kind == "int8"):
            packed = held_as(pruned.to(KINDS[kind]), kind, block)
            yield f"{kind}{shape}{' index' if packed.form == 'index' else ''} {sparsity:.0%}", kind, packed
            if packed.form == "bitmask" and high == 1:
                other = held_as(pruned.to(KINDS[kind]), kind, block, "index")
                yield f"{kind} index {sparsity:.0%}", kind, other


def of_patterns(weight: Tensor, kinds: list[str], patterns: list[str]) -> Iterator[tuple[str, str, Packed]]:
    """The same of N:M."""
    for name in patterns:
        kept, among = map(int, name.split(":"))
        keep = torch.rand(len(weight), weight.shape[1] // among, among).argsort(2).argsort(2) < kept
        pruned = weight.masked_fill(~keep.view(weight.shape), 0)
        for kind in kinds:
            yield f"{kind} {name}", kind, held_as(pruned.to(KINDS[kind]), kind, form=name)


def ways_of(packed: Packed, batch: int, kind: str) -> list[int]:
    """Those that are timed."""
    if packed.form == "squares":
        return [STREAM]
    if packed.in_lanes and packed.in_integers:
        return [STREAM, UNPACK] if batch > 4 else [STREAM]
    ways = [STREAM, TILES] if streams(packed, batch) else [TILES]
    return ways + [UNPACK] * (batch > 4 and packed.block == 1 and kind != "int4")


def main() -> None:
    """Print a table for each batch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--block", nargs="*", default=["1", "4", "4x4"], choices=list(BLOCKS))
    parser.add_argument("--pattern", nargs="*", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    speed = bandwidth()
    print(f"{torch.get_num_threads()} threads, a sum reads {speed / 1e9:.1f} GB/s, {given.size} x {given.size}")
    weight = torch.randn(given.size, given.size)
    for batch in given.batch:
        x = torch.randn(batch, given.size)
        runs, held = dense_runs(weight, x), {}
        made = chain(
            of_blocks(weight, given.kind, given.sparsity, given.block),
            of_patterns(weight, given.kind, given.pattern),
        )
        for shape, kind, packed in made:
            inputs = x.to(KINDS[kind])
            for way in (way for way in ways_of(packed, batch, kind) if WAYS[way] in given.ways):
                name = f"{shape} {WAYS[way]}"
                held[name] = (kind, packed)
                runs[name] = lambda p=packed, i=inputs, w=way: sparse_linear(p, i, ways=[w] * 9)
        times = timed(runs, given.rounds)
        print(f"\nbatch {batch}, dense ms: ", end="")
        print(", ".join(f"{k} {statistics.median(v) * 1e3:.2f}" for k, v in times.items() if k not in held))
        print(
            "\n| | ms | spread | x torch | x best dense | x 8-bit dense | MB | of bandwidth |\n"
            + "|---" * 8
            + "|"
        )
        for name, (kind, packed) in held.items():
            print(line(name, times[name], times, kind, packed, speed), flush=True)


if __name__ == "__main__":
    main()
