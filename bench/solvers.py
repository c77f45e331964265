"""Wanda and SparseGPT on one Llama block against the reference algorithm, in one run.

The reference is written here from its published description (Sun et al. 2023, Frantar and Alistarh 2023, and their
loops over blocks): every Linear is hooked, the sequences run through the dense block one by one, each Linear
accumulates its own statistic (a column norm, or a second moment in float32); then the weights are pruned (a sort of
every row; or two Cholesky factorisations, an inverse, and a Python loop over the columns of every 128-column
block), and the sequences run once more through the pruned block, for the next one.

Ours is `prune_` with the recipe of the same name on the same block and data. A small Linear after the block is pruned
as well, so that the outputs of the block are computed in both; `prune_` would leave them out otherwise.

    OMP_NUM_THREADS=2 python bench/solvers.py
    OMP_NUM_THREADS=2 python bench/solvers.py --hidden 256 --inner 704 --sequences 4 --repeats 1

Contestants take turns in one process. Both wall and processor seconds are told; the ratio that counts on a machine
with other jobs is the one of processor seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import prune_
from secateur.recipes import sparsegpt, wanda
from secateur.recover import loss

BARS = {"wanda": 2.0, "sparsegpt": 2.5}


class Block(nn.Module):
    """A Llama block: normalised attention with rotary positions, then a gated feed-forward network."""

    def __init__(self, hidden: int, inner: int, head: int = 64):
        super().__init__()
        self.head = head
        self.first, self.second = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (p(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def turned(self, x: Tensor) -> Tensor:
        half = self.head // 2
        angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def build(hidden: int, inner: int) -> nn.Sequential:
    """The block and a small Linear behind it, random weights."""
    torch.manual_seed(0)
    return nn.Sequential(Block(hidden, inner), nn.Linear(hidden, 8, bias=False))


def correlated(sequences: int, length: int, hidden: int) -> Tensor:
    """Inputs of which some columns are larger and that share directions, as hidden states do."""
    torch.manual_seed(1)
    few = torch.randn(sequences, length, hidden // 8) @ torch.randn(hidden // 8, hidden) / (hidden / 8) ** 0.5
    return (few + 0.5 * torch.randn_like(few)) * torch.randn(hidden).mul(0.5).exp()


def reference(block: nn.Module, inputs: Tensor, method: str, sparsity: float = 0.5) -> None:
    """One block, two forward passes, every Linear for itself."""
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    sums: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).t().float()
        added = rows.norm(dim=1).square() if method == "wanda" else rows @ rows.t()
        sums[module] = sums[module] + added if module in sums else added

    handles = [m.register_forward_hook(see) for m in linears]
    for sequence in inputs:
        block(sequence[None])
    for handle in handles:
        handle.remove()
    for module in linears:
        (reference_wanda if method == "wanda" else reference_sparsegpt)(module, sums.pop(module), sparsity)
    torch.stack([block(sequence[None])[0] for sequence in inputs])


def reference_wanda(layer: nn.Linear, squares: Tensor, sparsity: float) -> None:
    """A stable sort of every row."""
    score = layer.weight.abs() * squares.sqrt()
    order = torch.sort(score, dim=-1, stable=True).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(1, order[:, : int(score.shape[1] * sparsity)], True)
    layer.weight[mask] = 0


def reference_sparsegpt(layer: nn.Linear, moment: Tensor, sparsity: float, block: int = 128) -> None:
    """Inverse moment, its upper Cholesky factor, a loop over columns."""
    weight = layer.weight.clone().float()
    dead = moment.diagonal() == 0
    moment.diagonal()[dead] = 1
    weight[:, dead] = 0
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        part, local = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        done, errors = torch.zeros_like(part), torch.zeros_like(part)
        score = part**2 / local.diagonal() ** 2
        mask = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for j in range(stop - start):
            column = part[:, j]
            kept = column.clone()
            kept[mask[:, j]] = 0
            done[:, j] = kept
            error = (column - kept) / local[j, j]
            part[:, j:] -= error[:, None] @ local[None, j, j:]
            errors[:, j] = error
        weight[:, start:stop] = done
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    layer.weight.copy_(weight)


def timed(job: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Both contestants in turn, as often as asked; the median of each."""
    inputs = correlated(options.sequences, options.length, options.hidden)
    recipe = {"wanda": wanda, "sparsegpt": sparsegpt}[method]
    seconds: dict[str, list[tuple[float, float]]] = {"reference": [], "secateur": []}
    dense = build(options.hidden, options.inner)
    errors = {}
    for _ in range(options.repeats):
        theirs, ours = deepcopy(dense), deepcopy(dense)
        with torch.no_grad():
            seconds["reference"].append(timed(lambda: reference(theirs, inputs, method)))  # noqa: B023
        seconds["secateur"].append(timed(lambda: prune_(ours, 0.5, recipe, data=[inputs])))  # noqa: B023
        if not errors:
            moment = first_moment(dense, inputs)
            for name, model in (("reference", theirs), ("secateur", ours)):
                errors[name] = loss(model[0].q.weight.detach(), dense[0].q.weight.detach(), moment)
    median = {
        name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in seconds.items()
    }
    return {
        "method": method,
        "seconds": {n: {"wall": w, "processor": p, "runs": seconds[n]} for n, (w, p) in median.items()},
        "ratio": {
            kind: median["reference"][i] / median["secateur"][i] for i, kind in enumerate(("wall", "processor"))
        },
        "bar": BARS[method],
        "loss of q": errors,
    }


def first_moment(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """The second moment of the input of q, which both contestants see alike."""
    with torch.no_grad():
        rows = model[0].first(inputs).flatten(0, 1)
        return rows.t() @ rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    found = [measure(options, method) for method in options.methods]
    if options.json:
        print(json.dumps({"options": vars(options), "threads": torch.get_num_threads(), "found": found}))
        return
    print(f"{options.sequences} x {options.length} tokens, {options.hidden}/{options.inner}, float32,", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {options.repeats}")
    print(f"{'':12}{'reference':>22}{'secateur':>22}{'ratio':>16}{'bar':>6}   loss of q")
    print(f"{'':12}" + f"{'wall s':>11}{'cpu s':>11}" * 2 + f"{'wall':>8}{'cpu':>8}")
    for one in found:
        times = "".join(f"{t['wall']:11.2f}{t['processor']:11.2f}" for t in one["seconds"].values())
        ratio = "".join(f"{one['ratio'][kind]:8.2f}" for kind in ("wall", "processor"))
        worse = one["loss of q"]["secateur"] / one["loss of q"]["reference"]
        print(f"{one['method']:12}{times}{ratio}{one['bar']:6.1f}   {worse:.3f} of the reference's")


if __name__ == "__main__":
    main()
