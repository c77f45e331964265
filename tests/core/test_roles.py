"""The role of every matrix of every family, exactly, by names and without."""

from __future__ import annotations

import re

import pytest
from torch import nn

from secateur.core.matrix import layouts
from secateur.core.roles import survey
from secateur.core.where import Layer, layers

from .families import BLOCKS, ENCODER_DECODER, FAMILIES, family


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
