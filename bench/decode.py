"""Greedy decoding of a GPT-2 of 124M parameters, random weights, through transformers: packed beside dense.

    OMP_NUM_THREADS=1 python bench/decode.py --compile
    OMP_NUM_THREADS=1 python bench/decode.py --model llama-1b --tokens 4 --rounds 3    # 12 GB of memory

Packed models hold the output head and the embeddings in int8 as well, or in dense 4-bit codes (`--outer int4`). Each
model writes the same number of tokens in turns; milliseconds a token (of processor time where there is one thread),
the minimum and the median over turns.
Weights are random and pruned at random places, which costs the same time as any other mask. Models are built with
all processors and measured with as many threads as were asked for.

`--compile` adds each model's forward under torch.compile (inductor, one graph), which keeps keys and values in a cache
of fixed size, so that every token has the same shapes; a model that is compiled again while it is measured stops the
bench.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur import prune_, random, sparsify_
from secateur.core.where import layers
from secateur.deploy.sparse.convert import install_sparse_
from secateur.deploy.sparse.packed import Block, Packed, pack, pack_integers, shape_of
from secateur.deploy.sparse.semi import PATTERNS

THREADS = torch.get_num_threads()
# one thread's own time does not count what other processes take from it
CLOCK = time.thread_time if THREADS == 1 else time.perf_counter
POOL = 1 << 25  # random numbers that weights are made of, again and again
PIECE = 512  # rows that are rounded at a time
PROMPT = 16
BLOCKS: dict[str, Block] = {"1": 1, "4": 4, "16": 16, "4x4": (4, 4)}
Write = Callable[[torch.Tensor, int], float]  # prompt, tokens: seconds a token after the prompt


@contextmanager
def all_processors() -> Iterator[None]:
    """What is built here is built by all of them."""
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(THREADS)


def gpt2(layers: int) -> Any:
    """The architecture with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()


def llama(layers: int) -> Any:
    """The shapes of Llama 3.2 1B with random weights; its head is a matrix of its own, so that all can be 8 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=128256,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):  # its own initialization takes a minute
        model: Any = LlamaForCausalLM(config).eval()
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # buffers that are computed, not drawn
    torch.manual_seed(0)
    numbers = torch.randn(POOL) * 0.02
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        for piece in parameter.data.view(-1).split(POOL):
            piece.copy_(numbers[: len(piece)])
    return model


def sharing(model: Any) -> Any:
    """A copy whose tensors are the same."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def dynamic(model: Any) -> Any:
    """torch's dynamic 8-bit quantization of all projections and the head, layers side by side on all processors."""
    model = sharing(model)
    found = [
        (p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = pool.map(_dynamic, [module for _, module in found])
        for (path, _), module in zip(found, made, strict=True):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
    return model


def _dynamic(module: Any) -> nn.Module:
    if type(module).__name__ == "Conv1D":
        linear = nn.Linear(module.nx, module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.data.t().contiguous())
        linear.bias = nn.Parameter(module.bias.data)
        module = linear
    module.qconfig = torch.ao.quantization.default_dynamic_qconfig
    made: nn.Module = torch.ao.nn.quantized.dynamic.Linear.from_float(module)
    return made


def peers(dense: Any, wanted: list[str]) -> dict[str, Any]:
    """The dense model in torch's three ways."""
    made = {
        "float32": lambda: dense,
        "bfloat16": lambda: copy.deepcopy(dense).bfloat16(),
        "int8": lambda: dynamic(dense),
    }
    return {("torch dynamic int8" if name == "int8" else f"torch {name}"): made[name]() for name in wanted}


def in_float32(dense: Any, sparsity: float, of_outer: str) -> tuple[Any, float]:
    """The pruned model packed as it is, and its megabytes."""
    model = copy.deepcopy(dense)
    prune_(model, sparsity, random)
    done = sparsify_(model, outer=of_outer, measure=False)
    return model, sum(layer.packed_bytes for layer in done.layers) / 1e6


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and a scale for each row, a piece at a time, which stays in memory that was used before."""
    integers, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    for first in range(0, len(weight), PIECE):
        rows = slice(first, first + PIECE)
        scale[rows] = weight[rows].abs().amax(1, keepdim=True) / 127
        integers[rows] = (weight[rows] / scale[rows]).round_()
    return integers, scale


def in_int8(
    dense: Any, points: list[tuple[str, float]], of_outer: str
) -> dict[tuple[str, float], tuple[Any, float]]:
    """The model in 8 bits with blocks and shares of zeros, and its megabytes; scales reach each row's largest weight.

    What `sparsify_(model, "int8", outer="int8", measure=False)` makes, but for its search of better scales and for
    N:M, which would have to be measured.
    """
    found = {point: [sharing(dense), 0.0] for point in points}
    chance = torch.rand(POOL)
    for layer in layers(dense):
        matrix = layer.layout.to_matrices(layer.weight.detach())[0]
        integers, scale = rounded(matrix)
        outer = layer.role in ("embedding", "head")
        whole = None
        if outer:
            whole = (
                pack(matrix, "int4", form="dense")
                if of_outer == "int4"
                else pack_integers(integers, scale, form="dense")
            )
        for (block, sparsity), held in found.items():
            packed = whole
            if packed is None:
                packed = pruned(integers, scale, block, sparsity, chance)
            install_sparse_(held[0], (layer.name, *layer.tied), packed)
            held[1] += packed.nbytes / 1e6
    return {point: (model, size) for point, (model, size) in found.items()}


def pruned(
    integers: torch.Tensor, scale: torch.Tensor, block: str, sparsity: float, chance: torch.Tensor
) -> Packed:
    """Packed, with blocks cut by chance, or all but N of every M weights of a row."""
    rows, columns = integers.shape
    if block in PATTERNS:
        kept, among = map(int, block.split(":"))
        order = chance[: rows * columns].view(rows, -1, among).argsort(2).argsort(2)
        return pack_integers(integers.masked_fill((order >= kept).view(rows, columns), 0), scale, form=block)
    high, wide = shape_of(BLOCKS[block])
    units = -(-rows // high), -(-columns // wide)
    cut = (chance < sparsity)[: units[0] * units[1]].view(units)
    cut = cut.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return pack_integers(integers.masked_fill(cut, 0), scale, block=BLOCKS[block])


def build(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """The dense model in torch's ways, and packed; and the megabytes of packed ones."""
    dense = llama(given.layers or 16) if given.model == "llama-1b" else gpt2(given.layers or 12)
    models, size = peers(dense, given.peers), {}
    points = [(block, sparsity) for sparsity in given.sparsity for block in given.block]
    points += [(name, 1 - PATTERNS[name][0] / 16) for name in given.pattern]
    integers = in_int8(dense, points, given.outer) if "int8" in given.kinds else {}
    made = {
        f"packed float32 {s:.0%}": in_float32(dense, s, given.outer)
        for s in given.sparsity
        if "float32" in given.kinds
    }
    made |= {
        f"packed int8 {sparsity:.0%}" + ("" if block == "1" else f", {block}"): held
        for (block, sparsity), held in integers.items()
    }
    for name, held in made.items():
        models[name], size[name] = held
    return models, size


@torch.no_grad()
def write(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """As a model does by itself, with keys and values that grow."""
    state = model(ids, use_cache=True)
    start = CLOCK()
    for _ in range(tokens):
        ids = state.logits[:, -1:].argmax(-1)
        state = model(ids, past_key_values=state.past_key_values, use_cache=True)
    return (CLOCK() - start) / tokens


@torch.no_grad()
def compiled(model: Any, most: int) -> Write:
    """The same in one graph for a token, compiled now, with room for so many tokens.

    Raises:
        Exception: of torch.compile, of whatever kind, where the model is not one graph.
    """
    from transformers import StaticCache

    state = StaticCache(config=model.config, max_cache_len=PROMPT + most)

    def token(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids, past_key_values=state, use_cache=True).logits[:, -1:].argmax(-1)
        return found

    step = torch.compile(token, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def writes(ids: torch.Tensor, tokens: int) -> float:
        state.reset()
        ids = token(ids)
        start = CLOCK()
        for _ in range(tokens):
            ids = step(ids)
        return (CLOCK() - start) / tokens

    writes(torch.zeros(1, PROMPT, dtype=torch.int64), 2)
    return writes


def all_compiled(models: dict[str, Any], tokens: int) -> dict[str, Write]:
    """Those that compile, and a line on each."""
    found: dict[str, Write] = {}
    torch._dynamo.config.recompile_limit = 2 * len(models) + 8  # one code, a graph for each model
    for name, model in models.items():
        start = time.perf_counter()
        try:
            found[f"{name}, compiled"] = compiled(model, tokens)
            print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
        except Exception as error:  # the bench says what does not compile and goes on
            words = next((line for line in str(error).splitlines() if line.strip()), "")
            print(f"{name}: does not compile: {type(error).__name__}: {words}", flush=True)
    return found


def measured(writers: dict[str, Write], given: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds a token of every turn but the first."""
    ids = torch.randint(0, 50000, (1, PROMPT))
    times: dict[str, list[float]] = {name: [] for name in writers}
    for number in range(given.rounds + 1):
        for name, writer in writers.items():
            seconds = writer(ids, given.tokens if number else 1)
            if number:
                times[name].append(seconds * 1e3)
    return times


def show(times: dict[str, list[float]], size: dict[str, float]) -> None:
    """Print a table."""
    middle = {name: statistics.median(value) for name, value in times.items()}
    against = [name for name in times if name.startswith("torch")]
    heads = " | ".join(f"x {name.removeprefix('torch ')}" for name in against)
    print(
        f"\n| | ms a token (median) | minimum | tokens/s | {heads} | MB packed |\n"
        + "|---" * (5 + len(against))
        + "|"
    )
    for name, value in times.items():
        ratios = " | ".join(f"{middle[peer] / middle[name]:.2f}" for peer in against)
        held = f"{size[name]:.0f}" if name in size else ""
        rate = 1e3 / middle[name]
        print(f"| {name} | {middle[name]:.1f} | {min(value):.1f} | {rate:.1f} | {ratios} | {held} |")


def main() -> None:
    """Build, measure in turns, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["gpt2", "llama-1b"], default="gpt2")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7])
    parser.add_argument("--peers", nargs="*", choices=["float32", "bfloat16", "int8"], default=None)
    parser.add_argument("--kinds", nargs="*", choices=["float32", "int8"], default=None)
    parser.add_argument("--block", nargs="*", default=["1"], choices=list(BLOCKS), help="of int8")
    parser.add_argument("--pattern", nargs="*", default=[], choices=list(PATTERNS), help="of int8, N:M")
    parser.add_argument("--outer", choices=["int8", "int4"], default="int8", help="of heads and embeddings")
    parser.add_argument("--compile", action="store_true", help="the same models under torch.compile as well")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    many = given.model == "llama-1b"
    given.peers = given.peers or (["float32", "int8"] if many else ["float32", "bfloat16", "int8"])
    given.kinds = given.kinds or (["int8"] if many else ["float32", "int8"])
    start = time.perf_counter()
    with all_processors():
        models, size = build(given)
    print(f"{THREADS} threads, {given.model}, built in {time.perf_counter() - start:.0f} s", flush=True)
    writers: dict[str, Write] = {name: partial(write, model) for name, model in models.items()}
    if given.compile:
        writers |= all_compiled(models, given.tokens)
    with torch.compiler.set_stance("fail_on_recompile"):
        times = measured(writers, given)
    show(times, size)


if __name__ == "__main__":
    main()
