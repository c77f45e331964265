"""Tiny random configurations of the architectures of transformers; imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from zoo import Case, _ids, _image

V = 53


def _lm(model: str, config: str, **sizes: Any) -> Callable[[], Case]:
    """A decoder language model over token ids."""

    def case() -> Case:
        cfg = getattr(hf, config)(
            vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager", **sizes
        )
        cfg.use_cache = False
        return getattr(hf, model)(cfg), (_ids(vocab=V),), {"use_cache": False, "attention_mask": None}, "logits"

    return case


def _encoder(model: str, config: str, **sizes: Any) -> Callable[[], Case]:
    def case() -> Case:
        cfg = getattr(hf, config)(vocab_size=V, pad_token_id=0, attn_implementation="eager", **sizes)
        return getattr(hf, model)(cfg), (_ids(vocab=V),), {}, "logits"

    return case


def _vision(model: str, config: str, size: int = 16, **sizes: Any) -> Callable[[], Case]:
    def case() -> Case:
        cfg = getattr(hf, config)(**sizes)
        cfg._attn_implementation = "eager"
        return getattr(hf, model)(cfg), (_image(size),), {}, "logits"

    return case


def _seq2seq(model: str, config: str, **sizes: Any) -> Callable[[], Case]:
    def case() -> Case:
        cfg = getattr(hf, config)(vocab_size=V, pad_token_id=0, attn_implementation="eager", **sizes)
        cfg.use_cache = False
        kwargs = {"decoder_input_ids": _ids(7, V), "use_cache": False}
        return getattr(hf, model)(cfg), (_ids(vocab=V),), kwargs, "logits"

    return case


def _whisper() -> Case:
    cfg = hf.WhisperConfig(
        vocab_size=V, num_mel_bins=10, d_model=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=84, decoder_ffn_dim=92,
        max_source_positions=13, max_target_positions=17, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, attn_implementation="eager",
    )  # fmt: skip
    kwargs = {"decoder_input_ids": _ids(7, V), "use_cache": False}
    return hf.WhisperForConditionalGeneration(cfg), (torch.randn(2, 10, 26),), kwargs, "logits"


def _wav2vec2() -> Case:
    cfg = hf.Wav2Vec2Config(
        vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=84,
        conv_dim=(20, 28), conv_stride=(3, 2), conv_kernel=(5, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, attn_implementation="eager",
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(cfg), (torch.randn(2, 113),), {}, "logits"


MOE = {"experts_implementation": "grouped_mm"}

HF: dict[str, Callable[[], Case]] = {
    "gpt2": _lm("GPT2LMHeadModel", "GPT2Config", n_embd=48, n_layer=2, n_head=6, n_positions=32),
    "bert": _encoder(
        "BertForSequenceClassification", "BertConfig", hidden_size=48, num_hidden_layers=2,
        num_attention_heads=6, intermediate_size=84, max_position_embeddings=32, num_labels=5,
    ),
    "bert-mlm-tied": _encoder(
        "BertForMaskedLM", "BertConfig", hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=84, max_position_embeddings=32,
    ),
    "llama-gqa": _lm(
        "LlamaForCausalLM", "LlamaConfig", hidden_size=72, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=4, head_dim=16,
    ),
    "llama-gqa-tied": _lm(
        "LlamaForCausalLM", "LlamaConfig", hidden_size=72, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True,
    ),
    "phi3": _lm(
        "Phi3ForCausalLM", "Phi3Config", hidden_size=128, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64,
        original_max_position_embeddings=64,
    ),
    "t5": _seq2seq(
        "T5ForConditionalGeneration", "T5Config", d_model=48, d_kv=10, d_ff=84, num_layers=2, num_heads=6,
        decoder_start_token_id=0,
    ),
    "vit": _vision(
        "ViTForImageClassification", "ViTConfig", hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=84, image_size=16, patch_size=4, num_labels=5,
    ),
    "opt": _lm(
        "OPTForCausalLM", "OPTConfig", hidden_size=48, num_hidden_layers=2, num_attention_heads=6, ffn_dim=84,
        max_position_embeddings=32, word_embed_proj_dim=48,
    ),
    "qwen3": _lm(
        "Qwen3ForCausalLM", "Qwen3Config", hidden_size=72, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=4, head_dim=16,
    ),
    "gemma3": _lm(
        "Gemma3ForCausalLM", "Gemma3TextConfig", hidden_size=72, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=4, head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "distilbert": _encoder(
        "DistilBertForSequenceClassification", "DistilBertConfig", dim=48, n_layers=2, n_heads=6, hidden_dim=84,
        max_position_embeddings=32, num_labels=5,
    ),
    "modernbert": _encoder(
        "ModernBertForSequenceClassification", "ModernBertConfig", hidden_size=48, num_hidden_layers=3,
        num_attention_heads=6, intermediate_size=84, num_labels=5, local_attention=6,
    ),
    "deberta-v2": _encoder(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", hidden_size=48, num_hidden_layers=2,
        num_attention_heads=6, intermediate_size=84, max_position_embeddings=32, num_labels=5,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=False, pooler_hidden_size=48,
    ),
    "convnext": _vision(
        "ConvNextForImageClassification", "ConvNextConfig", size=32, hidden_sizes=[12, 20, 28, 36],
        depths=[1, 1, 2, 1], num_labels=5,
    ),
    "swin": _vision(
        "SwinForImageClassification", "SwinConfig", size=32, image_size=32, patch_size=2, embed_dim=24,
        depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=5,
    ),
    "gpt-neox": _lm(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", hidden_size=96, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=84,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "bloom": _lm("BloomForCausalLM", "BloomConfig", hidden_size=48, n_layer=2, n_head=6),
    "falcon": _lm(
        "FalconForCausalLM", "FalconConfig", hidden_size=96, num_hidden_layers=2, num_attention_heads=12,
        num_kv_heads=4, new_decoder_architecture=True,
    ),
    "falcon-mqa": _lm(
        "FalconForCausalLM", "FalconConfig", hidden_size=96, num_hidden_layers=2, num_attention_heads=12,
        multi_query=True, new_decoder_architecture=False,
    ),
    "bart": _seq2seq(
        "BartForConditionalGeneration", "BartConfig", d_model=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=84, decoder_ffn_dim=92,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    ),
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "mixtral": _lm(
        "MixtralForCausalLM", "MixtralConfig", hidden_size=72, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=4, head_dim=16, num_local_experts=3,
        num_experts_per_tok=2, **MOE,
    ),
    "qwen2-moe": _lm(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", hidden_size=128, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=40, shared_expert_intermediate_size=44, **MOE,
    ),
    "deepseek-v3": _lm(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", hidden_size=72, intermediate_size=88, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=6, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=40, first_k_dense_replace=1, kv_lora_rank=20,
        q_lora_rank=28, qk_rope_head_dim=8, qk_nope_head_dim=14, v_head_dim=18, head_dim=8, **MOE,
    ),
    "mamba": _lm(
        "MambaForCausalLM", "MambaConfig", hidden_size=48, num_hidden_layers=2, state_size=6, expand=2,
        time_step_rank=4,
    ),
}  # fmt: skip
