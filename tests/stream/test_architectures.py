"""Many decoder architectures of transformers, walked from file to file and pruned in memory: the same bits."""

from __future__ import annotations

import pytest
import torch

from secateur import recipes
from secateur.errors import UsageError

from .conftest import padded_batches
from .support import refused, same_as_in_memory

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, **TOKENS,
}  # fmt: skip
GROUPED = {**USUAL, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}

KINDS = {
    "Qwen2": GROUPED,
    "Qwen3": WIDE,
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Gemma2": {**WIDE, "sliding_window": 8},
    "Gemma3": {**WIDE, "sliding_window": 8},
    "Phi": USUAL,
    "Phi3": USUAL,
    "GPTNeoX": USUAL,
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, **TOKENS},
    "GPTNeo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64, "intermediate_size": 48, **TOKENS,
    },
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, **TOKENS},
    "Olmo2": USUAL,
    "Cohere": USUAL,
    "Qwen3Moe": {**WIDE, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
NO_STACK = {
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64},
}


def written(folder, kind: str, settings: dict):
    import transformers

    from secateur.pretrained import quiet

    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    heads = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
    model = next(found for head in heads if (found := getattr(transformers, f"{kind}{head}", None)))
    torch.manual_seed(5)
    with quiet():
        model(getattr(transformers, name)(**settings)).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_as_in_memory(tmp_path, kind, name):
    source = written(tmp_path / "source", kind, KINDS[kind])
    same_as_in_memory(source, tmp_path / "out", 0.5, getattr(recipes, name), data=padded_batches())


@pytest.mark.slow
@pytest.mark.parametrize("kind", NO_STACK)
def test_blocks_that_do_not_simply_follow_each_other_are_refused(tmp_path, kind):
    source = written(tmp_path / "source", kind, NO_STACK[kind])
    words = "does not simply hand hidden states from block to block.* Prune it in memory, or choose a recipe without"
    named = {"data": padded_batches(), "only": "*ff*"}
    refused(source, tmp_path, UsageError, words, 0.5, recipes.wanda, **named)
