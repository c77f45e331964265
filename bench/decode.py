"""Greedy decoding of a GPT-2 of 124M parameters, random weights, through transformers: packed beside dense.

    OMP_NUM_THREADS=1 python bench/decode.py

Packed models hold the output head and the embeddings in int8 as well. Each model writes the same number of tokens in
turns; milliseconds a token (of processor time where there is one thread), the minimum and the median over turns.
Weights are random and pruned at random places, which costs the same time as any other mask.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from typing import Any

import torch
from torch import nn

from secateur import prune_, random, sparsify_

# one thread's own time does not count what other processes take from it
CLOCK = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def gpt2(layers: int) -> Any:
    """The architecture with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()


def dynamic(model: Any) -> Any:
    """torch's dynamic 8-bit quantization of all projections and the head."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.t().contiguous(), module.bias.data
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@torch.no_grad()
def write(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds a token after the prompt."""
    state = model(ids, use_cache=True)
    start = CLOCK()
    for _ in range(tokens):
        ids = state.logits[:, -1:].argmax(-1)
        state = model(ids, past_key_values=state.past_key_values, use_cache=True)
    return (CLOCK() - start) / tokens


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    dense = gpt2(given.layers)
    models = {
        "torch float32": dense,
        "torch bfloat16": copy.deepcopy(dense).bfloat16(),
        "torch dynamic int8": dynamic(dense),
    }
    size = {}
    for sparsity in (0.5, 0.7):
        pruned = copy.deepcopy(dense)
        prune_(pruned, sparsity, random)
        for kind in ("float32", "int8"):
            name = f"packed {kind} {sparsity:.0%}"
            models[name] = copy.deepcopy(pruned)
            done = sparsify_(models[name], kind, outer="int8", measure=False)
            size[name] = sum(layer.packed_bytes for layer in done.layers) / 1e6
    ids = torch.randint(0, 50257, (1, 16))
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(given.rounds + 1):
        for name, model in models.items():
            seconds = write(model, ids, given.tokens)
            if number:
                times[name].append(seconds * 1e3)
    middle = {name: statistics.median(value) for name, value in times.items()}
    print(f"{torch.get_num_threads()} threads, {given.layers} layers")
    print(
        "\n| | ms a token (median) | minimum | x float32 | x bfloat16 | x dynamic int8 | MB packed |\n"
        + "|---" * 7
        + "|"
    )
    for name, value in times.items():
        ratios = " | ".join(
            f"{middle[f'torch {key}'] / middle[name]:.2f}" for key in ("float32", "bfloat16", "dynamic int8")
        )
        held = f"{size[name]:.0f}" if name in size else ""
        print(f"| {name} | {middle[name]:.1f} | {min(value):.1f} | {ratios} | {held} |")


if __name__ == "__main__":
    main()
