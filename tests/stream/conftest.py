"""Small sharded checkpoints of several architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = 64


def build(kind: str):
    import transformers as t

    small = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config = t.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, **small
        )
        return t.LlamaForCausalLM(config)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small))
    if kind == "opt":
        return t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                max_position_embeddings=64, **small,
            )
        )  # fmt: skip
    config = t.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, **small,
    )  # fmt: skip
    return t.MixtralForCausalLM(config)


def written(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    from secateur.pretrained import quiet

    torch.manual_seed(7)
    with quiet():
        build(kind).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoints(kind, dtype)`: the folder of a sharded checkpoint, made once."""
    made: dict[tuple, Path] = {}

    def give(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = written(tmp_path_factory.mktemp(kind), kind, dtype)
        return made[kind, dtype]

    return give
