"""Greedy decoding of a GPT-2 of 124M parameters, random weights, through transformers: packed beside dense.

    OMP_NUM_THREADS=1 python bench/decode.py
    OMP_NUM_THREADS=1 python bench/decode.py --model llama-1b --tokens 4 --rounds 3    # 12 GB of memory

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


def llama(layers: int) -> Any:
    """The shapes of Llama 3.2 1B with random weights; its head is a matrix of its own, so that all can be 8 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shapes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    config = LlamaConfig(
        num_hidden_layers=layers,
        vocab_size=128256,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **shapes,
    )
    return LlamaForCausalLM(config).eval()


def cut_(model: Any, sparsity: float) -> None:
    """Zeros at random places of all projections; where does not matter to time."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.weight.data.masked_fill_(torch.rand(module.weight.shape) < sparsity, 0)


def large(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """The Llama dense, in torch's dynamic 8 bits, and packed in int8; one copy of dense weights at a time."""
    pruned = llama(given.layers or 16)
    models = {"torch float32": pruned, "torch dynamic int8": dynamic(pruned)}
    size = {}
    for sparsity in given.sparsity:
        packed = copy.deepcopy(pruned)
        cut_(packed, sparsity)
        name = f"packed int8 {sparsity:.0%}"
        done = sparsify_(packed, "int8", outer="int8", measure=False)
        models[name], size[name] = packed, sum(layer.packed_bytes for layer in done.layers) / 1e6
    return models, size


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


def small(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """The GPT-2 dense in three types, and packed in two."""
    dense = gpt2(given.layers or 12)
    models = {
        "torch float32": dense,
        "torch bfloat16": copy.deepcopy(dense).bfloat16(),
        "torch dynamic int8": dynamic(dense),
    }
    size = {}
    for sparsity in given.sparsity:
        pruned = copy.deepcopy(dense)
        prune_(pruned, sparsity, random)
        for kind in ("float32", "int8"):
            name = f"packed {kind} {sparsity:.0%}"
            models[name] = copy.deepcopy(pruned)
            done = sparsify_(models[name], kind, outer="int8", measure=False)
            size[name] = sum(layer.packed_bytes for layer in done.layers) / 1e6
    return models, size


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["gpt2", "llama-1b"], default="gpt2")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    models, size = (large if given.model == "llama-1b" else small)(given)
    ids = torch.randint(0, 50000, (1, 16))
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(given.rounds + 1):
        for name, model in models.items():
            seconds = write(model, ids, given.tokens)
            if number:
                times[name].append(seconds * 1e3)
    middle = {name: statistics.median(value) for name, value in times.items()}
    peers = [name for name in models if name.startswith("torch")]
    print(f"{torch.get_num_threads()} threads, {given.model}")
    heads = " | ".join(f"x {name.removeprefix('torch ')}" for name in peers)
    print(
        f"\n| | ms a token (median) | minimum | tokens/s | {heads} | MB packed |\n"
        + "|---" * (5 + len(peers))
        + "|"
    )
    for name, value in times.items():
        ratios = " | ".join(f"{middle[peer] / middle[name]:.2f}" for peer in peers)
        held = f"{size[name]:.0f}" if name in size else ""
        rate = 1e3 / middle[name]
        print(f"| {name} | {middle[name]:.1f} | {min(value):.1f} | {rate:.1f} | {ratios} | {held} |")


if __name__ == "__main__":
    main()
