"""Tiny models in folders, a user's own file of functions, and the command line called in this process."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import cli

END = "<|endoftext|>"
POSITIONS = 64

OWN = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))

def mlp_with_example():
    return mlp(), torch.randn(4, 16)

def half():
    return mlp().half()

def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))

def wide():
    return nn.Sequential(nn.Linear(384, 512), nn.ReLU(), nn.Linear(512, 8))

def crowd():
    return [torch.randn(700, 384) for _ in range(2)]

def shared():
    return Shared()

class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.memory = [self.layer.weight * 2]  # not a leaf, so the model cannot be copied

    def forward(self, x):
        return self.layer(x)

def moody():
    return Moody()

def rows():
    return [torch.randn(8, 16) for _ in range(3)]

def labelled_rows():
    return [(torch.randn(8, 16), torch.randint(0, 10, (8,))) for _ in range(3)]

def images():
    return [(torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))) for _ in range(3)]

def pictures():
    return [({"pixel_values": torch.randn(4, 3, 32, 32)}, torch.randint(0, 10, (4,))) for _ in range(2)]

def sentences():
    ids = torch.randint(1, 250, (4, 12))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 3, (4,))}]

def empty():
    return []

def broken():
    raise RuntimeError("no such luck </script>")
"""


def tokenizer() -> Any:
    """A byte-level BPE with some merges, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator([text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END)


def text() -> str:
    """Sixty sentences of a few words in ever other orders."""
    given = "the cat sat on a mat and the dog ran after it in the garden while rain fell softly"
    words = given.split(" ")
    return ". ".join(" ".join(words[(i * 7 + j * 3) % len(words)] for j in range(11)) for i in range(60))


def _build(kind: str) -> Any:
    import transformers as hf

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    llama = hf.LlamaConfig(**small, **text, num_key_value_heads=2, max_position_embeddings=POSITIONS)
    gpt2 = hf.GPT2Config(**text, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4)
    bert = hf.BertConfig(**small, vocab_size=300, max_position_embeddings=POSITIONS, num_labels=3)
    t5 = hf.T5Config(**text, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    vit = hf.ViTConfig(**small, image_size=32, patch_size=8, num_labels=10)
    moe = hf.MixtralConfig(
        **small, **text, num_key_value_heads=2, num_local_experts=2, max_position_embeddings=POSITIONS
    )
    tied = hf.LlamaConfig(**small, **text, max_position_embeddings=POSITIONS, tie_word_embeddings=True)
    return {
        "gpt2": lambda: hf.GPT2LMHeadModel(gpt2),
        "llama": lambda: hf.LlamaForCausalLM(llama),
        "bf16": lambda: hf.LlamaForCausalLM(llama).to(torch.bfloat16),
        "tied": lambda: hf.LlamaForCausalLM(tied),
        "mixtral": lambda: hf.MixtralForCausalLM(moe),
        "bert": lambda: hf.BertForSequenceClassification(bert),
        "t5": lambda: hf.T5ForConditionalGeneration(t5),
        "vit": lambda: hf.ViTForImageClassification(vit),
    }[kind]()


class Folders(dict[str, Path]):
    """Kind of model -> its folder in Hugging Face format, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> Path:
        from secateur.pretrained import quiet

        self[kind] = self.root / kind
        torch.manual_seed(0)
        with quiet():
            model = _build(kind)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(4)  # predictions far from uniform, so that pruning shows
            model.save_pretrained(self[kind])
            if kind != "vit":
                tokenizer().save_pretrained(self[kind])
        return self[kind]


@dataclass(frozen=True)
class Said:
    """How a call of the command line ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The standard output, which must be one line with one JSON value."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


class Secateur:
    """`secateur ARGUMENT...` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Said:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err
        return Said(code, printed.out, printed.err)

    def refused(self, code: int, *arguments: object) -> str:
        """Call, expect this exit code and one line on the standard error; returns the line."""
        said = self(*arguments)
        lines = [line for line in said.err.splitlines() if line.startswith("secateur: ")]
        assert said.code == code, said
        assert len(lines) == 1, said.err
        assert said.err.rstrip("\n").endswith(lines[0]), said.err
        return lines[0].removeprefix("secateur: ")


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of everything in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to the tensors of a safetensors file, in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
