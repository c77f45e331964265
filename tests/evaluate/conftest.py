"""Tiny language models with something to predict, and a tokenizer made on the spot."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def tiny_gpt2(seed: int = 0, vocabulary: int = 257, positions: int = 32):
    """A random GPT-2 whose predictions are far from uniform, so that a wrong token shows in the loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 1,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model


@pytest.fixture(scope="session")
def gpt2():
    return tiny_gpt2()


@pytest.fixture(scope="session")
def other_gpt2():
    return tiny_gpt2(seed=1)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A transformers tokenizer: one token per byte, and `<|endoftext|>` (256) as BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end, model_max_length=32)


class Bigram(nn.Module):
    """A plain module: the next token depends on this one alone, so every loss is a table look-up."""

    def __init__(self, vocabulary: int = 7, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator) * 2)

    def forward(self, ids):
        return self.table[ids]


@pytest.fixture
def bigram():
    return Bigram()


@pytest.fixture(scope="session")
def stories(shared):
    """The real 260,032-parameter story model, its tokenizer and a few real stories."""
    folder, text = shared / "models" / "stories260K", shared / "data" / "lm" / "tinystories_test.txt"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = text.read_text(encoding="utf-8")[:40_000].split("<|endoftext|>")
    return model, AutoTokenizer.from_pretrained(folder), [part.strip() for part in parts[:12]]


@pytest.fixture(scope="session")
def bigram_factory():
    """For Hypothesis, which wants fixtures that outlive one example."""
    return Bigram
