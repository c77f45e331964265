"""What one call of a small packed layer costs beside its kernel, torch's layer and torch's dynamic 8 bits.

    OMP_NUM_THREADS=1 python bench/calls.py

64 x 64 in int8 with half the weights zeros, one token, one thread: the kernel itself takes a microsecond or two. The
operator is what `torch.compile` calls. Processor time, the least of nine runs of 5000 calls, all taken in turns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur import prune_, sparsify_
from secateur.core import native
from secateur.deploy.sparse import kernels
from secateur.deploy.sparse.packed import FORMS, KINDS, Packed

SIZE, CALLS, TURNS = 64, 5000, 9


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call, on average."""
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS * 1e6


def kernel(packed: Packed, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """The native function with arguments that are ready."""
    library = native.library()
    if library is None:
        raise SystemExit(native.path())
    parts = (
        packed.mask,
        packed.counts,
        packed.index,
        packed.values,
        packed.offsets,
        packed.scale,
        packed.codebook,
    )
    places = [0 if part is None else part.data_ptr() for part in parts]
    pointers = kernels._POINTERS.pack(*places, x.data_ptr(), 0, y.data_ptr())
    shape = (kernels.FORM[packed.form], kernels.KIND[packed.kind], packed.block, packed.rows, packed.columns, 1)
    numbers = kernels._NUMBERS.pack(*shape, 1, 0, 1, kernels.level())
    return lambda: library.secateur_sparse_multiply(pointers, numbers)


@torch.no_grad()
def main() -> None:
    """Print a table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = nn.Sequential(nn.Linear(SIZE, SIZE)), torch.randn(1, 1, SIZE)
    prune_(model, 0.5)
    dense: Any = model[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})[0]
    sparsify_(model, "int8", measure=False)
    layer: Any = model[0]
    packed = layer.packed
    operator = torch.ops.secateur.sparse_linear.default
    arguments = (
        x, packed.values, packed.offsets, packed.mask, packed.counts, packed.index, packed.scale, packed.codebook,
        layer.bias, packed.rows, packed.columns, FORMS.index(packed.form), KINDS.index(packed.kind), packed.block,
        [0] * 9,
    )  # fmt: skip
    calls = {
        "torch, nn.Linear float32": lambda: dense(x),
        "torch, dynamic int8": lambda: dynamic(x),
        "kernel alone": kernel(packed, x, torch.empty(1, SIZE)),
        "packed layer": lambda: layer(x),
        "operator": lambda: operator(*arguments),
    }
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(TURNS + 1):
        for name, call in calls.items():
            least[name] = min(least[name], microseconds(call))
    print("| | microseconds a call | beyond the kernel |\n|---|---|---|")
    for name, each in least.items():
        beyond = f"{each - least['kernel alone']:.1f}" if name in ("packed layer", "operator") else ""
        print(f"| {name} | {each:.1f} | {beyond} |")


if __name__ == "__main__":
    main()
