"""Half of every free axis gone, on every architecture: is the smaller model the masked one? Beside torch-pruning.

    OMP_NUM_THREADS=1 python bench/shrinking.py --work runs/shrinking

secateur: one call of `shrink` a seed, without help for any model; seeds draw which half of each axis stays and the
inputs it is judged on. torch-pruning: the call of its README, `BasePruner(model, inputs, importance=...,
pruning_ratio=0.5, ignored_layers=[the classifier]).step()`, once, as it is deterministic.

Both are judged alike, by a model with zeros in what was removed, made without the tool's help where that is possible:
for secateur the exported graph with norms over the survivors and, for axes that are exact, the eager model with zeros;
for torch-pruning a copy of the eager model with zeros in the slices that it says it removes, and norms over the rest.

    equal      within 1e-5 of the largest value (float32), and something went
    refused    an error before a model was returned, by name
    WRONG      a model that runs and computes something else
    nothing    a model that runs, with every parameter there
    broken     a model that cannot run, or an error that is none of ours
    no end     stopped after --limit seconds

Every architecture and tool has a process of its own, and is a line in WORK/points.jsonl; what is there is not
run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import zoo
from architectures import difference, tensors, zeroed

from secateur import shrink, shrunk
from secateur.core.example import Example
from secateur.core.units import Analysis, analyse, masked_program
from secateur.errors import SecateurError

TOLERANCE = 1e-5
VERDICTS = ("equal", "refused", "WRONG", "nothing", "broken", "no end")
HEADS = ("head", "classifier", "lm_head", "score", "fc")  # last names of classifiers, for torch-pruning


def other(value: Any, generator: torch.Generator) -> Any:
    """Inputs of the same shapes, other numbers."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator)
    return torch.randint(3, 53, value.shape, generator=generator)


@torch.no_grad()
def secateur(name: str, seeds: int, tell: Callable[[dict[str, Any]], None]) -> None:
    model, args, kwargs, output = zoo.build(name)
    analysis = analyse(model, args, kwargs, output=output)
    pick = (lambda answer: answer[output]) if output else (lambda answer: answer)
    whole = sum(p.numel() for p in model.parameters())
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        keep = {u.name: torch.randperm(u.size, generator=generator)[: u.size // 2] for u in analysis.units}
        given = Example(
            tuple(other(x, generator) for x in args), {k: other(x, generator) for k, x in kwargs.items()}
        )
        try:
            small = shrink(model, keep, Example(args, kwargs), output=pick, analysis=analysis)
        except SecateurError as error:
            tell({"seed": seed, "verdict": "refused", "why": str(error)[:300]})
            continue
        wanted = tensors(masked_program(analysis, keep)(*given.args, **given.kwargs), None)
        gap = difference(wanted, tensors(small(*given.args, **given.kwargs), output))
        if not seed:
            gap = max(gap, eager(model, analysis, keep, given, output, pick))
        left = sum(p.numel() for p in small.parameters())
        moved = difference(tensors(model(*given.args, **given.kwargs), output), wanted)
        verdict = "WRONG" if not gap <= TOLERANCE else "equal" if left < whole and moved > 1e-3 else "nothing"
        held = [axis.name for axis in shrunk(small).padded]
        tell({"seed": seed, "verdict": verdict, "gap": gap, "gone": 1 - left / whole, "padded": held,
              "axes": len(analysis.units), "frozen": len(analysis.unruled)})  # fmt: skip


def eager(
    model: nn.Module, analysis: Analysis, keep: dict[str, Any], given: Example, output: str | None, pick: Any
) -> float:
    """The exact axes alone, against zeros in the eager model: no graph takes part in the judgement."""
    exact = {name: kept for name, kept in keep.items() if analysis[name].exact}
    if not exact:
        return 0.0
    small = shrink(model, exact, given, output=pick, analysis=analysis)
    wanted = tensors(zeroed(model, analysis, exact)(*given.args, **given.kwargs), output)
    return difference(wanted, tensors(small(*given.args, **given.kwargs), output))


def torch_pruning(name: str, seeds: int, tell: Callable[[dict[str, Any]], None]) -> None:
    import torch_pruning as tp

    model, args, kwargs, output = zoo.build(name)
    dense, whole = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    heads = [
        m for path, m in model.named_modules() if path.split(".")[-1] in HEADS and isinstance(m, nn.Linear)
    ]
    heads += [m[-1] for path, m in model.named_modules() if path == "head" and isinstance(m, nn.Sequential)]
    try:
        pruner = tp.pruner.BasePruner(
            model,
            (args, kwargs),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=heads,
            forward_fn=lambda model, given: model(*given[0], **given[1]),
            output_transform=(lambda answer: answer[output]) if output else None,
        )
        gone = removed(model, pruner)
        generator = torch.Generator().manual_seed(1000)
        given = [other(x, generator) for x in args], {k: other(x, generator) for k, x in kwargs.items()}
        with torch.no_grad():
            found = tensors(model(*given[0], **given[1]), output)
    except Exception as error:
        tell({"seed": 0, "verdict": "broken", "why": f"{type(error).__name__}: {str(error)[:200]}"})
        return
    left = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        wanted = tensors(without(dense, gone)(*given[0], **given[1]), output)
    gap = difference(*alike(wanted, found))
    verdict = "nothing" if left == whole else "equal" if gap <= TOLERANCE else "WRONG"
    tell({"seed": 0, "verdict": verdict, "gap": gap, "gone": 1 - left / whole})


def removed(model: nn.Module, pruner: Any) -> dict[tuple[str, int], set[int]]:
    """Prune, and note (parameter, dimension) -> positions that go, as the tool's groups say."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    paths = {module: path for path, module in model.named_modules()}
    left = {
        (name, dim): list(range(size))
        for name, p in model.named_parameters()
        for dim, size in enumerate(p.shape)
    }
    sizes = {key: len(positions) for key, positions in left.items()}
    for group in pruner.step(interactive=True):  # positions of a group are those of what earlier groups left
        gone: dict[tuple[str, int], set[int]] = {}
        for dep, idxs in list(group):
            target, handler = dep.target.module, dep.handler.__name__
            if isinstance(target, nn.Parameter):
                dim = getattr(dep.target, "pruning_dim", None)
                name = names.get(target) or str(dep.target.name).split(" ")[0]
                gone.setdefault((name, 0 if dim is None else dim % target.dim()), set()).update(idxs)
                continue
            if target not in paths:
                continue
            for key, parameter in target.named_parameters(recurse=False):
                at = dimension(target, parameter, handler)
                if at is not None:
                    name = f"{paths[target]}.{key}".lstrip(".")
                    gone.setdefault((name, at), set()).update(idxs)
        for key, positions in gone.items():
            left[key] = [at for number, at in enumerate(left[key]) if number not in positions]
        group.prune()
        names = {parameter: name for name, parameter in model.named_parameters()}
    lost = {key: set(range(size)) - set(left[key]) for key, size in sizes.items()}
    return {key: positions for key, positions in lost.items() if positions}


def dimension(module: nn.Module, parameter: Tensor, handler: str) -> int | None:
    """Which dimension of a layer's parameter a step of the tool cuts."""
    inner = handler == "prune_in_channels"
    if parameter.dim() == 1:
        norm = "norm" in type(module).__name__.lower()
        return 0 if norm or not inner else None
    swapped = isinstance(module, nn.Embedding) or "ConvTranspose" in type(module).__name__
    if type(module).__name__ == "Conv1D":
        swapped = True
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return 0
    return int(inner != swapped)


def without(model: nn.Module, gone: dict[tuple[str, int], set[int]]) -> nn.Module:
    """The eager model with zeros in what was removed; norms over features leave the removed ones out."""
    for (name, dim), positions in gone.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, key)
        at = torch.tensor(sorted(positions))
        parameter.index_fill_(dim, at, 0.0)
        kind = type(module).__name__.lower()
        if key == "weight" and ("layernorm" in kind or "rmsnorm" in kind):
            narrow(module, torch.tensor(sorted(set(range(len(parameter))) - positions)))
    return model


def narrow(norm: nn.Module, kept: Tensor) -> None:
    """Let a norm over the last dimension see the kept features alone."""
    small: Any = copy.deepcopy(norm)
    for key, parameter in list(small.named_parameters()):
        setattr(small, key, nn.Parameter(parameter[kept]))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(kept),)

    def forward(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., kept] = small(x[..., kept])
        return out

    norm.forward = forward  # type: ignore[method-assign]


def alike(wanted: list[Tensor], found: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Where the tool narrowed the output as well, the columns that are left of the masked one."""
    out = []
    for want, have in zip(wanted, found, strict=True):
        if want.shape != have.shape and want.shape[:-1] == have.shape[:-1]:
            alive = want.flatten(0, -2).abs().sum(0) > 0
            want = want[..., alive]
        out.append(want)
    same = all(a.shape == b.shape for a, b in zip(out, found, strict=True))
    return (out, found) if same else ([torch.ones(1)], [torch.full((1,), float("inf"))])


TOOLS = {"secateur": secateur, "torch-pruning": torch_pruning}


def child(tool: str, name: str, seeds: int, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    started, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    def tell(line: dict[str, Any]) -> None:
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
        pipe.send(line | {"cpu": cpu, "wall": time.perf_counter() - started})

    try:
        TOOLS[tool](name, seeds, tell)
    except SecateurError as error:
        tell({"seed": -1, "verdict": "refused", "why": str(error)[:300]})
    except Exception as error:
        tell({"seed": -1, "verdict": "broken", "why": f"{type(error).__name__}: {str(error)[:200]}"})
    pipe.close()


def measured(tool: str, name: str, seeds: int, limit: float) -> dict[str, Any]:
    """One architecture and tool in a process of its own, stopped at the limit."""
    context = multiprocessing.get_context("fork")  # torch and transformers are loaded once
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(tool, name, seeds, theirs))
    process.start()
    theirs.close()
    runs, until = [], time.monotonic() + limit
    try:
        while mine.poll(max(0.0, until - time.monotonic())):
            runs.append(mine.recv())
    except EOFError:
        process.join()
    stopped = process.is_alive()
    if stopped:
        process.kill()
        process.join()
    if stopped or not runs:
        code = process.exitcode
        verdict, why = ("no end", f"stopped after {limit:g} s") if stopped else ("broken", f"exit {code}")
        runs.append({"seed": -1, "verdict": verdict, "why": why})
    return {"tool": tool, "name": name, "runs": runs}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def worst(runs: list[dict[str, Any]]) -> str:
    """WRONG and broken outweigh what other seeds said."""
    order = ("WRONG", "no end", "broken", "refused", "nothing", "equal")
    return min((run["verdict"] for run in runs), key=order.index)


def cells(point: dict[str, Any] | None) -> Iterator[str]:
    if point is None:
        yield from ("not run", "", "", "")
        return
    runs = point["runs"]
    gone = [run["gone"] for run in runs if "gone" in run]
    gaps = [run["gap"] for run in runs if "gap" in run]
    kinds = Counter(run["verdict"] for run in runs)
    yield worst(runs) + (f" ({', '.join(f'{n} {v}' for v, n in kinds.items())})" if len(kinds) > 1 else "")
    yield f"{min(gone):.0%} to {max(gone):.0%}" if len(set(gone)) > 1 else f"{gone[0]:.0%}" if gone else "-"
    yield f"{max(gaps):.0e}" if gaps else "-"
    yield f"{runs[-1]['cpu']:.0f}" if "cpu" in runs[-1] else "-"


def table(found: list[dict[str, Any]]) -> str:
    points = {(p["tool"], p["name"]): p for p in found}
    lines = ["| architecture | secateur | parameters gone | gap | CPU-s | torch-pruning | gone | gap | CPU-s |"]
    lines.append("|---" * 9 + "|")
    names = dict.fromkeys(p["name"] for p in found)
    for name in names:
        row = [*cells(points.get(("secateur", name))), *cells(points.get(("torch-pruning", name)))]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    for tool in TOOLS:
        mine = [p for p in found if p["tool"] == tool]
        tally = Counter(worst(p["runs"]) for p in mine)
        runs = Counter(run["verdict"] for p in mine for run in p["runs"])
        said = ", ".join(f"{tally[v]} {v}" for v in VERDICTS if tally[v])
        lines.append(f"\n{tool}: {len(mine)} architectures: {said}; single runs: {dict(runs)}")
    for p in found:
        last = p["runs"][-1]
        if last.get("why"):
            lines.append(f"\n{p['tool']}, {p['name']}: {last['verdict']}: {last['why']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--work", type=Path, default=Path("runs/shrinking"))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=180, help="seconds for one architecture and tool")
    parser.add_argument("--for", dest="stop", type=float, default=1e9, help="seconds, then start nothing more")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file, started = args.work / "points.jsonl", time.monotonic()
    if not args.table:
        done = {(p["tool"], p["name"]) for p in read(file)}
        for name in args.names or zoo.names():
            for tool in args.tools:
                if (tool, name) in done or time.monotonic() - started > args.stop:
                    continue
                point = measured(tool, name, args.seeds, args.limit)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(point) + "\n")
                print(tool, name, worst(point["runs"]), [run.get("gap") for run in point["runs"]], flush=True)
    print(table(read(file)))


if __name__ == "__main__":
    main()
