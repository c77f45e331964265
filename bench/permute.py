"""What does putting channels in order give to 2:4? Held-out perplexity of stories260K with and without.

The same from file to file, and whether it gives the same bits.

OMP_NUM_THREADS=1 python bench/permute.py
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality import RECIPES, SHARED, ids, stories
from torch import nn

from secateur import evaluate
from secateur import model as models
from secateur.channels import permute_channels_
from secateur.pattern import NM
from secateur.prune import prune_
from secateur.recipes import Recipe
from secateur.stream import prune_checkpoint


def main() -> None:
    """Print one line a method."""
    loaded = models.load(str(SHARED / "models/stories260K"), offline=True)
    batches = stories(loaded.tokenizer, 0, 32)
    tokens = ids("tinystories_test.txt", loaded.tokenizer)[:8192]
    example = {"input_ids": batches[0]["input_ids"][:4]}
    for name in ("Wanda", "RIA", "SparseGPT"):
        recipe, found = replace(RECIPES[name], pattern=NM(2, 4)), []
        for ordered in (False, True):
            model = copy.deepcopy(loaded.model)
            if ordered:
                start = time.process_time()
                said = permute_channels_(model, recipe, batches, example=example)
                seconds = time.process_time() - start
                with torch.no_grad():
                    pair = [each(**example).logits for each in (model, loaded.model)]
                off = float((pair[0] - pair[1]).abs().max() / pair[1].abs().max())
            prune_(model, recipe=recipe, data=batches)
            if ordered:
                streamed = from_files(recipe, batches, model)
            found.append(evaluate.perplexity(model, tokens, context=256).value)
        print(f"{name}: {found[0]:.2f} -> {found[1]:.2f}; {said}; logits off by {off:.1e}; {seconds:.1f} CPU s")
        print(f"  from file to file: {streamed}")


def from_files(recipe: Recipe, batches: list[Any], expected: nn.Module) -> str:
    """Stream the same; how it compares, and what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        prune_checkpoint(
            SHARED / "models/stories260K", Path(folder) / "out", None, recipe, data=batches, permute=True
        )
        seconds = time.process_time() - start
        found = models.load(str(Path(folder) / "out"), offline=True).model.state_dict()
    same = all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    return f"{'the same bits' if same else 'other bits'}, {seconds:.1f} CPU s with pruning"


if __name__ == "__main__":
    main()
