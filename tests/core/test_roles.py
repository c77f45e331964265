"""The role of every matrix of every family, exactly; and what is told when there are no names to go by."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from secateur.core.matrix import layouts
from secateur.core.roles import survey
from secateur.core.stacks import below
from secateur.core.where import Layer, layers
from secateur.errors import UsageError

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


def starred(layer: Layer) -> str:
    """The path (or the parameter, where a module has several) with every list index inside a block as `*`."""
    name = layer.name.removesuffix(".weight")
    return re.sub(r"\.\d+(?=\.)", ".*", name) if layer.stack else name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.thorough
def test_every_matrix_of_a_family_has_its_role(name: str) -> None:
    found = layers(family(name))
    assert {starred(layer): layer.role for layer in found} == FAMILIES[name][1]
    assert len({starred(layer) for layer in found}) == len(FAMILIES[name][1])
    # `starred` folds the blocks: no two of them may disagree
    assert {(starred(layer), layer.role) for layer in found} == set(FAMILIES[name][1].items())


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_numbered_within_their_stack(name: str) -> None:
    found = layers(family(name))
    stacks = ["encoder", "decoder"] if name in ENCODER_DECODER else ["encoder"]
    for stack in stacks:
        numbers = list(dict.fromkeys(layer.block for layer in found if layer.stack == stack))
        assert numbers == list(range(BLOCKS.get(name, 2)))
    assert {layer.stack for layer in found} == {None, *stacks}
    assert all((layer.stack is None) == (layer.block is None) for layer in found)
    if name in ENCODER_DECODER:
        assert all(("decoder." in layer.path) == (layer.stack == "decoder") for layer in found if layer.stack)


@pytest.mark.parametrize("name", FAMILIES)
def test_vocabulary_heads_are_told_from_other_heads(name: str) -> None:
    places = survey(family(name)).places
    assert all(place.role == "head" for place in places if place.vocabulary)
    words = {place.path for place in places if place.vocabulary}
    heads = {place.path for place in places if place.role == "head"}
    last = ("lm_head", "proj_out", "predictions.decoder")
    assert words == {path for path in heads if path.endswith(last)}


def test_a_classifier_with_as_many_rows_as_token_types_is_no_vocabulary_head() -> None:
    model = family("bert classifier")
    assert model.bert.embeddings.token_type_embeddings.weight.shape[0] == model.classifier.weight.shape[0]
    assert not any(place.vocabulary for place in survey(model).places)


# What is told without names --------------------------------------------------------------------------------


def nameless(module: nn.Module, classes: dict[type, type[nn.Module]]) -> nn.Module:
    """The same tree of the same matrices, with neither names nor attributes nor classes that mean anything."""
    if layouts(module) and not isinstance(module, nn.MultiheadAttention):
        return module
    children = [child for child in module.children() if any(layouts(inner) for inner in child.modules())]
    renamed = [nameless(child, classes) for child in children]
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return nn.ModuleList(renamed)
    new = classes.setdefault(type(module), type(f"C{len(classes)}", (nn.Module,), {}))()
    for index, child in enumerate(renamed):
        new.add_module(f"m{index}", child)
    return new


# projections of low rank form no pattern of widths; there attributes decide, or names
TOLD_BY_WIDTHS = sorted(set(FAMILIES) - {"deepseek v3"})


@pytest.mark.parametrize("name", TOLD_BY_WIDTHS)
def test_roles_inside_blocks_need_no_names(name: str) -> None:
    model = family(name)
    expected = {id(layer.weight): layer.role for layer in layers(model) if layer.stack}
    found = {id(layer.weight): layer.role for layer in layers(nameless(model, {})) if layer.stack}
    assert found == expected


class Foo(nn.Module):
    """A block whose attributes say nothing: a list of (rows, columns) becomes a, b, c ..."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        for letter, (rows, columns) in zip("abcdefghij", shapes, strict=False):
            setattr(self, letter, nn.Linear(columns, rows, bias=False))


def roles_of(*shapes: tuple[int, int]) -> str:
    """Roles as letters, of a block with these matrices."""
    model = nn.Sequential(nn.Linear(5, 32), Foo(list(shapes)), Foo(list(shapes)), nn.Linear(32, 3))
    found = layers(model)
    assert [found[0].role, found[-1].role] == ["other", "head"]
    inside = "".join(layer.role[0] for layer in found[1:-1])
    assert inside[: len(shapes)] == inside[len(shapes) :]
    return inside[: len(shapes)]


@pytest.mark.parametrize(
    ("expected", "shapes"),
    [
        ("aaff", [(96, 32), (32, 32), (128, 32), (32, 128)]),
        ("aaff", [(32, 32), (96, 32), (32, 128), (128, 32)]),
        ("ffaa", [(128, 32), (32, 128), (96, 32), (32, 32)]),
        ("aaaaff", [(32, 32), (32, 32), (32, 32), (32, 32), (64, 32), (32, 64)]),
        ("aaaafff", [(32, 32), (8, 32), (8, 32), (32, 32), (64, 32), (64, 32), (32, 64)]),
        ("aaaaaaaaff", [(32, 32)] * 8 + [(64, 32), (32, 64)]),
        # narrow heads, as T5's; queries and fused keys and values; one key for all queries; a fused gate
        ("aaaafff", [(16, 32), (16, 32), (16, 32), (32, 16), (80, 32), (80, 32), (32, 80)]),
        ("aaaff", [(32, 32), (64, 32), (32, 32), (96, 32), (32, 96)]),
        ("aaff", [(40, 32), (32, 32), (160, 32), (32, 80)]),
        # cross-attention to a stack of another width
        ("aaaaff", [(32, 32), (32, 48), (32, 48), (32, 32), (64, 32), (32, 64)]),
        # parts alone
        ("ff", [(128, 32), (32, 128)]),
        ("aa", [(96, 32), (32, 32)]),
        # not in the order in which they are used
        ("afaf", [(96, 32), (128, 32), (32, 32), (32, 128)]),
        # all widths equal: attention comes first
        ("aaaaff", [(32, 32)] * 6),
        # no pattern
        ("ooo", [(7, 32), (11, 7), (32, 13)]),
    ],
)
def test_a_flat_block_is_told_by_widths(expected: str, shapes: list[tuple[int, int]]) -> None:
    assert roles_of(*shapes) == expected


@given(
    head=st.sampled_from([4, 8, 16]),
    groups=st.sampled_from([1, 2, 4]),
    queries=st.sampled_from([1, 2, 3]),
    attention=st.sampled_from(["separate", "fused", "queries apart"]),
    feed=st.sampled_from(["plain", "gated", "fused"]),
    widening=st.sampled_from([1.5, 2, 3, 4]),
    feed_first=st.booleans(),
)
@pytest.mark.thorough
def test_widths_tell_any_usual_block(
    head: int, groups: int, queries: int, attention: str, feed: str, widening: float, feed_first: bool
) -> None:
    width, kv = head * groups * queries, head * groups
    inner = int(width * widening)
    attend = {
        "separate": [(width, width), (kv, width), (kv, width), (width, width)],
        "fused": [(width + 2 * kv, width), (width, width)],
        "queries apart": [(width, width), (2 * kv, width), (width, width)],
    }[attention]
    # one matrix of queries and one of keys and values, both of the same size, are a gated unit by widths
    if attention == "queries apart" and queries == 2:
        attend = [(width, width), (width, width), (width, width), (width, width)]
    forward = {
        "plain": [(inner, width), (width, inner)],
        "gated": [(inner, width), (inner, width), (width, inner)],
        "fused": [(2 * inner, width), (width, inner)],
    }[feed]
    parts = ["a" * len(attend), "f" * len(forward)]
    shapes = forward + attend if feed_first else attend + forward
    assert roles_of(*shapes) == "".join(reversed(parts) if feed_first else parts)


def container(class_name: str, modules: dict[str, nn.Module], **attributes: object) -> nn.Module:
    """A module of a class of this name; the same name gives the same class."""
    kind = CLASSES.setdefault(class_name, type(class_name, (nn.Module,), {}))
    made = kind()
    for name, module in modules.items():
        made.add_module(name, module)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


CLASSES: dict[str, type[nn.Module]] = {}


def squares(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(32, 32, bias=False) for name in names}


def roles_by_path(block: Callable[[], nn.Module]) -> dict[str, str]:
    model = nn.ModuleList([block(), block()])
    return {layer.path.removeprefix("0."): layer.role for layer in layers(model) if layer.block == 0}


def test_containers_decide_where_all_widths_are_equal() -> None:
    found = roles_by_path(
        lambda: container(
            "A", {"x": container("B", squares("p", "q")), "y": container("C", squares("r", "s", "t", "u"))}
        )
    )
    assert found == {
        **dict.fromkeys(["x.p", "x.q"], "ffn"),
        **dict.fromkeys(["y.r", "y.s", "y.t", "y.u"], "attention"),
    }


def test_attributes_decide_before_widths() -> None:
    # shared queries and keys: by widths a gated feed-forward
    found = roles_by_path(lambda: container("A", {"x": container("B", squares("p", "r", "s"), num_heads=4)}))
    assert set(found.values()) == {"attention"}
    without = roles_by_path(lambda: container("A", {"x": container("B", squares("p", "r", "s"))}))
    assert set(without.values()) == {"ffn"}
    flag = roles_by_path(lambda: container("A", {"x": container("B", squares("p", "r", "s"), heads=True)}))
    assert set(flag.values()) == {"ffn"}


def test_attributes_of_a_whole_layer_do_not_make_its_feed_forward_attention() -> None:
    found = roles_by_path(
        lambda: container(
            "Stage",
            {
                "list": nn.ModuleList(
                    [
                        container(
                            "Layer",
                            {**squares("p", "r", "s", "t"), "u": nn.Linear(32, 64), "w": nn.Linear(64, 32)},
                            num_heads=4,
                        ),
                        container(
                            "Layer",
                            {**squares("p", "r", "s", "t"), "u": nn.Linear(32, 64), "w": nn.Linear(64, 32)},
                            num_heads=4,
                        ),
                    ]
                )
            },
        )
    )
    assert {path: role for path, role in found.items() if path[-1] in "uw"} == {
        f"list.{index}.{name}": "ffn" for index in (0, 1) for name in "uw"
    }
    assert {role for path, role in found.items() if path[-1] not in "uw"} == {"attention"}


def test_the_closing_matrix_may_stand_outside_the_module_that_counts_heads() -> None:
    found = roles_by_path(
        lambda: container(
            "A",
            {
                "x": container("B", squares("p", "r", "s"), n_head=4),
                "y": nn.Linear(32, 32),
                "z": nn.Linear(32, 64),
                "zz": nn.Linear(64, 32),
            },
        )
    )
    assert found == {"x.p": "attention", "x.r": "attention", "x.s": "attention", "y": "attention"} | {
        "z": "ffn",
        "zz": "ffn",
    }


def test_a_mixer_that_counts_heads_and_convolves_over_time_is_no_attention() -> None:
    def block(groups: int) -> nn.Module:
        convolution = nn.Conv1d(32, 32, 3, groups=groups)
        return container("A", {"x": container("B", {"c": convolution, **squares("p", "r")}, num_heads=4)})

    assert set(roles_by_path(lambda: block(32)).values()) == {"other"}
    # keys and values reduced by a convolution: still attention
    assert set(roles_by_path(lambda: block(1)).values()) == {"attention"}


def test_odd_attention_does_not_hide_the_feed_forward_beside_it() -> None:
    low = {"p": nn.Linear(32, 12), "r": nn.Linear(12, 48), "s": nn.Linear(32, 9), "t": nn.Linear(48, 32)}
    found = roles_by_path(
        lambda: container(
            "A", {"x": container("B", low, num_heads=4), "u": nn.Linear(32, 64), "w": nn.Linear(64, 32)}
        )
    )
    assert found == {**dict.fromkeys(["x.p", "x.r", "x.s", "x.t"], "attention"), "u": "ffn", "w": "ffn"}


def test_adapters_belong_to_what_they_adapt() -> None:
    def adapted(rows: int, columns: int) -> nn.Module:
        low = {"down": nn.Linear(columns, 4, bias=False), "up": nn.Linear(4, rows, bias=False)}
        return container("Adapter", {"base": nn.Linear(columns, rows), **low})

    def block() -> nn.Module:
        attention = {"p": adapted(32, 32), **squares("r", "s", "t")}
        feed = {"u": adapted(64, 32), "w": nn.Linear(64, 32)}
        return container("A", {"x": container("B", attention, n_heads=4), "mlp": container("C", feed)})

    for path, role in roles_by_path(block).items():
        assert role == ("attention" if path.startswith("x.") else "ffn"), path


def test_blocks_in_the_lists_and_dictionaries_of_small_implementations() -> None:
    def layer() -> nn.Module:
        attend = container(
            "Attend", {"qkv": nn.Linear(32, 192), "out": nn.Sequential(nn.Linear(64, 32))}, heads=8
        )
        feed = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        return nn.ModuleList([attend, feed])

    parts = {"words": nn.Embedding(50, 32), "layers": nn.ModuleList([layer(), layer()])}
    model = container("Small", {"parts": nn.ModuleDict(parts), "head": nn.Linear(32, 50)})
    assert [(each.path, each.role, each.block) for each in layers(model)] == [
        ("parts.words", "embedding", None),
        *[
            (f"parts.layers.{block}.{path}", role, block)
            for block in (0, 1)
            for path, role in [("0.qkv", "attention"), ("0.out.0", "attention"), ("1.1", "ffn"), ("1.3", "ffn")]
        ],
        ("head", "head", None),
    ]
    assert [place.path for place in survey(model).places if place.vocabulary] == ["head"]


@pytest.mark.parametrize(
    ("class_name", "path", "role"),
    [
        ("Mystery", "self_attn", "attention"),
        ("Mystery", "mlp", "ffn"),
        ("FeedForward", "m", "ffn"),
        ("CausalSelfAttention", "m", "attention"),
        ("Mystery", "m", "other"),
    ],
)
def test_names_are_the_last_resort(class_name: str, path: str, role: str) -> None:
    odd = {"p": (7, 32), "r": (11, 7), "s": (32, 13)}
    found = roles_by_path(
        lambda: container(
            "A", {path: container(class_name, {name: nn.Linear(c, r) for name, (r, c) in odd.items()})}
        )
    )
    assert set(found.values()) == {role}


def test_names_do_not_overrule_widths() -> None:
    found = roles_by_path(
        lambda: container(
            "A", {"attention": container("Attention", {"q": nn.Linear(32, 64), "k": nn.Linear(64, 32)})}
        )
    )
    assert set(found.values()) == {"ffn"}


# Mixtures of experts ---------------------------------------------------------------------------------------


def expert() -> nn.Module:
    return container("E", {"u": nn.Linear(32, 48, bias=False), "d": nn.Linear(48, 32, bias=False)})


def mixture(rows: int, **more: nn.Module) -> nn.Module:
    return container(
        "M", {"g": nn.Linear(32, rows, bias=False), "list": nn.ModuleList([expert() for _ in range(5)]), **more}
    )


def test_a_matrix_with_one_row_for_each_expert_is_the_router() -> None:
    found = roles_by_path(lambda: container("A", {"m": mixture(5, single=nn.Linear(32, 1))}))
    assert found.pop("m.g") == "router"
    assert found.pop("m.single") == "router"
    assert set(found.values()) == {"ffn"}
    assert len(found) == 10


def test_other_row_counts_are_no_router() -> None:
    found = roles_by_path(lambda: container("A", {"m": mixture(6)}))
    assert found["m.g"] == "other"


def test_keys_with_as_many_rows_as_experts_are_no_router() -> None:
    def block() -> nn.Module:
        attention = {
            "q": nn.Linear(32, 32),
            "k": nn.Linear(32, 5),
            "v": nn.Linear(32, 5),
            "o": nn.Linear(32, 32),
        }
        return container("A", {"x": container("B", attention, num_heads=4), "m": mixture(5)})

    found = roles_by_path(block)
    assert {found[f"x.{name}"] for name in "qkvo"} == {"attention"}
    assert found["m.g"] == "router"


def test_a_block_that_is_itself_the_mixture() -> None:
    keys = {"r": nn.Linear(32, 5), "s": nn.Linear(32, 5)}
    found = roles_by_path(lambda: mixture(5, x=container("B", {**squares("p", "t"), **keys}, num_heads=4)))
    assert found["g"] == "router"
    assert {found[f"x.{name}"] for name in "prst"} == {"attention"}


def test_a_single_row_deeper_in_the_mixture_is_no_router() -> None:
    deep = container("D", {"one": nn.Linear(32, 1), "two": nn.Linear(32, 7)})
    assert roles_by_path(lambda: container("A", {"m": mixture(5, deep=deep)}))["m.deep.one"] == "other"


# Blocks, stacks and heads of models that are no Hugging Face models ----------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.squeeze = container("SE", {"down": nn.Linear(channels, 2), "up": nn.Linear(2, channels)})


class ResNet(nn.Module):
    """As torchvision lays it out: stages are attributes; the second stage has one block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.layer2 = nn.Sequential(BasicBlock(16))
        self.fc = nn.Linear(16, 10)


def test_a_convolutional_network() -> None:
    found = layers(ResNet())
    assert {layer.role for layer in found if layer.stack} == {"other"}
    assert [(layer.path, layer.role) for layer in found if not layer.stack] == [
        ("conv1", "other"),
        ("fc", "head"),
    ]
    blocks = {layer.path.rpartition(".")[0]: layer.block for layer in found if layer.path.endswith("conv1")}
    assert blocks == {"": None, "layer1.0": 0, "layer1.1": 1, "layer2.0": 2}


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)]),
        nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))),
    ],
)
def test_a_multilayer_perceptron_has_no_blocks(model: nn.Module) -> None:
    found = layers(model)
    assert [layer.role for layer in found] == ["other", "other", "head"]
    assert [layer.stack for layer in found] == [None, None, None]


def test_torch_transformers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    found = layers(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert [(each.name, each.role, each.block) for each in found] == [
        (f"layers.{block}.{name}", role, block)
        for block in (0, 1)
        for name, role in zip(names, ["attention", "attention", "ffn", "ffn"], strict=True)
    ]
    both = nn.Transformer(32, 4, 1, 2, dim_feedforward=64, batch_first=True)
    # nested tensors are not what this is about
    found = layers(both)
    assert [(each.stack, each.block) for each in found if each.name.endswith("linear1.weight")] == [
        ("encoder", 0),
        ("decoder", 0),
        ("decoder", 1),
    ]
    assert {each.role for each in found if "attn" in each.name} == {"attention"}
    assert {each.role for each in found if "linear" in each.name} == {"ffn"}


class Tutorial(nn.Module):
    """A language model of one's own; `first` says which modules are registered before the blocks."""

    def __init__(self, first: str = "tokens positions", vocabulary: int = 50) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {
            "tokens": nn.Embedding(vocabulary, 32),
            "positions": nn.Embedding(64, 32),
            "types": nn.Embedding(2, 32),
            "patches": nn.Linear(48, 32),
            "mixer": nn.Linear(32, vocabulary),
            "blocks": nn.ModuleList(
                [Foo([(96, 32), (32, 32), (64, 32), (32, 64)]), Foo([(96, 32), (32, 32), (64, 32), (32, 64)])]
            ),
            "out": nn.Linear(32, vocabulary, bias=False),
            "classes": nn.Linear(32, 2),
        }
        for name in first.split():
            self.add_module(name, parts[name])


@pytest.mark.parametrize(
    ("order", "head", "vocabulary"),
    [
        ("tokens positions blocks out", "out", True),
        ("positions tokens blocks out", "out", False),
        ("tokens positions out blocks", "out", True),
        ("tokens mixer blocks out", "out", True),
        ("tokens positions types blocks classes", "classes", False),
        ("patches blocks classes", "classes", False),
        ("patches classes blocks", "classes", False),
        ("patches blocks", None, False),
        ("tokens blocks", None, False),
    ],
)
def test_the_head_of_a_model_that_does_not_say(order: str, head: str | None, vocabulary: bool) -> None:
    places = survey(Tutorial(order)).places
    assert [place.path for place in places if place.role == "head"] == ([head] if head else [])
    # a table of positions registered first and larger than the vocabulary hides it: the documented limit
    assert [place.path for place in places if place.vocabulary] == ([head] if vocabulary else [])


class Declared(Tutorial):
    """Says what Hugging Face models say of themselves."""

    base_model_prefix = "body"
    config = SimpleNamespace(is_encoder_decoder=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_a_vocabulary_head_is_told_by_the_declared_input_embedding() -> None:
    model = Declared("positions tokens out")
    model.body = Tutorial("positions blocks")
    assert [(place.path, place.role) for place in survey(model).places if place.vocabulary] == [("out", "head")]


def test_a_model_that_claims_one_stack_has_one() -> None:
    model = Declared("tokens")
    model.encoder, model.decoder = Tutorial("blocks"), Tutorial("blocks")
    assert not survey(model).encoder_decoder
    assert [layer.block for layer in layers(model) if layer.path.endswith("a")] == [0, 1, 2, 3]
    model.config = SimpleNamespace(is_encoder_decoder=True)
    assert survey(model).encoder_decoder
    assert [layer.block for layer in layers(model) if layer.path.endswith("a")] == [0, 1, 0, 1]


def test_a_wrapper_around_a_hugging_face_body() -> None:
    model = container("Wrapper", {"body": family("bert body"), "fc": nn.Linear(32, 2)})
    assert [layer.path for layer in layers(model) if layer.role == "head"] == ["fc"]


def test_layers_of_several_kinds_may_alternate() -> None:
    kinds = [container("K1", {"p": nn.Linear(32, 64), "r": nn.Linear(64, 32)}) for _ in range(2)]
    other = container("K2", squares("p", "r", "s", "t"), num_heads=4)
    found = layers(nn.ModuleList([kinds[0], other, kinds[1]]))
    assert [layer.block for layer in found] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [layer.role for layer in found] == ["ffn", "ffn", *["attention"] * 4, "ffn", "ffn"]


def test_one_module_used_many_times_is_one_block() -> None:
    block = Foo([(96, 32), (32, 32), (64, 32), (32, 64)])
    found = layers(nn.Sequential(nn.Linear(4, 32), nn.ModuleList([block] * 3), nn.Linear(32, 2)))
    assert [layer.block for layer in found] == [None, 0, 0, 0, 0, None]
    assert found[1].tied == ("1.1.a.weight", "1.2.a.weight")


# What cannot be pruned -------------------------------------------------------------------------------------


def test_a_computed_or_integer_weight_is_no_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    found = survey(model)
    assert [place.name for place in found.places] == ["2.weight"]
    assert found.unprunable == (
        (
            "0.weight",
            "is computed from other parameters; make it plain first (torch.nn.utils.parametrize"
            ".remove_parametrizations, torch.nn.utils.prune.remove or remove_weight_norm)",
        ),
        ("1.weight", "holds torch.uint8, not floating-point weights"),
    )


def test_a_model_masked_by_torch_prune_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert survey(model).unprunable[0][0] == "0.weight"


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UsageError) as caught:
        survey(model)
    assert str(caught.value) == (
        "1.0.weight has no shape yet (LazyLinear is lazy): run one batch through the model before pruning it"
    )


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        survey("model.safetensors")
    assert str(caught.value) == "expected a torch.nn.Module to prune, got str"


def test_below_is_about_whole_parts_of_a_path() -> None:
    assert below("a.b", "a.b.c.d") == "c.d"
    assert below("a.b", "a.bc") is None
    assert below("a.b", "a.b") == ""
    assert below("", "") == ""
