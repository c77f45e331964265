"""What `only=` and `skip=` choose, what they refuse, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.terms import ROLES, terms
from secateur.core.where import Only, layers, select
from secateur.errors import UsageError

from .selections import BUILDERS, build, mlp, paths, reasons

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


def test_roles_are_the_documented_ones() -> None:
    assert ROLES == ("all", "attention", "ffn", "encoder", "decoder", "head", "embedding")
    assert [term.kind for term in terms("only", ",".join(ROLES), ()) or ()] == ["role"] * 7
