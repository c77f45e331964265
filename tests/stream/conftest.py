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
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **small
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
    if kind == "qwen":
        config = t.Qwen3Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, tie_word_embeddings=True, **small,
        )  # fmt: skip
        return t.Qwen3ForCausalLM(config)
    if kind == "bert":
        config = t.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=WORDS
        )
        return t.BertForMaskedLM(config)
    if kind == "albert":
        config = t.AlbertConfig(
            hidden_size=32, embedding_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=WORDS,
        )  # fmt: skip
        return t.AlbertForMaskedLM(config)
    if kind == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=WORDS)
        )
    config = t.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=3, **small,
    )  # fmt: skip
    return t.MixtralForCausalLM(config)


def written(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    from secateur.pretrained import quiet

    torch.manual_seed(7)
    with quiet():
        build(kind).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    return folder


def padded_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of different lengths, each with padding."""
    draw = torch.Generator().manual_seed(3)
    batches = []
    for number in range(count):
        ids = torch.randint(3, WORDS, (2, 12 + number), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoints(kind, dtype)`: the folder of a sharded checkpoint, made once."""
    made: dict[tuple, Path] = {}

    def give(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = written(tmp_path_factory.mktemp(kind), kind, dtype)
        return made[kind, dtype]

    return give
