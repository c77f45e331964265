"""Small models of every family, and the role of each of their matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOKENS: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SPEECH: dict[str, Any] = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 0,
}
MOE: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}

Words = dict[str, str]


def in_block(prefix: str, **names: str) -> Words:
    """`attention="a b"` says that `prefix.a` and `prefix.b` are attention."""
    return {f"{prefix}.{name}": role for role, listed in names.items() for name in listed.split()}


def outside(**names: str) -> Words:
    return {name: role for role, listed in names.items() for name in listed.split()}


BERT = in_block(
    "encoder.layer.*",
    attention="attention.self.query attention.self.key attention.self.value attention.output.dense",
    ffn="intermediate.dense output.dense",
)
BERT_EMBEDDINGS = outside(
    embedding="embeddings.word_embeddings embeddings.position_embeddings embeddings.token_type_embeddings"
)
LLAMA = in_block(
    "model.layers.*",
    attention="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
    ffn="mlp.gate_proj mlp.up_proj mlp.down_proj",
)
SEPARATE = "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj"
CROSS = SEPARATE.replace("self_attn", "encoder_attn")


def under(prefix: str, words: Words) -> Words:
    return {f"{prefix}.{name}": role for name, role in words.items()}


def transformers() -> Any:
    return pytest.importorskip("transformers")


FAMILIES: dict[str, tuple[Callable[[Any], nn.Module], Words]] = {
    "bert classifier": (
        lambda t: t.BertForSequenceClassification(t.BertConfig(**SIZES)),
        under("bert", BERT | BERT_EMBEDDINGS) | outside(other="bert.pooler.dense", head="classifier"),
    ),
    "bert masked lm": (
        lambda t: t.BertForMaskedLM(t.BertConfig(**SIZES)),
        under("bert", BERT | BERT_EMBEDDINGS) | outside(head="cls.predictions.transform.dense"),
    ),
    "bert body": (
        lambda t: t.BertModel(t.BertConfig(**SIZES)),
        BERT | BERT_EMBEDDINGS | outside(other="pooler.dense"),
    ),
    "roberta questions": (
        lambda t: t.RobertaForQuestionAnswering(t.RobertaConfig(**SIZES)),
        under("roberta", BERT | BERT_EMBEDDINGS) | outside(head="qa_outputs"),
    ),
    "distilbert": (
        lambda t: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99)
        ),
        in_block(
            "distilbert.transformer.layer.*",
            attention="attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
            ffn="ffn.lin1 ffn.lin2",
        )
        | under("distilbert.embeddings", outside(embedding="word_embeddings position_embeddings"))
        | outside(head="pre_classifier classifier"),
    ),
    "albert": (
        lambda t: t.AlbertForMaskedLM(t.AlbertConfig(**SIZES, embedding_size=16)),
        in_block(
            "albert.encoder.albert_layer_groups.*.albert_layers.*",
            attention="attention.query attention.key attention.value attention.dense",
            ffn="ffn ffn_output",
        )
        | under("albert", BERT_EMBEDDINGS)
        | outside(other="albert.encoder.embedding_hidden_mapping_in", head="predictions.dense"),
    ),
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **TOKENS)),
        in_block("transformer.h.*", attention="attn.c_attn attn.c_proj", ffn="mlp.c_fc mlp.c_proj")
        | outside(embedding="transformer.wte transformer.wpe"),
    ),
    "llama": (
        lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2)),
        LLAMA | outside(embedding="model.embed_tokens", head="lm_head"),
    ),
    "llama tied": (
        lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
        LLAMA | outside(embedding="model.embed_tokens"),
    ),
    "t5": (
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
        ),
        in_block(
            "encoder.block.*.layer.*",
            attention="SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o",
            embedding="SelfAttention.relative_attention_bias",
            ffn="DenseReluDense.wi DenseReluDense.wo",
        )
        | in_block(
            "decoder.block.*.layer.*",
            attention="SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o EncDecAttention.q "
            "EncDecAttention.k EncDecAttention.v EncDecAttention.o",
            embedding="SelfAttention.relative_attention_bias",
            ffn="DenseReluDense.wi DenseReluDense.wo",
        )
        | outside(embedding="shared"),
    ),
    # heads of 8 in 16 of 32 columns: attention narrows, the gated feed-forward widens
    "t5 gated narrow": (
        lambda t: t.T5EncoderModel(
            t.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=2,
                vocab_size=99,
                feed_forward_proj="gated-gelu",
            )
        ),
        in_block(
            "encoder.block.*.layer.*",
            attention="SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o",
            embedding="SelfAttention.relative_attention_bias",
            ffn="DenseReluDense.wi_0 DenseReluDense.wi_1 DenseReluDense.wo",
        )
        | outside(embedding="shared"),
    ),
    "vit": (
        lambda t: t.ViTForImageClassification(
            t.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=16,
                patch_size=8,
            )
        ),
        in_block(
            "vit.layers.*",
            attention="attention.q_proj attention.k_proj attention.v_proj attention.o_proj",
            ffn="mlp.fc1 mlp.fc2",
        )
        | outside(other="vit.embeddings.patch_embeddings.projection", head="classifier"),
    ),
    "opt": (
        lambda t: t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                word_embed_proj_dim=16,
                max_position_embeddings=16,
                **TOKENS,
            )
        ),
        in_block("model.decoder.layers.*", attention=SEPARATE, ffn="fc1 fc2")
        | under(
            "model.decoder", outside(embedding="embed_tokens embed_positions", other="project_out project_in")
        ),
    ),
    "mixtral": (
        lambda t: t.MixtralForCausalLM(t.MixtralConfig(**MOE, num_local_experts=4)),
        in_block(
            "model.layers.*",
            attention="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
            ffn="mlp.experts.gate_up_proj mlp.experts.down_proj",
        )
        | outside(embedding="model.embed_tokens", head="lm_head"),
    ),
    "qwen2 moe": (
        lambda t: t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=48)
        ),
        in_block(
            "model.layers.*",
            attention="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
            ffn="mlp.experts.gate_up_proj mlp.experts.down_proj mlp.shared_expert.gate_proj "
            "mlp.shared_expert.up_proj mlp.shared_expert.down_proj",
            router="mlp.shared_expert_gate",
        )
        | outside(embedding="model.embed_tokens", head="lm_head"),
    ),
    "switch": (
        lambda t: t.SwitchTransformersEncoderModel(
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
        in_block(
            "encoder.block.*.layer.*",
            attention="SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o",
            embedding="SelfAttention.relative_attention_bias",
            ffn="mlp.wi mlp.wo mlp.experts.expert_0.wi mlp.experts.expert_0.wo mlp.experts.expert_1.wi "
            "mlp.experts.expert_1.wo mlp.experts.expert_2.wi mlp.experts.expert_2.wo",
            router="mlp.router.classifier",
        )
        | outside(embedding="shared"),
    ),
    "deepseek v3": (
        lambda t: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **(MOE | {"num_key_value_heads": 4}),
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=16,
                kv_lora_rank=8,
                q_lora_rank=12,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=8,
                first_k_dense_replace=1,
            )
        ),
        in_block(
            "model.layers.*",
            attention="self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj "
            "self_attn.o_proj",
            ffn="mlp.gate_proj mlp.up_proj mlp.down_proj mlp.experts.gate_up_proj mlp.experts.down_proj "
            "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj",
        )
        | outside(embedding="model.embed_tokens", head="lm_head"),
    ),
    "whisper": (
        lambda t: t.WhisperForConditionalGeneration(
            t.WhisperConfig(**SPEECH, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
        ),
        in_block("model.encoder.layers.*", attention=SEPARATE, ffn="fc1 fc2")
        | in_block("model.decoder.layers.*", attention=f"{SEPARATE} {CROSS}", ffn="fc1 fc2")
        | under("model.encoder", outside(other="conv1 conv2", embedding="embed_positions"))
        | under("model.decoder", outside(embedding="embed_tokens embed_positions")),
    ),
    "gpt neox": (
        lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
        in_block(
            "gpt_neox.layers.*",
            attention="attention.query_key_value attention.dense",
            ffn="mlp.dense_h_to_4h mlp.dense_4h_to_h",
        )
        | outside(embedding="gpt_neox.embed_in", head="lm_head"),
    ),
    "phi3": (
        lambda t: t.Phi3ForCausalLM(t.Phi3Config(**SIZES, num_key_value_heads=2)),
        in_block(
            "model.layers.*",
            attention="self_attn.qkv_proj self_attn.o_proj",
            ffn="mlp.gate_up_proj mlp.down_proj",
        )
        | outside(embedding="model.embed_tokens", head="lm_head"),
    ),
    "falcon": (
        lambda t: t.FalconForCausalLM(
            t.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **TOKENS)
        ),
        in_block(
            "transformer.h.*",
            attention="self_attention.query_key_value self_attention.dense",
            ffn="mlp.dense_h_to_4h mlp.dense_4h_to_h",
        )
        | outside(embedding="transformer.word_embeddings"),
    ),
    "bloom": (
        lambda t: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TOKENS)),
        in_block(
            "transformer.h.*",
            attention="self_attention.query_key_value self_attention.dense",
            ffn="mlp.dense_h_to_4h mlp.dense_4h_to_h",
        )
        | outside(embedding="transformer.word_embeddings"),
    ),
    "mamba": (
        lambda t: t.MambaForCausalLM(
            t.MambaConfig(
                hidden_size=32, num_hidden_layers=2, state_size=4, tie_word_embeddings=False, **TOKENS
            )
        ),
        in_block(
            "backbone.layers.*", other="mixer.conv1d mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj"
        )
        | outside(embedding="backbone.embeddings", head="lm_head"),
    ),
    "swin": (
        lambda t: t.SwinForImageClassification(
            t.SwinConfig(
                image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
            )
        ),
        in_block(
            "swin.encoder.layers.*",
            attention="blocks.*.attention.q_proj blocks.*.attention.k_proj blocks.*.attention.v_proj "
            "blocks.*.attention.o_proj",
            ffn="blocks.*.mlp.fc1 blocks.*.mlp.fc2",
            other="downsample.reduction",
        )
        | outside(other="swin.embeddings.patch_embeddings.projection", head="classifier"),
    ),
    "resnet": (
        lambda t: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
        ),
        in_block("resnet.encoder.stages.*.layers.*", other="layer.*.convolution shortcut.convolution")
        | outside(other="resnet.embedder.embedder.convolution", head="classifier.1"),
    ),
    "convnext": (
        lambda t: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])
        ),
        in_block(
            "convnext.encoder.stages.*",
            other="layers.*.dwconv layers.*.pwconv1 layers.*.pwconv2 downsampling_layer.1",
        )
        | outside(other="convnext.embeddings.patch_embeddings", head="classifier"),
    ),
    "two berts": (
        lambda t: t.EncoderDecoderModel(
            t.EncoderDecoderConfig.from_encoder_decoder_configs(
                t.BertConfig(**SIZES), t.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
            )
        ),
        under("encoder", BERT | BERT_EMBEDDINGS)
        | under("decoder.bert", BERT | BERT_EMBEDDINGS)
        | in_block(
            "decoder.bert.encoder.layer.*.crossattention",
            attention="self.query self.key self.value output.dense",
        )
        | outside(other="encoder.pooler.dense", head="decoder.cls.predictions.transform.dense"),
    ),
}
ENCODER_DECODER = {"t5", "whisper", "two berts"}
# one module is used for all layers
BLOCKS = {"albert": 1, "convnext": 4}


@cache
def family(name: str) -> nn.Module:
    """Built once; no test changes it."""
    return FAMILIES[name][0](transformers())
