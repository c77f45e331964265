"""Patterns of coupled units: which axes they choose, how they are joined, and which columns a unit feeds."""

import itertools

import pytest
import torch
from torch import nn

from secateur import score
from secateur.core.example import analysis_of
from secateur.core.site import look_of
from secateur.core.where import layers
from secateur.errors import UsageError
from secateur.pattern import (
    Axes,
    Channels,
    Experts,
    Heads,
    Hidden,
    KVGroups,
    Neurons,
    QueryHeads,
    Weights,
)
from secateur.pattern.axis import columns_of

WEIGHTS = look_of(score.magnitude, ())


class Attention(nn.Module):
    """Four query heads that share two heads of keys and values, and a feed-forward layer."""

    def __init__(self, width=12, heads=4, groups=2, size=3):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.q, self.k = nn.Linear(width, heads * size), nn.Linear(width, groups * size)
        self.v, self.o = nn.Linear(width, groups * size), nn.Linear(heads * size, width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k, v = (f(x).view(b, t, self.groups, self.size).transpose(1, 2) for f in (self.k, self.v))
        k, v = (each.repeat_interleave(self.heads // self.groups, 1) for each in (k, v))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, -1))
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.fixture(scope="module")
def attention():
    model = Attention()
    return model, analysis_of(model, torch.randn(2, 7, 12))[0]


@pytest.fixture(scope="module")
def network():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6 * 16, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    return model, analysis_of(model, torch.randn(2, 1, 8, 8))[0]


def names(pattern, found) -> dict[str, int]:
    model, analysis = found
    sites, _ = pattern.sites(model, analysis, WEIGHTS)
    return {site.name: site.shape[1] for site in sites}


def test_every_pattern_chooses_its_kind(attention):
    assert names(Heads(), attention) == {"KV groups of q, k, v and 1 more": 2}
    assert names(Heads(), attention) == names(KVGroups(), attention)
    assert names(QueryHeads(), attention) == {"query heads of q, o": 2}
    assert names(Neurons(), attention) == {"feed-forward units of up, down": 10}
    both = names(Neurons() | Heads(), attention)
    assert (
        both == names(Heads() | Neurons(), attention) == names(Heads(), attention) | names(Neurons(), attention)
    )
    assert names(Axes("v dimension"), attention) == {"v dimensions of v, o": 3}
    assert names(Axes("feed-forward*", "qk dimension"), attention).keys() == {
        "qk dimensions of q, k", "feed-forward units of up, down",
    }  # fmt: skip


def test_channels_and_what_reads_them(network):
    found = names(Channels(), network)
    assert sorted(found.values()) == [2, 2, 3]
    assert names(Neurons(), network) == {"feed-forward units of 6,8": 8}


def test_of_two_patterns_that_choose_an_axis_the_first_counts(attention):
    model, analysis = attention
    (site,), _ = (Neurons(multiple=4) | Neurons(minimum=3)).sites(model, analysis, WEIGHTS)
    assert (site.step, site.least) == (4, 1)


def test_multiples_are_of_the_tensors_widths(attention):
    model, analysis = attention
    (site,), _ = Heads(multiple=6).sites(model, analysis, WEIGHTS)
    assert site.step == 2  # a group has 6 rows of q and 3 of k
    (site,), _ = Heads(multiple=3).sites(model, analysis, WEIGHTS)
    assert site.step == 1
    (site,), _ = QueryHeads(multiple=8).sites(model, analysis, WEIGHTS)
    assert site.step == 4


def test_equal_widths_are_asked_of_axes_of_one_kind_and_size(attention):
    model, analysis = attention
    sites, _ = (Neurons(homogeneous=True) | Heads()).sites(model, analysis, WEIGHTS)
    assert {site.alike for site in sites} == {"feed-forward unit of 10", ""}


def test_what_a_unit_holds(attention):
    model, analysis = attention
    (site,), _ = Neurons().sites(model, analysis, WEIGHTS)
    assert site.cells == 12 + 1 + 12
    assert set(site.parameters) == {"up.weight", "up.bias", "down.weight"}
    (site,), _ = Heads().sites(model, analysis, WEIGHTS)
    assert site.cells == 2 * 3 * (12 + 1) + 2 * 3 * (12 + 1) + 6 * 12


def test_an_axis_through_a_barred_layer_is_left_out(attention):
    model, analysis = attention
    pattern = Heads() | Neurons()
    sites, left_out = pattern.sites(model, analysis, WEIGHTS, barred={"up.weight"})
    assert [site.name for site in sites] == ["KV groups of q, k, v and 1 more"]
    assert left_out == (
        ("feed-forward units of up, down", "runs through up.weight, which only= or skip= leaves out"),
    )
    with pytest.raises(
        UsageError, match=r"no axis is left to prune: feed-forward units of up, down runs through"
    ):
        Neurons().sites(model, analysis, WEIGHTS, barred={"up.weight"})


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Neurons(), "Neurons()"),
        (
            Heads(2) | Neurons(multiple=8, homogeneous=True),
            "Heads(minimum=2) | Neurons(multiple=8, homogeneous=True)",
        ),
        (Axes("hidden", "heads*", over="readers"), "Axes('hidden', 'heads*', over='readers')"),
        (Experts() | (Hidden() | KVGroups()), "Experts() | Hidden() | KVGroups()"),
    ],
)
def test_patterns_are_written_as_they_are_made(pattern, text):
    assert repr(pattern) == text
    assert pattern == eval(text)
    assert hash(pattern) == hash(eval(text))


def columns(model, analysis, axis, parameter):
    """The columns of one member, from the analysis."""
    (member,) = [m for m in analysis[axis].members if m.name == parameter]
    (layer,) = [layer for layer in layers(model) if layer.name == parameter]
    found = columns_of(layer, member)
    return None if found is None else found.tolist()


def test_columns_of_linear_layers(attention):
    model, analysis = attention
    axis = "feed-forward units of up, down"
    assert columns(model, analysis, axis, "up.weight") is None
    assert columns(model, analysis, axis, "down.weight") == [[unit] for unit in range(10)]
    groups = "KV groups of q, k, v and 1 more"
    assert columns(model, analysis, groups, "o.weight") == [list(range(6)), list(range(6, 12))]
    assert columns(model, analysis, groups, "q.weight") is None


def test_columns_of_convolutions(network):
    model, analysis = network
    flat = next(units.name for units in analysis.units if "6.weight" in {m.name for m in units.members} and
                units.kind == "channel")  # fmt: skip
    found = columns(model, analysis, flat, "6.weight")
    units = analysis[flat]
    assert sorted(itertools.chain(*found)) == list(range(96))
    for unit, mine in enumerate(found):
        (member,) = [m for m in units.members if m.name == "6.weight"]
        assert sorted(mine) == sorted(member.indices[unit].tolist())
    depthwise = columns(model, analysis, flat, "4.weight")
    assert sorted(itertools.chain(*depthwise)) == list(
        range(6 * 9)
    )  # a part for every channel, nine columns each


def test_columns_of_transposed_layers():
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    del transformers
    model = nn.Sequential(Conv1D(8, 3), nn.ReLU(), Conv1D(2, 8))
    analysis, _ = analysis_of(model, torch.randn(4, 3))
    (units,) = analysis.units
    assert columns(model, analysis, units.name, "0.weight") is None
    assert columns(model, analysis, units.name, "2.weight") == [[unit] for unit in range(8)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Neurons(minimum=0), "minimum is 0; at least 1 unit has to stay"),
        (lambda: Neurons(multiple=0), "multiple is 0; expected a width of at least 1"),
        (lambda: Heads(over="both"), "over is 'both'; expected 'all', 'readers' or 'writers'"),
        (Axes, "names no axis; give kinds or globs"),
        (lambda: Heads() | Weights(), "cannot be joined with Heads"),
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused(make, words):
    with pytest.raises((UsageError, TypeError), match=words):
        make()


def test_a_kind_that_the_model_has_not_is_said_with_those_it_has(attention, network):
    model, analysis = attention
    with pytest.raises(
        UsageError, match=r"Channels\(\): the model has no axis of kind channel; it has axes of kind KV"
    ):
        Channels().sites(model, analysis, WEIGHTS)
    with pytest.raises(
        UsageError, match=r"Axes\('v dimensoin'\) matches none of the 5 axes; nearest: v dimension"
    ):
        Axes("v dimensoin").sites(model, analysis, WEIGHTS)
    with pytest.raises(UsageError, match="minimum=11 is more than its 10 units"):
        Neurons(minimum=11).sites(model, analysis, WEIGHTS)
    linear = nn.Linear(3, 2)
    with pytest.raises(UsageError, match=r"it has no prunable axis; frozen are .*an output of the model"):
        Neurons().sites(linear, analysis_of(linear, torch.randn(4, 3))[0], WEIGHTS)


def test_a_score_that_finds_nothing_to_look_at_is_refused(attention):
    model, analysis = attention
    with pytest.raises(
        UsageError, match="qk dimensions of q, k: the score looks at the inputs of layers, and no"
    ):
        Axes("qk dimension").sites(model, analysis, look_of(score.flap, ("input_variance",)))
    with pytest.raises(UsageError, match="weights of a batch norm, and none lies on this axis"):
        Neurons().sites(model, analysis, look_of(score.slimming, ()))
    with pytest.raises(UsageError, match="weights of its readers, and it has none"):
        Axes("qk dimension", over="readers").sites(model, analysis, WEIGHTS)
