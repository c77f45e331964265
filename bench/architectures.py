"""Is the axis analysis right on every architecture? A table: axes found, frozen, differences, seconds.

For each architecture and seed a random part of every axis is kept, and three things are compared:

program   the exported graph against the eager model, nothing pruned (bit-equal is expected)
masked    the pruned program against the whole graph with masked units and norms over the survivors
eager     the pruned program against the eager model with zeros in its parameters, exact axes only

    python bench/architectures.py --seeds 5
    python bench/architectures.py gpt2 llama-gqa --seeds 1 --axes
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
import zoo

from secateur.core.units import Analysis, analyse, masked_program, pruned_program

FLOAT32_ONLY = {"mixtral", "qwen2-moe", "deepseek-v3"}  # grouped matrix products of the experts


@dataclass
class Row:
    """What was measured of one architecture."""

    name: str
    axes: int = 0
    exact: int = 0
    frozen: int = 0
    removed: float = 0.0
    differences: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0
    changed: float = float("inf")  # how far pruning moves the output; a comparison of equals proves nothing
    seconds: float = 0.0
    unruled: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def verdict(self) -> str:
        """Equal, refused by name, or wrong."""
        if self.error:
            return "refused"
        good = all(value <= self.tolerance for value in self.differences.values()) and self.changed > 1e-4
        return ("equal" if not self.unruled else "equal, partly frozen") if good else "WRONG"


def doubled_(module: fx.GraphModule) -> fx.GraphModule:
    """Casts to float32 inside the graph become casts to float64, so that differences show at 1e-12."""
    for node in module.graph.nodes:
        node.args, node.kwargs = (
            fx.node.map_aggregate(part, lambda x: torch.float64 if x is torch.float32 else x)
            for part in (node.args, node.kwargs)
        )
    module.recompile()
    return module


def keep_at_random(
    analysis: Analysis, generator: torch.Generator, *, exact_only: bool = False
) -> dict[str, Any]:
    """For every axis a random half of its units, sometimes fewer or more."""
    keep = {}
    for units in analysis.units:
        if units.exact or not exact_only:
            share = 0.3 + 0.5 * torch.rand((), generator=generator).item()
            count = max(1, min(units.size - 1, round(units.size * share)))
            keep[units.name] = torch.randperm(units.size, generator=generator)[:count]
    return keep


def zeroed(model: nn.Module, analysis: Analysis, keep: dict[str, Any]) -> nn.Module:
    """A copy of the eager model with zeros in the parameters of removed units."""
    out = copy.deepcopy(model)
    parameters = dict(out.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, kept in keep.items():
            units = analysis[name]
            gone = torch.ones(units.size, dtype=torch.bool)
            gone[kept] = False
            for member in units.members:
                if member.is_parameter:
                    parameters[member.name].index_fill_(member.dim, member.indices[gone].flatten(), 0.0)
    return out


def tensors(value: Any, output: str | None) -> list[torch.Tensor]:
    """The compared part of an output."""
    picked = value[output] if output and not isinstance(value, torch.Tensor) else value
    return [leaf for leaf in pytree.tree_leaves(picked) if isinstance(leaf, torch.Tensor)]


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest value."""
    scale = max(x.abs().max().item() for x in a)
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) / scale


@torch.no_grad()
def measure(row: Row, seed: int) -> Analysis:
    """Compare one architecture with one seed; differences in the row are the largest over seeds."""
    model, args, kwargs, output = zoo.build(row.name, seed)
    double = row.name not in FLOAT32_ONLY
    if double:
        model = model.double()
        args = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    start = time.perf_counter()
    analysis = analyse(model, args, kwargs, output=output)
    row.seconds = max(row.seconds, time.perf_counter() - start)
    generator = torch.Generator().manual_seed(seed)
    reference = tensors(model(*args, **kwargs), output)
    found = {"program": difference(reference, tensors(analysis.program(*args, **kwargs), None))}

    keep = keep_at_random(analysis, generator, exact_only=True)
    eager = tensors(zeroed(model, analysis, keep)(*args, **kwargs), output)
    found["eager"] = difference(eager, tensors(pruned_program(analysis, keep)(*args, **kwargs), None))

    keep = keep_at_random(analysis, generator)
    masked, pruned = masked_program(analysis, keep), pruned_program(analysis, keep)
    if double:
        masked, pruned = doubled_(masked), doubled_(pruned)
    after = tensors(pruned_program(analysis, keep)(*args, **kwargs), None)
    row.changed = min(row.changed, difference(reference, after))
    found["masked"] = difference(tensors(masked(*args, **kwargs), None), tensors(pruned(*args, **kwargs), None))
    for key, value in found.items():
        row.differences[key] = max(row.differences.get(key, 0.0), value if value == value else float("inf"))
    row.tolerance = 1e-5 if not double else 1e-6  # casts to float32 stay in the eager model
    if double and found["masked"] > 1e-9:
        row.differences["masked"] = float("inf")
    whole = sum(p.numel() for p in analysis.program.parameters())
    row.removed = 1 - sum(p.numel() for p in pruned.parameters()) / whole
    row.axes, row.exact = len(analysis.units), sum(units.exact for units in analysis.units)
    row.frozen = len(analysis.frozen)
    row.unruled.update(analysis.unruled)
    return analysis


def table(names: list[str], seeds: int, *, axes: bool = False) -> list[Row]:
    """Measure and print every architecture."""
    print(
        "| architecture | verdict | axes (exact) | frozen | removed "
        "| changed | program | eager | masked | s | no rule for |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in names:
        row = Row(name)
        analysis = None
        try:
            for seed in range(seeds):
                analysis = measure(row, seed)
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}"[:160]
        d = row.differences
        print(
            f"| {name} | {row.verdict} | {row.axes} ({row.exact}) | {row.frozen} | {row.removed:.0%} "
            f"| {row.changed:.0e} | "
            + " | ".join(f"{d.get(key, float('nan')):.0e}" for key in ("program", "eager", "masked"))
            + f" | {row.seconds:.1f} | {', '.join(row.unruled) or row.error} |",
            flush=True,
        )
        if axes and analysis is not None:
            for units in analysis.units:
                why = "" if units.exact else f", {units.reason}"
                print(f"    {units.name}: {units.size} × {units.width}, {len(units.members)} tensors{why}")
            for frozen in analysis.frozen:
                print(f"    frozen: {frozen.reason}: {len(frozen.members)} dimensions")
        rows.append(row)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--axes", action="store_true", help="list every axis in words")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = options.names or zoo.names()
    rows = table(names, options.seeds, axes=options.axes)
    wrong = [row.name for row in rows if row.verdict == "WRONG"]
    refused = [row.name for row in rows if row.verdict == "refused"]
    print(
        f"\n{len(rows)} architectures: {len(rows) - len(wrong) - len(refused)} equal, "
        f"refused {refused}, wrong {wrong}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
