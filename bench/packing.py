"""How fast matrices are packed and unpacked, and how large they are: GB/s of dense weights.

    OMP_NUM_THREADS=1 python bench/packing.py

Random float32, bfloat16 and int8 (from float32) matrices with zeros at random places; the best of --rounds, of
processor time where there is one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from secateur.deploy.sparse.packed import pack, pack_integers

# one thread's own time does not count what other processes take from it
CLOCK = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
STORED = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes of a dense weight


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
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {given.size} x {given.size}\n")
    print("| | pack, GB/s | unpack, GB/s | bytes of dense | density x bits + 1 |\n" + "|---" * 5 + "|")
    for sparsity in given.sparsity:
        weight = torch.randn(given.size, given.size)
        weight[torch.rand_like(weight) < sparsity] = 0
        for kind, each in STORED.items():
            if kind == "int8":
                scale = weight.abs().amax(1, keepdim=True) / 127
                whole = (weight / scale).round().to(torch.int8)
                do = lambda w=whole, s=scale: pack_integers(w, s)  # noqa: E731
            else:
                dense = weight.to(getattr(torch, kind))
                do = lambda w=dense, k=kind: pack(w, k)  # noqa: E731
            packed = do()
            size, bits = weight.numel() * each, 8 * each
            density = packed.density
            print(
                f"| {kind} {sparsity:.0%} | {size / best(do, given.rounds) / 1e9:.2f} | "
                f"{size / best(packed.dense, given.rounds) / 1e9:.2f} | {packed.nbytes / size:.1%} | "
                f"{(density * bits + 1) / bits:.1%} |"
            )


if __name__ == "__main__":
    main()
