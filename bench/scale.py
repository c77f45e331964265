"""How long, and how much memory: GPT-2 small analysed and made smaller; Llama 7B and 70B analysed without weights.

    OMP_NUM_THREADS=1 python bench/scale.py gpt2 llama-7b llama-70b
    OMP_NUM_THREADS=1 python bench/scale.py llama-7b --work /tmp/scale            # also sliced shard by shard
    OMP_NUM_THREADS=1 python bench/scale.py llama-70b --work /tmp/scale --holes --files 10

With --work a bfloat16 checkpoint of that shape is written there in shards, and half of its heads and neurons, those of
the smallest l2 score, are taken out of the files; the folder is removed afterwards. --holes makes shards that take no
place on the disk (all zeros; the first half of the units stays then, without scores); --files N stops after N files
of the small model, where neither disk nor patience hold them all.

Every shape has a process of its own, which loads torch and transformers first; seconds are of processor time without
that. Memory is the largest resident set of the process, torch and transformers (about 500 MB) included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

LLAMA = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                  "num_key_value_heads": 8},
}  # fmt: skip


def gpt2(tell: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from secateur import shrink, shrunk
    from secateur.core.example import analysis_of

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    example = {"input_ids": torch.randint(0, 50257, (2, 16))}
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    tell(f"loaded, {size:.0f} MB of weights")
    analysis, given = analysis_of(model, example)
    tell(f"analysed, {len(analysis.units)} axes")
    keep = {u.name: range(0, u.size, 2) for u in analysis.units if u.kind in ("head", "feed-forward unit")}
    small = shrink(model, keep, given, analysis=analysis)
    before, after = shrunk(small).parameters
    tell(
        f"shrunk from {before:,} to {after:,} parameters, {shrunk(small).difference:.0e} from the masked model"
    )


def llama(name: str, tell: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from secateur.core.units import analyse

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, attn_implementation="eager", **LLAMA[name])
        ).eval()
        ids = torch.zeros(2, 13, dtype=torch.long)
    tell(f"built, {sum(p.numel() for p in model.parameters()) / 1e9:.1f} billion parameters")
    kwargs = {"use_cache": False, "attention_mask": torch.zeros(2, 1, 13, 13, device="meta")}
    analysis = analyse(model, (ids,), kwargs, output="logits")
    tell(f"analysed, {len(analysis.units)} axes, {analysis.parameter_count():,} parameters in use")


SHARD = 5 * 10**9  # bytes of a source file


def write_source(name: str, folder: Path, holes: bool) -> None:
    """A checkpoint in bfloat16, a tensor at a time; with `holes` only its headers take place on the disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="bfloat16", **LLAMA[name])
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    parts: list[list[str]] = [[]]
    for key, shape in shapes.items():
        if sum(2 * prod(shapes[k]) for k in parts[-1]) + 2 * prod(shape) > SHARD:
            parts.append([])
        parts[-1].append(key)
    where = {}
    draw = torch.Generator().manual_seed(0)
    for number, keys in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        where |= dict.fromkeys(keys, file)
        ends = [0]
        for key in keys:
            ends.append(ends[-1] + 2 * prod(shapes[key]))
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for key, begin, end in zip(keys, ends, ends[1:], strict=False):
            head[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [begin, end]}
        text = json.dumps(head).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            if holes:
                out.truncate(8 + len(text) + ends[-1])
                continue
            for key in keys:
                for piece in _pieces(shapes[key], draw):
                    out.write(piece.view(torch.uint8).numpy().data)
    index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pieces(shape: tuple[int, ...], draw: torch.Generator) -> Iterator[torch.Tensor]:
    """Small random numbers, 16 million at a time."""
    left = prod(shape)
    while left:
        count = min(left, 1 << 24)
        yield (torch.randn(count, generator=draw) * 0.02).to(torch.bfloat16)
        left -= count


class _EnoughError(Exception):
    """So many files are enough to know what one takes."""


def sliced(work: Path, holes: bool, files: int, tell: Any) -> None:
    """Take half of the heads and neurons out of the files; with `files` that many are written, and none is kept."""
    from secateur import choose_units, shrink_checkpoint
    from secateur.core.example import analysis_of
    from secateur.deploy.unseen import plan_cuts
    from secateur.pattern import Heads, Neurons
    from secateur.recipes import l2
    from secateur.stream.opened import open_units
    from secateur.stream.shrinking import write_small

    source, target = work / "big", work / "small"

    def heard(label: str, done: int, total: int) -> None:
        if label != "writing":
            return
        for path in target.glob("model-*.safetensors") if files else ():
            path.write_bytes(b"")  # its digest is known
        if done == total or not done % 5:
            tell(f"{done} of {total} files written")
        if files and done >= files:
            raise _EnoughError

    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if not holes:
        keep = choose_units(source, 0.5, replace(l2, pattern=Heads() | Neurons()))
        tell(f"{sum(map(len, keep.values())):,} units chosen on {len(keep)} axes")
        form = shrink_checkpoint(source, keep, target, tell=heard)
        after = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        tell(f"written as {form}, {before / 1e9:.1f} GB became {after / 1e9:.1f} GB")
        return
    opened = open_units(source, lambda *_: None)
    tell(f"digests of {before / 1e9:.1f} GB")
    analysis, given = analysis_of(opened.model, opened.example)
    kinds = ("head", "KV group", "feed-forward unit")
    halves = {u.name: range(u.size // 2) for u in analysis.units if u.kind in kinds}
    note = plan_cuts(opened.model, halves, given, analysis=analysis)
    tell(f"cuts of {len(halves)} axes planned")
    target.mkdir()
    with suppress(_EnoughError):
        tell(f"written as {write_small(opened, note, target, to='auto', tell=heard)}")


def child(name: str, work: Path | None, holes: bool, files: int) -> None:
    import transformers  # noqa: F401

    from secateur import shrink  # noqa: F401

    warnings.simplefilter("ignore")
    started, spent = time.perf_counter(), time.process_time()

    def tell(words: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        now = time.process_time() - spent
        print(
            f"{name}: {words}: {now:.1f} CPU-s, {time.perf_counter() - started:.1f} s, {peak:,.0f} MB",
            flush=True,
        )

    tell("libraries loaded")
    with torch.no_grad():
        if work is not None:
            sliced(work, holes, files, tell)
        elif name == "gpt2":
            gpt2(tell)
        else:
            llama(name, tell)


def apart(function: Any, *args: Any) -> None:
    """In a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["gpt2", *LLAMA], choices=["gpt2", *LLAMA])
    parser.add_argument("--work", type=Path, help="folder, for checkpoints that are sliced from file to file")
    parser.add_argument("--holes", action="store_true", help="shards without contents")
    parser.add_argument("--files", type=int, default=0, help="with --holes: so many files, none of them kept")
    asked = parser.parse_args()
    for name in asked.names:
        apart(child, name, None, False, 0)
        if asked.work is None or name == "gpt2":
            continue
        try:
            (asked.work / "big").mkdir(parents=True)
            apart(write_source, name, asked.work / "big", asked.holes)
            apart(child, name, asked.work, asked.holes, asked.files)
        finally:
            shutil.rmtree(asked.work)


if __name__ == "__main__":
    main()
