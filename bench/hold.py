"""What holding zeros costs a training step: the same step with and without `hold_`, in turns, in one process.

    OMP_NUM_THREADS=1 python bench/hold.py                 # gpt2_3m of the demonstration, ResNet-20 and ResNet-56
    OMP_NUM_THREADS=1 python bench/hold.py --models gpt2_3m --turns 10
    OMP_NUM_THREADS=2 python bench/hold.py --update 3      # what a new mask for 85 million weights takes

Each turn takes one step of each kind, in alternating order; the figure is the median of the ratios of the turns, in
processor seconds, which a busy machine disturbs less than the clock. A second control, dense against dense, shows how
far two equal things differ here. Because that is farther than what is measured, the last column times the hold alone,
as a share of a dense step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from secateur import Gradual, global_magnitude, hold_, linear, magnitude, prune_


def language_model() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    from secateur.demo.language import model_folder

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    ids = torch.randint(0, 4096, (8, 256))
    return model, lambda net: net(input_ids=ids, labels=ids).loss


def resnet(depth: int) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    from cifar import ResNet

    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    return ResNet(depth), lambda net: F.cross_entropy(net(images), labels)


MODELS = {"gpt2_3m": language_model, "resnet20": lambda: resnet(20), "resnet56": lambda: resnet(56)}


def stepper(
    model: nn.Module, loss: Callable[[nn.Module], torch.Tensor], held: bool
) -> tuple[Callable[[], float], ...]:
    """One training step of a copy of the model, and what holds its zeros; both give their processor seconds."""
    model = copy.deepcopy(model).train()
    masks = prune_(model, 0.5, magnitude)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    hold = hold_(model, masks, optimizer) if held else None

    def alone() -> float:
        assert hold is not None
        start = time.process_time()
        for _ in range(20):
            hold.step()
        return (time.process_time() - start) / 20

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        return time.process_time() - start

    return step, alone


def update(repeats: int) -> None:
    """Updates of a Gradual from 50 % on, of 85 million weights in 12 layers, by the clock and the processor."""
    for recipe, zeros in ((magnitude, 0.0), (global_magnitude, 0.0), (global_magnitude, 0.9)):
        model = nn.Sequential(*[nn.Linear(2660, 2660, bias=False) for _ in range(12)])
        prune_(model, zeros, magnitude)
        pruner = Gradual(model, recipe, linear(0.5, 0.5 + 0.05 * repeats), 1, 1 + repeats, 1)
        taken = []
        for _ in range(repeats + 1):
            clock, processor = time.perf_counter(), time.process_time()
            pruner.step()
            taken.append((time.perf_counter() - clock, time.process_time() - processor))
        seconds = [f"{clock:.2f} s ({processor:.2f} CPU-s)" for clock, processor in taken[1:]]
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{recipe}, {size:,} weights, {zeros:.0%} zero before, {torch.get_num_threads()} threads: "
            f"{', '.join(seconds)}",
            flush=True,
        )
        pruner.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument(
        "--update", type=int, metavar="REPEATS", help="instead: updates of the masks of 85 M weights"
    )
    args = parser.parse_args()
    if args.update:
        return update(args.update)
    print("| model | CPU-s a step | held / dense | quartiles | dense / dense | hold alone |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        model, loss = MODELS[name]()
        made = {kind: stepper(model, loss, kind == "held") for kind in ("dense", "held", "control")}
        steps = {kind: step for kind, (step, _) in made.items()}
        for step in steps.values():
            step()
        taken: dict[str, list[float]] = {kind: [] for kind in steps}
        for turn in range(args.turns):
            kinds = list(steps)[:: 1 if turn % 2 else -1]
            for kind in kinds:
                taken[kind].append(steps[kind]())
        ratios = [a / b for a, b in zip(taken["held"], taken["dense"], strict=True)]
        control = [a / b for a, b in zip(taken["control"], taken["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {statistics.median(taken['dense']):.3f} | {middle:.4f} | {low:.4f} to {high:.4f} | "
            f"{statistics.median(control):.4f} | {made['held'][1]() / statistics.median(taken['dense']):.3%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
