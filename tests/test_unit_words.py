"""Patterns of whole units in words."""

import pytest

from secateur.errors import UsageError
from secateur.pattern import Axes, Channels, Experts, Heads, Hidden, KVGroups, Neurons, QueryHeads
from secateur.request import build_recipe, cuts_units, pattern_of, request, with_method
from secateur.unit_words import UNIT_WORDS, check_units, says_units, units_of

KINDS = [Heads, KVGroups, QueryHeads, Neurons, Channels, Hidden, Experts]


@pytest.mark.parametrize(("word", "kind"), list(zip(UNIT_WORDS, KINDS, strict=True)))
def test_every_word_is_its_pattern(word, kind):
    assert units_of(word, minimum=2, multiple=8, homogeneous=True) == kind(2, 8, True)
    assert says_units(word)


@pytest.mark.parametrize("text", ["heads,neurons", "heads | neurons", "heads+neurons", "Heads, NEURONS"])
def test_words_are_joined(text):
    assert units_of(text) == Heads() | Neurons()


def test_axes_are_named_as_they_are():
    assert units_of("axes:v dimension,hidden") == Axes("v dimension") | Hidden()
    assert units_of("kv_groups") == KVGroups()
    assert not says_units("2:4")
    assert not says_units("blocks:4x1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("haeds", "'haeds' is no kind of units; nearest: heads"),
        ("heads,", "'' is no kind of units"),
        ("axes:", "'axes:' names no axis"),
        ("heads,neurons,heads", "'heads,neurons,heads' names a kind of units twice"),
    ],
)
def test_what_is_no_pattern_is_refused(text, words):
    with pytest.raises(UsageError) as told:
        check_units(text)
    assert words in str(told.value)


def asked(**given):
    return request({"model": "m", **given})


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"method": "flap", "sparsity": 0.3}, "heads,neurons"),
        ({"method": "slimming", "sparsity": 0.3}, "channels"),
        ({"method": "activation", "tau": 0.1}, "neurons"),
        ({"method": "activation", "sparsity": 0.5}, "weights"),
        ({"method": "activation", "tau": 0.1, "pattern": "channels"}, "channels"),
        ({"sparsity": 0.5}, "weights"),
    ],
)
def test_a_method_brings_its_pattern(given, pattern):
    assert pattern_of(asked(**given)) == pattern
    assert cuts_units(asked(**given)) == (pattern != "weights")


@pytest.mark.parametrize("language", [True, False])
def test_whole_units_go_by_flap_where_no_method_is_named(language):
    typed = asked(pattern="heads", sparsity=0.3)
    settled = with_method(typed, language=language)
    assert settled.method == "flap"
    assert "method" not in settled.model_fields_set
    recipe = build_recipe(settled)
    assert (
        str(recipe)
        == "flap on Heads(), Normalised(by='standard'), updated by TakeOver(how='bias', damping=0.01)"
    )


@pytest.mark.parametrize(
    ("mend", "update"),
    [("none", ""), ("least-squares", ", updated by TakeOver(how='least-squares', damping=0.01)")],
)
def test_mending_is_as_asked(mend, update):
    recipe = build_recipe(asked(method="taylor", pattern="neurons", sparsity=0.3, mend=mend, multiple=8))
    assert str(recipe) == "taylor on Neurons(multiple=8), per_layer" + update


def test_units_may_compete_by_what_they_cost():
    given = {"method": "taylor", "pattern": "channels", "target": "2x fewer macs"}
    assert (
        str(build_recipe(asked(**given, allocate="per-cost")))
        == "taylor on Channels(), PerCost(by='mean', power=0.5)"
    )
    assert (
        str(build_recipe(asked(**given, allocate="normalised")))
        == "taylor on Channels(), Normalised(by='mean')"
    )


def test_activation_pruning_cuts_what_lies_under_lambda():
    assert str(build_recipe(asked(method="activation", tau=0.05))) == (
        "activation on Neurons(), Threshold(tau=0.05, relative=False)"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target": "0.5 macs"}, "--target belongs to patterns of whole units, such as --pattern heads,neurons; got"),
        ({"sparsity": 0.5, "multiple": 8}, "--multiple belongs to patterns of whole units"),
        ({"sparsity": 0.5, "minimum": 2}, "--minimum belongs to patterns of whole units"),
        ({"sparsity": 0.5, "homogeneous": True}, "--homogeneous belongs to patterns of whole units"),
        ({"sparsity": 0.5, "mend": "bias"}, "--mend belongs to patterns of whole units"),
        ({"sparsity": 0.5, "multiple": 0}, "multiple: Input should be greater than or equal to 1"),
        ({"sparsity": 0.5, "mend": "glue"}, "mend: Input should be 'none', 'bias' or 'least-squares'"),
        ({"sparsity": 0.5, "method": "flap", "pattern": "weights"}, "method flap is made for whole units"),
        ({"sparsity": 0.5, "pattern": "heads", "stream": True}, "taken out of the files, not zeroed; add --shrink"),
        ({"nonzero": 5, "pattern": "heads"}, "--nonzero counts single weights; for whole units say --target"),
        ({"sparsity": 0.5, "pattern": "heads", "allocate": "per-row"}, "whole units have per-layer, global, norm"),
        ({"sparsity": 0.5, "allocate": "per-cost"}, "single weights all cost the same; say normalised or global"),
        ({"sparsity": 0.5, "pattern": "heads", "method": "best"}, "method best mends single weights while it chooses"),
        ({"sparsity": 0.5, "pattern": "heads", "method": "sparsegpt"}, "choose another --method, such as flap"),
        ({"sparsity": 0.5, "target": "0.5 macs", "pattern": "heads"}, "--sparsity and --target both say how much"),
        ({"pattern": "heads"}, "how much is to be cut?"),
        ({"target": "0.5 macs", "method": "activation", "tau": 0.1}, "decides by --tau how much is cut"),
        ({"tau": 0.1, "method": "activation", "allocate": "global"}, "decides for itself how much each layer pays"),
        ({"sparsity": 0.5, "pattern": "head"}, "pattern: 'head' is no pattern; expected weights, rows, columns"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(given, words):
    with pytest.raises(UsageError) as told:
        build_recipe(asked(**given))
    assert words in str(told.value)
