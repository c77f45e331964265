"""What does it save to walk block by block? Reconstruction both ways, in processor time, and whether bits are equal.

    OMP_NUM_THREADS=1 python bench/rebuild.py

A GPT-2 with random weights, pruned by magnitude to 2:4, is reconstructed with the inputs of its sub-modules found block
by block and, as where a model's blocks are no simple chain, from the model's start. "Finding" is all but the training.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

import torch

from secateur import prune_, reconstruct_
from secateur.pattern import NM
from secateur.recipes import magnitude
from secateur.recover import reconstruct as module


def taken(model: Any, dense: Any, masks: Any, data: Any, epochs: int) -> tuple[float, float]:
    """Processor seconds of reconstruction, and of them those outside of the training."""
    training, plain = 0.0, module.fit_

    def timed(*given: Any) -> Any:
        nonlocal training
        start = time.process_time()
        found = plain(*given)
        training += time.process_time() - start
        return found

    module.fit_ = timed
    start = time.process_time()
    try:
        reconstruct_(model, dense, masks, [data], epochs=epochs, patience=epochs)
    finally:
        module.fit_ = plain
    whole = time.process_time() - start
    return whole, whole - training


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="*", default=[6, 12])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    import transformers

    print("| blocks | from the start: all | finding | block by block: all | finding | times | same bits |")
    print("|---|---|---|---|---|---|---|")
    for blocks in given.blocks:
        torch.manual_seed(0)
        dense = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=given.width, n_head=4, n_layer=blocks, vocab_size=1024, bos_token_id=0, eos_token_id=0
            )
        ).eval()
        data = {"input_ids": torch.randint(1024, (given.samples, given.length))}
        found, models = [], []
        for way in (lambda *_: None, module.chained):
            model, before, module.chained = copy.deepcopy(dense), module.chained, way
            masks = prune_(model, recipe=replace(magnitude, pattern=NM(2, 4)))
            try:
                found.append(taken(model, dense, masks, data, given.epochs))
            finally:
                module.chained = before
            models.append(model.state_dict())
        same = all(torch.equal(value, models[1][name]) for name, value in models[0].items())
        (old, old_found), (new, new_found) = found
        print(
            f"| {blocks} | {old:.1f} s | {old_found:.1f} s | {new:.1f} s | {new_found:.1f} s | {old / new:.2f} / "
            f"{old_found / new_found:.2f} | {'yes' if same else 'NO'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
