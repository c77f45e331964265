"""How fast matrices are packed and unpacked, and how large they are: GB/s of dense weights.

    OMP_NUM_THREADS=1 python bench/packing.py

Random float32, bfloat16, int8 (from 8-bit integers) and "rounded" (int8 from float32) matrices with zeros at random
places, and with whole blocks of them; the best of --rounds, of processor time where there is one thread. Packing counts
the bytes of the weights that are given, unpacking those of the kind that is stored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from secateur.deploy.sparse.packed import Block, Packed, pack, pack_integers, shape_of

# one thread's own time does not count what other processes take from it
CLOCK = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
STORED = {"float32": 4, "bfloat16": 2, "int8": 1, "rounded": 1}  # bytes of a dense weight
BLOCKS: dict[str, Block] = {"1": 1, "4": 4, "16": 16, "4x4": (4, 4)}


def best(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(rounds):
        start = CLOCK()
        run()
        times.append(CLOCK() - start)
    return min(times)


def main() -> None:
    """Print a line for each type and sparsity."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--block", nargs="*", default=["1", "4", "4x4"], choices=list(BLOCKS))
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {given.size} x {given.size}\n")
    print("| | pack, GB/s | unpack, GB/s | bytes of dense | density x bits + 1 |\n" + "|---" * 5 + "|")
    for name, sparsity in product(given.block, given.sparsity):
        block = BLOCKS[name]
        high, wide = shape_of(block)
        cut = torch.rand(given.size // high, given.size // wide) < sparsity
        cut = cut.repeat_interleave(high, 0).repeat_interleave(wide, 1)
        weight = torch.randn(given.size, given.size).masked_fill(cut, 0)
        for kind in ("int8", "rounded") if wide > 1 else STORED:
            scale = weight.abs().amax(1, keepdim=True) / 127
            whole = (weight / scale).round().to(torch.int8)
            runs: dict[str, Callable[[], Packed]] = {
                "int8": lambda w=whole, s=scale, b=block: pack_integers(w, s, block=b),
                "rounded": lambda w=weight, b=block: pack(w, "int8", block=b),
            }
            dense = weight.to(getattr(torch, kind, torch.float32))
            do = runs.get(kind, lambda w=dense, b=block: pack(w, block=b))
            packed, stored = do(), weight.numel() * STORED[kind]
            read, bits = dense.nbytes if kind != "int8" else stored, 8 * STORED[kind]
            shape = "" if name == "1" else f" {high}x{wide}"
            print(
                f"| {kind}{shape} {sparsity:.0%} | {read / best(do, given.rounds) / 1e9:.2f} | "
                f"{stored / best(packed.dense, given.rounds) / 1e9:.2f} | {packed.nbytes / stored:.1%} | "
                f"{(packed.density * bits + 1 / (high * wide)) / bits:.1%} |"
            )


if __name__ == "__main__":
    main()
