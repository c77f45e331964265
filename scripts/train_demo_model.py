"""Train the language model that the demo prunes: a GPT-2 of 3.5 million parameters.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \\
        python scripts/train_demo_model.py --text ../shared/data/lm --work runs/lm --steps 5500

It reads freely licensed text only (TinyStories, Wikipedia, public-domain books), trains a byte-level
BPE of 4,096 tokens on it, then the network. Every checkpoint holds the complete state (weights,
optimizer, position), so a killed run goes on where its last checkpoint stands: the batch of step `k` is
drawn from a generator seeded with `(seed, k)` and the schedule depends on `k` alone. The finished model
is written to `WORK/model` in half precision beside `training.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT, BATCH, END = 512, 8, "<|endoftext|>"
SHARES = {"stories": 0.5, "wikipedia": 0.25, "books": 0.25}


def read_sources(folder: Path) -> dict[str, list[str]]:
    """Documents of each source, in file order."""
    import pyarrow.parquet as parquet

    stories = (folder / "tinystories_train.txt").read_text(encoding="utf-8").split(END)
    wiki = (folder / "wikipedia_sample.txt").read_text(encoding="utf-8")
    articles = re.findall(r"<doc [^>]*>\n(.*?)</doc>", wiki, flags=re.S)
    books = parquet.read_table(folder / "classic_books.parquet", columns=["text"])["text"].to_pylist()
    documents = {"stories": stories, "wikipedia": articles, "books": books}
    return {name: [text.strip() for text in texts if text.strip()] for name, texts in documents.items()}


def train_tokenizer(sources: dict[str, list[str]], path: Path) -> Tokenizer:
    """A byte-level BPE of 4,096 tokens; each source contributes about two million characters."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = []
    for texts in sources.values():
        share = max(1, 2_000_000 // len(texts))
        sample += [text[:share] for text in texts]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(path))
    return tokenizer


def encode_sources(sources: dict[str, list[str]], tokenizer: Tokenizer, work: Path) -> dict[str, np.ndarray]:
    """One uint16 stream a source, documents joined by the end-of-text token; kept on disk between runs."""
    streams = {}
    end = tokenizer.token_to_id(END)
    for name, texts in sources.items():
        path = work / f"{name}.npy"
        if not path.exists():
            pieces = [np.array([end, *e.ids], np.uint16) for e in tokenizer.encode_batch(texts)]
            np.save(path, np.concatenate(pieces))
        streams[name] = np.load(path)
    return streams


def batch_of(step: int, seed: int, streams: dict[str, np.ndarray]) -> torch.Tensor:
    """Windows `(BATCH, CONTEXT)` for this step; each row picks a source by its share."""
    draw = np.random.default_rng((seed, step))
    names = draw.choice(list(SHARES), size=BATCH, p=list(SHARES.values()))
    rows = []
    for name in names:
        start = draw.integers(0, len(streams[name]) - CONTEXT)
        rows.append(streams[name][start : start + CONTEXT].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, then a cosine down to 3 % of the peak."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean cross-entropy (nats a token) on fixed windows of the TinyStories test set."""
    model.eval()
    losses = [model(part, labels=part).loss.item() for part in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def build(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=4096,
        n_positions=CONTEXT,
        n_embd=192,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, Adam moments and the step in one safetensors file, written beside and renamed."""
    tensors = {f"model.{k}": v.detach().clone() for k, v in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"adam.{names[id(p)]}.{key}"] = value.detach().clone()
    save_file(tensors, path.with_suffix(".part"), metadata={"step": str(step)})
    path.with_suffix(".part").rename(path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    from safetensors import safe_open

    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, p in model.named_parameters():
        p.data.copy_(tensors[f"model.{name}"])
        prefix = f"adam.{name}."
        optimizer.state[p] = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def export(model: GPT2LMHeadModel, tokenizer_file: Path, folder: Path) -> None:
    model.half().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with the text files")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, token streams and the result")
    parser.add_argument("--steps", type=int, default=5500, help="optimizer steps of 4,096 tokens")
    parser.add_argument("--peak", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument(
        "--compile", action="store_true", help="a sixth to a third faster, needs a C++ compiler"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    sources = read_sources(args.text)
    tokenizer = train_tokenizer(sources, args.work / "tokenizer.json")
    streams = encode_sources(sources, tokenizer, args.work)
    print({name: len(stream) for name, stream in streams.items()}, flush=True)
    stories = (args.text / "tinystories_test.txt").read_text(encoding="utf-8")[:400_000].replace(END, "")
    ids = tokenizer.encode(stories).ids
    windows = torch.tensor(ids[: 32 * CONTEXT]).view(32, CONTEXT)

    model = build(args.seed)
    optimizer = optimizer_for(model)
    first = load_state(args.work / "state.safetensors", model, optimizer)
    model.train()
    forward = torch.compile(model) if args.compile else model
    began = time.time()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak)
        batch = batch_of(step, args.seed, streams)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            held = held_out_loss(model, windows)
            save_state(args.work / "state.safetensors", model, optimizer, step + 1)
            row = [
                step + 1,
                (step + 1) * BATCH * CONTEXT,
                f"{loss.item():.4f}",
                f"{held:.4f}",
                int(time.time() - began),
            ]
            new = not (args.work / "training.csv").exists()
            with (args.work / "training.csv").open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "tokens", "train_loss", "stories_loss", "seconds"])
                writer.writerow(row)
            print(*row, flush=True)
    export(model, args.work / "tokenizer.json", args.work / "model")


if __name__ == "__main__":
    main()
