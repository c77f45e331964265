"""Packed weights on a GPU beside torch's dense bfloat16 product of the same shape, measured in the same run.

    python bench/gpu.py
    python bench/gpu.py --shape 14336x4096 4096x14336 --batch 1

Every number is the time of one product within a CUDA graph that goes once round several copies of the matrix, more of
them than the L2 cache holds, so that weights come from memory as in a model: the median of the replays, and their
interquartile range as a share of it. The ratio is dense by packed: above 1 the packed product is faster. Products are
checked against float64 before they are timed. Weights are random with a uniform mask. 2:4 are torch's semi-structured
tensors in bfloat16 (`secateur.deploy.sparse.gpu.semi_structured_`) beside the same layer dense.
Without a CUDA device this says so and stops.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.deploy.sparse import gpu, pack
from secateur.deploy.sparse.packed import Packed, pack_integers

KINDS = ("bfloat16", "int8", "int4")
COLD = 150e6  # bytes of copies; the largest L2 cache so far holds 50 MB, of newer cards 126


def held_as(weight: Tensor, kind: str) -> Packed:
    """Packed as a bitmask; integers by one scale for all, since how well they fit does not matter here."""
    if not kind.startswith("int"):
        return pack(weight.to(getattr(torch, kind)), form="bitmask")
    most = 127 if kind == "int8" else 7
    integers = (weight * most / 3).round().clamp(-most, most).to(torch.int8)
    groups = weight.shape[1] // 128 if kind == "int4" else 1
    return pack_integers(integers, torch.full((len(weight), groups), 3 / most), kind, form="bitmask")


def copies_of(size: int) -> int:
    """How many copies of so many bytes are cold when their turn comes again."""
    return max(3, min(40, -(-int(COLD) // size)))


def timed(runs: list[Callable[[], Any]], rounds: int) -> tuple[float, float]:
    """Microseconds of one run, the median, and the spread."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for number in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number:
            times.append(start.elapsed_time(end) * 1e3 / len(runs))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle


def checked(packed: Packed, x: Tensor) -> None:
    """Stop where a product is not the dense one, to within the rounding of bfloat16."""
    dense = gpu.rows_of(packed, torch.arange(packed.rows, device=x.device)).double()
    y, expected = gpu.multiply(packed, x, None).double(), x.double() @ dense.T
    size = x.double().abs() @ dense.abs().T + 1e-30
    error = float(((y - expected).abs() / size).max())
    assert error < 1e-2, f"{packed.kind}, {len(x)} tokens: off by {error:.1e}"


def of_shape(rows: int, columns: int, given: argparse.Namespace) -> None:
    """One table: batches in columns, kinds and shares of zeros in rows."""
    weight = torch.randn(rows, columns, device="cuda")
    inputs = [torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16) for batch in given.batch]
    half = [weight.bfloat16() for _ in range(copies_of(rows * columns * 2))]
    dense = [timed([lambda w=w, x=x: F.linear(x, w) for w in half], given.rounds) for x in inputs]
    del half
    print(f"\n{rows} x {columns}, us (spread) and times dense bfloat16\n")
    print("| | MB | " + " | ".join(f"{batch} tokens" for batch in given.batch) + " | made dense |")
    print("|---" * (len(given.batch) + 3) + "|")
    cells = " | ".join(f"{time:.1f} ({spread:.0%})" for time, spread in dense)
    print(f"| dense bfloat16 | {rows * columns * 2 / 1e6:.1f} | {cells} | |", flush=True)
    for kind in KINDS:
        for sparsity in given.sparsity:
            pruned = weight.masked_fill(torch.rand(rows, columns, device="cuda") < sparsity, 0)
            one = held_as(pruned.cpu(), kind)
            held = [one.to("cuda") for _ in range(copies_of(one.nbytes))]
            cells = ""
            for x, (whole, _) in zip(inputs, dense, strict=True):
                checked(held[0], x)
                time, spread = timed([lambda p=p, x=x: gpu.multiply(p, x, None) for p in held], given.rounds)
                cells += f"{time:.1f} ({spread:.0%}) {whole / time:.2f}x | "
            made, _ = timed([lambda p=p: gpu.triton_rows(p, torch.bfloat16) for p in held], given.rounds)
            print(f"| {kind} {sparsity:.0%} | {one.nbytes / 1e6:.1f} | {cells}{made:.1f} |", flush=True)


@torch.no_grad()
def two_of_four(rows: int, columns: int, given: argparse.Namespace) -> None:
    """The same of layers that keep 2 of every 4 inputs."""
    groups = torch.randn(rows, columns // 4, 4, device="cuda")
    keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, 2).indices, 1.0)
    weight = (groups * keep).view(rows, columns).bfloat16()
    models = []
    for _ in range(copies_of(rows * columns)):
        layer = nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
        layer.weight.copy_(weight)
        models.append(nn.Sequential(layer))
    inputs = [torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16) for batch in given.prefill]
    expected = [models[0](x) for x in inputs]
    dense = [timed([lambda m=m, x=x: m(x) for m in models], given.rounds) for x in inputs]
    for model in models:
        gpu.semi_structured_(model)
    print(f"\n{rows} x {columns}, 2:4 in bfloat16\n\n| tokens | dense us | 2:4 us | times dense | error |")
    print("|---" * 5 + "|")
    for x, y, (whole, _) in zip(inputs, expected, dense, strict=True):
        error = float((models[0](x) - y).abs().max() / y.abs().max())
        time, spread = timed([lambda m=m, x=x: m(x) for m in models], given.rounds)
        print(
            f"| {len(x)} | {whole:.1f} | {time:.1f} ({spread:.0%}) | {whole / time:.2f} | {error:.0e} |",
            flush=True,
        )


def main() -> None:
    """Print a table for each shape, and one for 2:4."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="*", default=["4096x4096"], help="rows x columns")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 16, 64, 512])
    parser.add_argument("--prefill", type=int, nargs="*", default=[1, 16, 64, 512, 4096])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure")
        return
    torch.manual_seed(0)
    triton = "without Triton" if gpu._kernels() is None else f"Triton {__import__('triton').__version__}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {triton}")
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in given.shape]
    for rows, columns in shapes:
        of_shape(rows, columns, given)
    for rows, columns in shapes:
        two_of_four(rows, columns, given)


if __name__ == "__main__":
    main()
