"""Which layers: tensors that have several names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.where import Only, layers, select

from .selections import build, paths, reasons, refusal

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
