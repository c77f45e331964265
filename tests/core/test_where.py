"""What `only=` and `skip=` choose, what they refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.terms import ROLES, shown, terms
from secateur.core.where import Only, Selection, layers, select
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


# The default, and roles ------------------------------------------------------------------------------------


def test_default_leaves_embeddings_and_the_vocabulary_head() -> None:
    chosen = select(build("llama"))
    assert len(chosen.chosen) == 14
    assert {layer.role for layer in chosen.chosen} == {"attention", "ffn"}
    assert reasons(chosen) == {
        "model.embed_tokens.weight": "embedding, left dense unless named; include it with "
        'only="all,model.embed_tokens"',
        "lm_head.weight": "output head of a language model, left dense in published results; include it with "
        'only="all"',
    }


def test_what_a_reason_says_works() -> None:
    model = build("llama")
    assert paths(select(model, "all"))[-1] == "lm_head"
    assert len(select(model, "all").chosen) == 15
    assert paths(select(model, "all,model.embed_tokens")) == [layer.path for layer in layers(model)]


def test_default_keeps_the_head_of_a_classifier() -> None:
    chosen = select(build("bert"))
    assert paths(chosen)[-2:] == ["bert.pooler.dense", "classifier"]
    assert {layer.role for layer, _ in chosen.left_out} == {"embedding"}


def test_default_leaves_routers() -> None:
    router = "encoder.block.1.layer.1.mlp.router.classifier"
    model = build("switch")
    assert reasons(select(model))[router + ".weight"] == (
        f'router of a mixture of experts, left dense unless named; include it with only="all,{router}"'
    )
    for only in ("all", "encoder", nn.Linear, "ffn", nn.Module):
        assert router not in paths(select(model, only, skip=["embedding"]))
    assert paths(select(model, "*.router.*")) == [router]
    assert paths(select(model, lambda path, module: path.endswith("classifier"))) == [router]


@pytest.mark.parametrize("role", ["attention", "ffn", "head", "embedding"])
def test_roles_choose_what_has_the_role(role: str) -> None:
    for name in ("bert", "llama"):
        model = build(name)
        expected = [layer.path for layer in layers(model) if layer.role == role]
        assert paths(select(model, role)) == expected != []


def test_encoder_is_all_blocks_of_a_single_stack() -> None:
    model = build("llama")
    assert paths(select(model, "encoder")) == paths(select(model))


def test_encoder_and_decoder_of_two_stacks() -> None:
    model = build("t5")
    encoder, decoder = select(model, "encoder"), select(model, "decoder")
    assert {layer.stack for layer in encoder.chosen} == {"encoder"}
    assert {layer.stack for layer in decoder.chosen} == {"decoder"}
    assert len(encoder.chosen) == 12
    assert len(decoder.chosen) == 20
    # tables of relative positions stand in the stacks and are embeddings all the same
    assert {layer.role for layer in (*encoder.chosen, *decoder.chosen)} == {"attention", "ffn"}
    assert paths(select(model, "encoder,decoder")) == paths(select(model))


def test_words_add_up_and_skip_takes_away() -> None:
    model = build("llama")
    expected = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    for only in (
        "*.q_proj,*.down_proj",
        " *.q_proj , *.down_proj ,",
        ["*.q_proj", "*.down_proj"],
        ("*.q_proj,*.down_proj",),
        [lambda path, module: path.endswith("q_proj"), "*.down_proj.weight"],
    ):
        assert paths(select(model, only)) == expected
    assert paths(select(model, "*.q_proj,*.down_proj", "model.layers.1.*")) == expected[:2]
    assert reasons(select(model, "*.q_proj", "model.layers.1.*"))["model.layers.1.self_attn.q_proj.weight"] == (
        'skipped by skip="model.layers.1.*"'
    )
    assert reasons(select(model, "*.q_proj"))["lm_head.weight"] == 'not selected by only="*.q_proj"'
    assert select(model, skip=[]) == select(model)


def test_types_choose_their_modules_and_what_is_inside_them() -> None:
    model = build("llama")
    everything = [layer.path for layer in layers(model)]
    assert paths(select(model, nn.Linear)) == everything[1:]
    assert paths(select(model, nn.Embedding)) == everything[:1]
    mlp_class = type(model.get_submodule("model.layers.0.mlp"))
    assert paths(select(model, mlp_class)) == paths(select(model, "ffn"))
    assert paths(select(model, skip=mlp_class)) == paths(select(model, "attention"))
    # the class of a module around an embedding does not name the embedding
    assert paths(select(model, type(model))) == paths(select(model, "all"))
    attention = nn.MultiheadAttention(8, 2)
    assert [layer.name for layer in select(nn.Sequential(attention), nn.MultiheadAttention).chosen] == [
        "0.in_proj_weight",
        "0.out_proj.weight",
    ]


def test_predicates_see_path_and_module() -> None:
    seen: list[tuple[str, nn.Module]] = []
    model = mlp()

    def wide(path: str, module: nn.Module) -> bool:
        seen.append((path, module))
        return module.out_features > 4

    assert paths(select(model, wide)) == ["0"]
    assert set(seen) == {("0", model[0]), ("2", model[2])}


# Laws ------------------------------------------------------------------------------------------------------

WORDS: dict[str, Any] = {
    "attention": "attention",
    "ffn": "ffn",
    "encoder": "encoder",
    "glob": "*.0.*",
    "class": nn.Linear,
    "head": "head",
    "predicate": lambda path, module: module.weight.shape[0] > 32,
}


def chosen(model: nn.Module, only: Only = None, skip: Only = None) -> set[str]:
    """Paths; none where there is nothing left to prune."""
    try:
        return set(paths(select(model, only, skip)))
    except UsageError as error:
        if not str(error).startswith("nothing to prune in "):
            raise
        return set()


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("word", WORDS)
def test_only_and_skip_part_the_layers(name: str, word: str) -> None:
    model = build(name)
    usual = chosen(model)
    only, skip = chosen(model, WORDS[word]), chosen(model, skip=WORDS[word])
    assert only
    assert only.isdisjoint(skip)
    assert skip == usual - only


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "switch"])
def test_every_layer_is_chosen_or_left_out_with_a_reason(name: str) -> None:
    model = build(name)
    every = layers(model)
    order = {layer.name: index for index, layer in enumerate(every)}
    for only in (None, "all", "attention", "*.0.*"):
        found = select(model, only)
        together = [layer.name for layer in found.chosen] + [layer.name for layer, _ in found.left_out]
        assert sorted(together, key=order.__getitem__) == list(order)
        assert all(why for _, why in found.left_out)
        assert list(found.chosen) == sorted(found.chosen, key=lambda layer: order[layer.name])
        assert all(every[order[layer.name]] == layer for layer in found.chosen)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.thorough
def test_the_path_and_the_name_of_a_layer_select_it(name: str) -> None:
    model = build(name)
    for layer in layers(model)[::3]:
        assert [each.name for each in select(model, layer.path).chosen] == [layer.name]
        assert [each.name for each in select(model, layer.name).chosen] == [layer.name]


# letters that mean something in globs, regular expressions, messages or here
ODD = st.text(alphabet="a[]*?!(){}|^$+\\,;\"' é-#%", min_size=1, max_size=8)


@given(names=st.lists(ODD, min_size=2, max_size=4, unique=True))
@pytest.mark.thorough
def test_any_name_can_be_written(names: list[str]) -> None:
    model = nn.Module()
    inner = nn.Module()
    model.add_module("in[0]", inner)
    for name in names:
        inner.add_module(name, nn.Linear(2, 2))
    for name in names:
        path = f"in[0].{name}"
        assert path in paths(select(model, path))
        assert path in paths(select(model, [path + ".weight"]))
        assert path not in [layer.path for layer in select(model, skip=path).chosen]


def test_a_name_that_is_a_pattern_means_itself_first() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b,c": nn.Linear(2, 2)})
    assert paths(select(model, "a[0]")) == ["a[0]", "a0"]
    assert paths(select(model, "a[[]0]")) == ["a[0]"]
    assert paths(select(model, "b,c")) == ["b,c"]


def test_globs_know_upper_and_lower_case() -> None:
    model = nn.ModuleDict({"Lin": nn.Linear(2, 2), "lin": nn.Linear(2, 2)})
    assert paths(select(model, "L*")) == ["Lin"]


def test_a_role_the_model_has_nothing_of_is_a_path() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4), "attention": nn.Linear(4, 3)}
    )
    for name in ("encoder", "decoder", "attention"):
        assert paths(select(model, name)) == [name]
    # a role it does have wins; the parameter name always means the parameter
    named = nn.ModuleDict({"head": nn.Linear(4, 2), "tail": nn.Linear(2, 4)})
    assert paths(select(named, "head")) == ["tail"]
    assert paths(select(named, "head.weight")) == ["head"]


def test_a_model_that_is_one_layer() -> None:
    (layer,) = select(nn.Linear(4, 2)).chosen
    assert (layer.name, layer.path, layer.role, layer.size) == ("weight", "", "head", 8)


def test_a_layer_knows_its_weight_and_size() -> None:
    model = build("gpt2")
    for layer in layers(model):
        assert layer.weight is model.get_parameter(layer.name)
        assert layer.size == layer.weight.numel()


# Tied tensors ----------------------------------------------------------------------------------------------


def test_a_tied_tensor_is_one_layer() -> None:
    found = {layer.name: layer.tied for layer in layers(build("gpt2"))}
    assert found["transformer.wte.weight"] == ("lm_head.weight",)
    assert "lm_head.weight" not in found
    assert len(found) == 10


def test_a_tied_tensor_is_left_out_unless_named() -> None:
    model = build("gpt2")
    for only in (None, "all", type(model)):
        why = reasons(select(model, only))["transformer.wte.weight"]
        assert why == (
            "transformer.wte.weight is the same tensor as lm_head.weight (head): pruning it changes "
            "both. Name both "
            'to prune them, only="all,transformer.wte,lm_head"'
        )
    assert "transformer.wte" in paths(select(model, "all,transformer.wte,lm_head"))


TIED = (
    "lm_head.weight is the same tensor as transformer.wte.weight (embedding): pruning it changes both. "
    "Name both to "
    'prune them, only="lm_head,transformer.wte", or leave it out with skip="lm_head".'
)


@pytest.mark.parametrize(
    "only", ["lm_head", "head", "lm_*", "lm_head.weight", "all,lm_head", nn.Linear, ["head"]]
)
def test_half_of_a_tied_tensor_is_refused(only: Only) -> None:
    assert refusal(build("gpt2"), only) == TIED


@pytest.mark.parametrize("only", ["embedding", "transformer.wte", nn.Embedding])
def test_the_other_half_is_refused_too(only: Only) -> None:
    assert refusal(build("gpt2"), only) == (
        "transformer.wte.weight is the same tensor as lm_head.weight (head): pruning it changes both. "
        "Name both to "
        'prune them, only="transformer.wte,lm_head", or leave it out with skip="transformer.wte".'
    )


@pytest.mark.parametrize(
    "only",
    [
        "lm_head,transformer.wte",
        "head,transformer.wte",
        [nn.Linear, "*.wte"],
        lambda path, module: path.endswith(("wte", "lm_head")),
    ],
)
def test_both_halves_named_are_pruned(only: Only) -> None:
    assert paths(select(build("gpt2"), only)) == ["transformer.wte"]


def test_skipping_either_name_leaves_a_tied_tensor_out() -> None:
    model = build("llama tied")
    for skip in ("lm_head", "model.embed_tokens", "head", "embedding"):
        found = select(model, nn.Linear, skip)
        assert len(found.chosen) == 14
        assert reasons(found) == {"model.embed_tokens.weight": f'skipped by skip="{skip}"'}


def test_three_names_are_all_told() -> None:
    assert refusal(build("t5"), "lm_head") == (
        "lm_head.weight is the same tensor as shared.weight (embedding), encoder.embed_tokens.weight "
        "(embedding) and "
        "decoder.embed_tokens.weight (embedding): pruning it changes all of them. Name all of them to "
        "prune them, "
        'only="lm_head,shared,encoder.embed_tokens,decoder.embed_tokens", or leave it out with skip="lm_head".'
    )
    assert refusal(build("t5"), "lm_head,shared,encoder.*").startswith(
        "shared.weight is the same tensor as decoder.embed_tokens.weight (embedding)"
    )
    assert paths(select(build("t5"), "lm_head,shared,*.embed_tokens")) == ["shared"]


def test_two_layers_of_the_body_that_share_a_tensor() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert paths(select(model)) == ["2"]
    assert reasons(select(model))["0.weight"].startswith("0.weight is the same tensor as 1.weight (other)")
    assert paths(select(model, "[01]")) == ["0"]
    assert "Name both" in refusal(model, "1")


def test_a_comma_in_a_tied_name_is_told_as_a_list() -> None:
    model = nn.ModuleDict({"a,b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "d": nn.Linear(4, 4)})
    model["c"].weight = model["a,b"].weight
    assert 'only=["c", "a,b"]' in refusal(model, "c")
    assert paths(select(model, ["c", "a,b"])) == ["a,b"]


def test_one_module_under_two_names_is_one_layer_and_not_refused() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "again": shared, "last": nn.Linear(4, 4)})
    for only in (None, "first", "again", "first,again"):
        found = select(model, only)
        assert found.chosen[0].name == "first.weight"
        assert found.chosen[0].tied == ("again.weight",)


def test_a_bare_parameter_that_shares_the_memory_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_parameter("copy", model[0].weight)
    assert reasons(select(model))["0.weight"] == (
        "0.weight is the same tensor as copy (other): pruning it changes both. Name both to prune them, "
        'only="all,0,copy"'
    )
    assert paths(select(model, "0,copy")) == ["0"]


def test_a_slice_of_another_parameter_is_pruned_with_the_whole() -> None:
    model = nn.ModuleDict({"whole": nn.Linear(4, 12), "part": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["part"].weight = nn.Parameter(model["whole"].weight.detach()[4:8])
    assert paths(select(model)) == ["other"]
    assert refusal(model, "part") == (
        "part.weight shares memory with whole.weight (other): pruning it changes both. Name both to "
        "prune them, "
        'only="part,whole", or leave it out with skip="part".'
    )
    found = select(model, "part,whole")
    assert paths(found) == ["whole"]
    assert reasons(found)["part.weight"] == "part of whole.weight, which is pruned as a whole"


def test_slices_that_overlap_without_one_holding_the_other_are_refused() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    memory = torch.zeros(6, 4)
    model["one"].weight, model["two"].weight = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    assert refusal(model, "one,two") == (
        "one.weight and two.weight overlap in memory and neither holds the other, so no mask can be "
        "exact for both. "
        "Give one of them memory of its own (parameter.data = parameter.data.clone()), or leave both out"
    )


def test_a_transposed_view_is_pruned_once() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    model["two"].weight = nn.Parameter(model["one"].weight.detach().t())
    assert paths(select(model, "one,two")) == ["one"]
    assert "shares memory with" in refusal(model, "two")


# Words that match nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        (
            "llama",
            "*.qproj",
            'only="*.qproj" matches none of the 14 prunable layers; nearest: model.layers.0.self_attn.q_proj.',
        ),
        ("llama", "atention", 'only="atention" matches none of the 14 prunable layers; nearest: attention.'),
        ("llama", "Encoder", 'only="Encoder" matches none of the 14 prunable layers; nearest: encoder.'),
        ("llama", "lm_haed", 'only="lm_haed" matches none of the 14 prunable layers; nearest: lm_head.'),
        (
            "llama",
            "*.down_prj.weight",
            'only="*.down_prj.weight" matches none of the 14 prunable layers; nearest: '
            "model.layers.0.mlp.down_proj.weight.",
        ),
        (
            "llama",
            "model.layer.0.self_attn.q_proj",
            'only="model.layer.0.self_attn.q_proj" matches none of the 14 prunable layers; nearest: '
            "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj, "
            "model.layers.0.self_attn.v_proj.",
        ),
        (
            "llama",
            "model.layers.1",
            'only="model.layers.1" matches none of the 14 prunable layers; model.layers.1 is a module '
            "that holds 7 "
            'of them: only="model.layers.1.*".',
        ),
        (
            "llama",
            "model.norm",
            'only="model.norm" matches none of the 14 prunable layers; model.norm (LlamaRMSNorm) holds '
            "no matrix.",
        ),
        (
            "llama",
            "xyz",
            'only="xyz" matches none of the 14 prunable layers; known: model.embed_tokens, '
            + ", ".join(
                f"model.layers.{block}.{part}"
                for block, part in [
                    *[(0, f"self_attn.{letter}_proj") for letter in "qkvo"],
                    *[(0, f"mlp.{name}_proj") for name in ("gate", "up", "down")],
                    *[(1, f"self_attn.{letter}_proj") for letter in "qkvo"],
                ]
            )
            + " and 4 more.",
        ),
        (
            "llama",
            "decoder",
            'only="decoder" needs an encoder-decoder model; LlamaForCausalLM has one stack, which '
            'only="encoder" '
            "selects",
        ),
        (
            "llama",
            nn.Conv2d,
            "only=Conv2d matches none of the 14 prunable layers; their classes: Embedding, Linear",
        ),
    ],
)
def test_a_word_that_matches_nothing(name: str, word: Only, message: str) -> None:
    model = build(name)
    assert refusal(model, word) == message
    assert refusal(model, ["attention", word]) == message  # type: ignore[list-item]
    assert refusal(model, skip=word) == message.replace("only=", "skip=")


def test_a_predicate_that_matches_nothing() -> None:
    def never(path: str, module: nn.Module) -> bool:
        return False

    assert refusal(mlp(), never) == "only=never matches none of the 2 prunable layers; known: 0, 2"


def test_roles_that_a_model_does_not_have() -> None:
    model = mlp()
    head = "matches none of the 2 prunable layers"
    assert refusal(model, "attention") == f'only="attention" {head}; their roles: other, head'
    assert refusal(model, "encoder") == f'only="encoder" {head}: Sequential has no repeated blocks'
    assert refusal(model, skip="decoder") == (
        'skip="decoder" needs an encoder-decoder model; Sequential has no repeated blocks'
    )
    assert refusal(nn.Sequential(nn.Linear(2, 2)), "ffn") == (
        'only="ffn" matches none of the 1 prunable layer; their roles: head'
    )


def test_a_weight_that_is_computed_is_told() -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    computed = (
        "0.weight is computed from other parameters; make it plain first (torch.nn.utils.parametrize"
        ".remove_parametrizations, torch.nn.utils.prune.remove or remove_weight_norm)"
    )
    assert refusal(model, "0") == f'only="0" matches none of the 1 prunable layer; {computed}.'
    assert paths(select(model)) == ["2"]
    nn.utils.parametrizations.weight_norm(model[2])
    assert refusal(model).startswith(f"nothing to prune in Sequential: {computed}; 2.weight is computed")


# Nothing left ----------------------------------------------------------------------------------------------


def test_a_model_without_matrices() -> None:
    assert refusal(nn.Sequential(nn.ReLU())) == (
        "nothing to prune in Sequential: it holds no matrix (Linear, Conv1d/2d/3d, Conv1D, Embedding, "
        "MultiheadAttention, stacked experts)"
    )


def test_only_things_that_are_left_dense() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    assert refusal(model) == (
        "nothing to prune in Sequential, all 1 layers are left out. 0.weight: embedding, left dense "
        "unless named; "
        'include it with only="all,0"'
    )
    assert paths(select(model, "all,0")) == ["0"]


def test_everything_skipped() -> None:
    message = refusal(build("gpt2"), "attention", skip=["*.attn.*"])
    assert message.startswith("nothing to prune in GPT2LMHeadModel, all 10 layers are left out. ")
    assert 'transformer.h.0.attn.c_attn.weight and 3 more: skipped by skip=["*.attn.*"]' in message
    assert 'transformer.h.0.mlp.c_fc.weight and 3 more: not selected by only="attention"' in message


def test_many_reasons_are_cut_short() -> None:
    model = nn.Sequential(*(nn.Embedding(9, 4) for _ in range(7)))
    assert refusal(model).endswith("; and 3 more")


# Words that are no words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [3, {"a"}, int, nn.Linear(2, 2), ["ffn", None]])
def test_other_things_are_refused(given: object) -> None:
    wrong = given[-1] if isinstance(given, list) else given
    with pytest.raises(UsageError) as caught:
        terms("skip", given, ())
    assert str(caught.value) == (
        f"{shown('skip', wrong)} is of type {type(wrong).__name__}; expected a role (all, attention, ffn, "
        f"encoder, "
        "decoder, head, embedding), a glob over module paths, a module class, a function of (path, "
        "module), or a "
        "list of these"
    )


@pytest.mark.parametrize("given", ["", " , ", []])
def test_empty_words_are_refused(given: object) -> None:
    with pytest.raises(UsageError) as caught:
        terms("only", given, ())
    assert str(caught.value) == (
        f"{shown('only', given)} names nothing; give a role (all, attention, ffn, encoder, decoder, head, "
        f"embedding) "
        "or a glob, or leave only out"
    )


def test_how_words_are_shown() -> None:
    assert shown("only", "a,b") == 'only="a,b"'
    assert shown("only", ["a", nn.Linear, mlp, 3]) == 'only=["a", Linear, mlp, 3]'
    assert shown("skip", nn.Linear(2, 2)) == "skip=Linear"


def test_roles_are_the_documented_ones() -> None:
    assert ROLES == ("all", "attention", "ffn", "encoder", "decoder", "head", "embedding")
    assert [term.kind for term in terms("only", ",".join(ROLES), ()) or ()] == ["role"] * 7
