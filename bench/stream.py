"""Peak memory and time of pruning checkpoints larger than memory, from file to file.

    python bench/stream.py global --gb 4 8            exact global magnitude
    python bench/stream.py wanda --gb 2 4             a forward pass, block by block
    python bench/stream.py sparsegpt --gb 0.5 1

A Llama-shaped checkpoint of random weights is written shard by shard into a temporary folder, pruned in a process
of its own, and removed. Peak memory is the kernel's high-water mark of that process (VmHWM): Python, torch and
transformers included, and whatever is mapped as well; beside it what was told before the run began. Two sizes show
whether time is linear in size, in processor seconds, which other load on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SHARD = 1 << 30
WIDE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
NARROW = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
WORDS = 32_000
BYTES = {"bf16": 2, "fp32": 4}

CHILD = """
import json, re, sys, time
import torch
asked = json.loads(sys.argv[1])
torch.set_num_threads(asked["threads"])
from secateur import recipes
from secateur.folder import new_folder
from secateur.stream.job import carry_out, prepare, read_source
recipe = getattr(recipes, {"global": "global_magnitude"}.get(asked["method"], asked["method"]))
data = None
if asked["method"] not in ("global", "magnitude"):
    torch.manual_seed(0)
    ids = torch.randint(0, asked["words"], (asked["samples"], asked["tokens"]))
    data = [{"input_ids": row[None]} for row in ids]
start, busy = time.perf_counter(), time.process_time()
with new_folder(asked["target"]) as folder:
    prepared = prepare(read_source(asked["source"]), 0.5, recipe, data=data)
    done = carry_out(prepared, folder)
seconds, busy = time.perf_counter() - start, time.process_time() - busy
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
found = {"seconds": seconds, "busy": busy, "peak": peak, "told": prepared.need.size}
print(json.dumps({**found, "sparsity": done.sparsity, "weights": done.size}))
"""


def tensors_of(config: dict, blocks: int) -> list[tuple[str, tuple[int, ...]]]:
    wide, inner = config["hidden_size"], config["intermediate_size"]
    inside = [(f"self_attn.{name}_proj.weight", (wide, wide)) for name in "qkvo"]
    inside += [(f"mlp.{name}_proj.weight", (inner, wide)) for name in ("gate", "up")]
    inside += [("mlp.down_proj.weight", (wide, inner))]
    inside += [(f"{name}.weight", (wide,)) for name in ("input_layernorm", "post_attention_layernorm")]
    found = [("model.embed_tokens.weight", (WORDS, wide))]
    found += [(f"model.layers.{block}.{name}", shape) for block in range(blocks) for name, shape in inside]
    return [*found, ("model.norm.weight", (wide,)), ("lm_head.weight", (WORDS, wide))]


def make(folder: Path, config: dict, size: float, dtype: str) -> int:
    """Write the checkpoint; bytes of its weights."""
    each = BYTES[dtype]
    outside = sum(torch.Size(shape).numel() for _, shape in tensors_of(config, 0)) * each
    inside = sum(torch.Size(shape).numel() for _, shape in tensors_of(config, 1)) * each - outside
    blocks = max(1, round((size - outside) / inside))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, shape in tensors_of(config, blocks):
        count = torch.Size(shape).numel() * each
        if shards[-1] and filled + count > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled, total = filled + count, total + count
    places = {}
    for number, content in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places.update({name: file for name, _ in content})
        write_shard(folder / file, content, dtype)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    about = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks, "vocab_size": WORDS,
        "num_key_value_heads": config["num_attention_heads"], "tie_word_embeddings": False,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype], **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    return total


def write_shard(path: Path, content: list[tuple[str, tuple[int, ...]]], dtype: str) -> None:
    kind, each = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], BYTES[dtype]
    entries, at = {}, 0
    for name, shape in content:
        size = torch.Size(shape).numel() * each
        entries[name] = {
            "dtype": dtype.upper().replace("FP", "F"),
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, shape in content:
            for rows in torch.ones(shape).split(4096) if len(shape) == 1 else torch.empty(shape).split(1024):
                values = rows if len(shape) == 1 else rows.normal_(0, 0.02)
                file.write(memoryview(values.to(kind).contiguous().view(torch.uint8).numpy()))


def measured(source: Path, asked: dict) -> dict:
    target = source.with_name("pruned")
    call = [sys.executable, "-c", CHILD, json.dumps({**asked, "source": str(source), "target": str(target)})]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    shutil.rmtree(target, ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["global", "magnitude", "wanda", "ria", "sparsegpt", "admm", "alps"])
    parser.add_argument("--gb", type=float, nargs="+", default=[4, 8], help="sizes of the checkpoint")
    parser.add_argument("--dtype", choices=list(BYTES), default="bf16")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    asked = parser.parse_args()
    config = WIDE if asked.method in ("global", "magnitude") else NARROW
    print(f"{asked.method}, {asked.dtype}, {config}, {asked.threads} threads", flush=True)
    if config is NARROW:
        print(f"{asked.samples} calibration sequences of {asked.tokens} tokens", flush=True)
    for size in asked.gb:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            source = Path(folder) / "source"
            source.mkdir()
            start = time.perf_counter()
            total = make(source, config, size * 1e9, asked.dtype)
            made = time.perf_counter() - start
            settings = {name: getattr(asked, name) for name in ("method", "samples", "tokens", "threads")}
            found = measured(source, {**settings, "words": WORDS})
        print(
            f"{total / 1e9:6.2f} GB  peak {found['peak'] / 1e9:5.2f} GB (told {found['told'] / 1e9:.2f})  "
            f"{found['busy']:7.1f} CPU-s  {found['busy'] * 1e9 / total:5.1f} CPU-s/GB  {found['seconds']:7.1f} s  "
            f"{found['weights']:,} weights at sparsity {found['sparsity']:.6f}  (made in {made:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
