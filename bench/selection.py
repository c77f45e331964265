"""Global magnitude pruning of a GPT-2-shaped model against torch.nn.utils.prune.global_unstructured.

Every measurement is one fresh process that builds the same weights, warms up on a small model, and then prunes
once; the contestants take turns. Seconds are wall-clock of that one call; CPU seconds, which a busy machine disturbs
less, stand beside them. Extra memory is the peak of the
resident set during the call minus the resident set before it, so what a method returns (masks, copies of
the weights) counts too.

    python bench/selection.py                     # 85 million weights: minutes, and 5 GB for the peer
    python bench/selection.py --size 3e6 --json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PEER = "torch global_unstructured"
OURS = ("secateur prune_", "secateur selection only")
MEGA = 1e6


def build(size: float, layout: str) -> Any:
    """Twelve blocks of GPT-2's four matrices; width 768 makes 84.9 million weights."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    d = max(8, round((size / 144) ** 0.5 / 8) * 8)
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    if layout == "linear":
        layers = [nn.Linear(columns, out, bias=False) for _ in range(12) for out, columns in shapes]
    else:
        from transformers.pytorch_utils import Conv1D

        layers = [Conv1D(out, columns) for _ in range(12) for out, columns in shapes]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers)


def by_prune(model: Any) -> Any:
    from secateur import global_magnitude, prune_

    return prune_(model, 0.5, global_magnitude)


def by_selection(model: Any) -> Any:
    """What `prune_` does at heart, on bare tensors: the counts of the global cut, then one mask a tensor."""
    from secateur.allocate import globally
    from secateur.core.select import Candidates, all_but_smallest

    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.dim() == 2}
    layers = {
        name: Candidates(tuple(w.shape), 1, lambda w=w: w.abs(), magnitudes=lambda w=w: w)
        for name, w in weights.items()
    }
    total = sum(w.numel() for w in weights.values())
    kept = globally(layers, total - total // 2)
    return {
        name: all_but_smallest(layer.keys().reshape(1, -1), layer.units - kept[name], guess=layer.guess.value)
        for name, layer in layers.items()
    }


def by_torch(model: Any) -> Any:
    from torch.nn.utils import prune

    prune.global_unstructured(
        [(layer, "weight") for layer in model], pruning_method=prune.L1Unstructured, amount=0.5
    )
    return model


CONTESTANTS: dict[str, Callable[[Any], Any]] = {OURS[0]: by_prune, OURS[1]: by_selection, PEER: by_torch}


def pruned(result: Any, model: Any) -> int:
    """Zeros that the contestant made, so that no one is measured for doing nothing."""
    import torch

    if isinstance(result, dict):
        return sum(int(torch.count_nonzero(~mask)) for mask in result.values())
    return sum(int((layer.weight == 0).sum()) for layer in model)


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure(name: str, size: float, layout: str, threads: int) -> dict[str, Any]:
    """Prune once in this process."""
    import torch

    torch.set_num_threads(threads)
    prune = CONTESTANTS[name]
    prune(build(2e5, layout))
    model = build(size, layout)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts anew from here
    before = memory("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    result = prune(model)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    extra = memory("VmHWM") - before
    weights = sum(layer.weight.numel() for layer in model)
    return {
        "method": name,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "extra_bytes": extra,
        "weights": weights,
        "zeros": pruned(result, model),
    }


def in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    threads = str(arguments.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, __file__, "--one", name, "--size", str(arguments.size)]
    command += ["--layout", arguments.layout, "--threads", threads]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for turn in range(max(arguments.repeats, arguments.peer_repeats)):
        for name in CONTESTANTS:
            if turn < (arguments.peer_repeats if name == PEER else arguments.repeats):
                runs.append(in_own_process(name, arguments))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    import torch

    return {
        "weights": runs[0]["weights"],
        "layout": arguments.layout,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "methods": [summary(name, [run for run in runs if run["method"] == name]) for name in CONTESTANTS],
    }


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    return {
        "method": name,
        "runs": len(runs),
        "zeros": runs[0]["zeros"],
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "extra_bytes": max(run["extra_bytes"] for run in runs),
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"global magnitude, {result['weights']:,} float32 weights ({result['layout']}), half removed; "
        f"{result['threads']} thread(s) of {result['cores']} cores, torch {result['torch']}"
    )
    peer = next(method for method in result["methods"] if method["method"] == PEER)
    print(
        f"{'':26}{'seconds: median':>16}{'min':>9}{'max':>9}{'runs':>6}{'faster':>9}{'CPU':>9}{'faster':>9}"
        f"{'extra MB':>11}{'of the peer':>13}{'zeros':>14}"
    )
    for method in result["methods"]:
        seconds = method["seconds"]
        faster = f"{peer['seconds']['median'] / seconds['median']:8.1f}x"
        cpu = f"{method['cpu_seconds']:9.3f}{peer['cpu_seconds'] / method['cpu_seconds']:8.1f}x"
        share = f"{method['extra_bytes'] / peer['extra_bytes']:.1%}"
        print(
            f"{method['method']:26}{seconds['median']:16.3f}{seconds['min']:9.3f}{seconds['max']:9.3f}"
            f"{method['runs']:6}{faster}{cpu}{method['extra_bytes'] / MEGA:11.1f}{share:>13}{method['zeros']:14,}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=84_934_656, help="about how many weights")
    parser.add_argument("--layout", choices=["linear", "conv1d"], default="linear")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours")
    parser.add_argument("--peer-repeats", type=int, default=1, help="runs of global_unstructured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.size, arguments.layout, arguments.threads)))
        return
    if min(arguments.repeats, arguments.peer_repeats) < 1:
        parser.error("every contestant needs at least one run")
    result = compare(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
