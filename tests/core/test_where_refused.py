"""Which layers: words that match nothing, that leave nothing, that are no words."""

from __future__ import annotations

import pytest
from torch import nn

from secateur.core.terms import shown, terms
from secateur.core.where import Only, select
from secateur.errors import UsageError

from .selections import build, mlp, paths, refusal

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
    assert [f"{name} {why}" for name, why in select(model).unprunable] == [computed]
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
