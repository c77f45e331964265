"""Tiny transformers of several families, all with eager attention and enough blocks to lose some."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

V, WIDE = 53, {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(kind: str, depth: int = 4, **changed: Any) -> nn.Module:
    """A random model in eval mode whose blocks all do something."""
    import transformers as hf

    from secateur.pretrained import quiet

    deep = {"num_hidden_layers": depth}
    known: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**IDS, "n_embd": 24, "n_layer": depth, "n_head": 4}),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**IDS, **WIDE, **deep, "num_key_value_heads": 2}),
        "gemma3": (
            "Gemma3ForCausalLM", "Gemma3TextConfig",
            {**IDS, **WIDE, **deep, "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 4,
             "layer_types": ["sliding_attention", "full_attention"] * (depth // 2)},
        ),
        "deepseek": (
            "DeepseekV3ForCausalLM", "DeepseekV3Config",
            {**IDS, **WIDE, **deep, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
             "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 2, "kv_lora_rank": 8,
             "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "head_dim": 4},
        ),
        "opt": (
            "OPTForCausalLM", "OPTConfig",
            {**IDS, "hidden_size": 24, **deep, "num_attention_heads": 4, "ffn_dim": 40, "max_position_embeddings": 32,
             "word_embed_proj_dim": 24},
        ),
        "bert": ("BertForSequenceClassification", "BertConfig", {**WIDE, **deep, "vocab_size": V, "num_labels": 5}),
        "vit": (
            "ViTForImageClassification", "ViTConfig",
            {**WIDE, **deep, "image_size": 16, "patch_size": 4, "num_labels": 5},
        ),
        "convnext": (
            "ConvNextForImageClassification", "ConvNextConfig",
            {"hidden_sizes": [8, 12], "depths": [2, depth], "num_stages": 2, "num_labels": 5},
        ),
        "t5": (
            "T5ForConditionalGeneration", "T5Config",
            {**IDS, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": depth, "num_heads": 4,
             "decoder_start_token_id": 0},
        ),
        "bart": (
            "BartForConditionalGeneration", "BartConfig",
            {**IDS, "d_model": 24, "encoder_layers": depth, "decoder_layers": depth, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 32},
        ),
        "mixtral": (
            "MixtralForCausalLM", "MixtralConfig",
            {**IDS, **WIDE, **deep, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
        ),
    }  # fmt: skip
    name, config, sizes = known[kind]
    torch.manual_seed(0)
    with quiet():
        model = getattr(hf, name)(getattr(hf, config)(**{**sizes, **changed}, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def example(model: nn.Module, rows: int = 2) -> dict[str, torch.Tensor]:
    """Inputs for any of them."""
    config: Any = model.config
    if hasattr(config, "num_channels"):
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    ids = torch.randint(3, V, (rows, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, V, (rows, 7))
    return given
