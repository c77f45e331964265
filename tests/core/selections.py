"""Small models to select from, and what a selection says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import nn

from secateur.core.where import Only, Selection, select
from secateur.errors import UsageError

from .families import SIZES

BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=99, bos_token_id=0, eos_token_id=1
        )
    ),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama tied": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "bert": lambda t: t.BertForSequenceClassification(t.BertConfig(**SIZES)),
    "t5": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    ),
    "switch": lambda t: t.SwitchTransformersEncoderModel(
        t.SwitchTransformersConfig(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_heads=4,
            vocab_size=99,
            num_experts=3,
        )
    ),
}


@cache
def build(name: str) -> nn.Module:
    """Built once; no test changes it."""
    return BUILDERS[name](pytest.importorskip("transformers"))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def paths(selection: Selection) -> list[str]:
    return [layer.path for layer in selection.chosen]


def reasons(selection: Selection) -> dict[str, str]:
    return {layer.name: why for layer, why in selection.left_out}


def refusal(model: nn.Module, only: Only = None, skip: Only = None) -> str:
    with pytest.raises(UsageError) as caught:
        select(model, only, skip)
    assert caught.value.exit_code == 2
    return str(caught.value)
