"""How long, and how much memory: GPT-2 small analysed and made smaller; Llama 7B and 70B analysed without weights.

    OMP_NUM_THREADS=1 python bench/scale.py gpt2 llama-7b llama-70b

Every shape has a process of its own, which loads torch and transformers first; seconds are of processor time without
that. Memory is the largest resident set of the process, torch and transformers (about 500 MB) included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
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


def child(name: str) -> None:
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
        gpt2(tell) if name == "gpt2" else llama(name, tell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["gpt2", *LLAMA], choices=["gpt2", *LLAMA])
    for name in parser.parse_args().names:
        process = multiprocessing.get_context("spawn").Process(target=child, args=(name,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
