"""Does `best` take as long as it says before? The estimate beside a whole run, in processor time.

    OMP_NUM_THREADS=1 python bench/foretell.py
    OMP_NUM_THREADS=1 python bench/foretell.py --gpt2

A line a point: model, target, tokens of calibration; seconds told and taken of `best` and of ALPS alone; their ratio.
With --gpt2 it is only told, of a GPT-2 of 124 million parameters with random weights and 128 sequences of 1,024 tokens.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace

import torch
from quality import MODELS

from secateur import best_, plan, prune_
from secateur import model as models
from secateur.estimate import estimate
from secateur.pattern import NM, Weights
from secateur.recipes import alps


def gpt2() -> None:
    """Tell of a whole GPT-2, 2:4."""
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    piece = {"input_ids": torch.randint(50000, (4, 1024))}
    todo = plan(model, recipe=replace(alps, pattern=NM(2, 4)))
    start = time.process_time()
    told = estimate(model, piece, 128 * 1024, todo, clock=time.process_time)
    print(
        f"best {told.best / 3600:.1f} hours, ALPS {told.alps / 60:.0f} minutes, Wanda {told.wanda / 60:.1f} minutes; "
        f"{told.speed:,.0f} tokens a second; telling took {time.process_time() - start:.0f} s"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["stories260K", "gpt2_3m"])
    parser.add_argument("--targets", nargs="*", default=["2:4", "50 %", "70 %"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--gpt2", action="store_true")
    given = parser.parse_args()
    if given.gpt2:
        return gpt2()
    print(
        "| model | target | tokens | best: told | taken | ratio | ALPS: told | taken | telling took |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in given.models:
        folder, draw, _ = MODELS[name]
        loaded = models.load(folder, offline=True)
        batches = draw(loaded.tokenizer, 0, given.samples)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        for target in given.targets:
            sparsity = None if target == "2:4" else float(target[:2]) / 100
            recipe = replace(alps, pattern=NM(2, 4) if sparsity is None else Weights())
            todo = plan(loaded.model, sparsity, recipe)
            start = time.process_time()
            told = estimate(loaded.model, batches[0], tokens, todo, clock=time.process_time)
            telling = time.process_time() - start
            taken = []
            for best in (False, True):
                model = copy.deepcopy(loaded.model)
                start = time.process_time()
                if best:
                    best_(model, sparsity, batches, pattern=recipe.pattern)
                else:
                    prune_(model, sparsity, recipe, data=batches)
                taken.append(time.process_time() - start)
            print(
                f"| {name} | {target} | {tokens:,} | {told.best:.1f} s | {taken[1]:.1f} s | "
                f"{told.best / taken[1]:.2f} | {told.alps:.1f} s | {taken[0]:.1f} s | {telling:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
