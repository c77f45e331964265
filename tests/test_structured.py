"""Targets in real units: read strictly, met within 2 %, or refused with what can be reached."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import Recipe, Threshold, evaluate, magnitude, plan, prune_, score, structured, taylor
from secateur.allocate import Normalised, PerCost, globally, per_layer
from secateur.core.example import analysis_of
from secateur.core.select import Candidates
from secateur.core.unit_masks import keep_of
from secateur.core.units import pruned_program
from secateur.errors import UsageError
from secateur.pattern import Channels, Neurons, Weights
from secateur.structured import Target, meter_of, with_costs

UNITS = Neurons() | Channels()
L2 = Recipe(score.l2, UNITS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(192, 90), nn.ReLU(), nn.Linear(90, 5),
    ).eval()  # fmt: skip


X = torch.randn(4, 3, 12, 12)


@pytest.fixture(scope="module")
def analysed():
    model = network()
    return model, analysis_of(model, X)[0]


@pytest.mark.parametrize(
    ("text", "quantity", "value", "relative"),
    [
        ("0.5 parameters", "parameters", 0.5, True),
        ("50% params", "parameters", 0.5, True),
        ("1.5M parameters", "parameters", 1.5e6, False),
        ("300M macs", "macs", 3e8, False),
        ("300 M MACs", "macs", 3e8, False),
        ("0.4 macs", "macs", 0.4, True),
        ("4x fewer macs", "macs", 0.25, True),
        ("20 MB", "bytes", 2e7, False),
        ("1,000 bytes", "bytes", 1000, False),
        ("2x smaller", "bytes", 0.5, True),
        ("2x faster", "ms", 0.5, True),
        ("12.5ms", "ms", 12.5, False),
        ("1 ms", "ms", 1, False),
    ],
)
def test_a_target_in_words(text, quantity, value, relative):
    found = Target.parse(text)
    assert (found.quantity, found.value, found.relative) == (quantity, pytest.approx(value), relative)


@pytest.mark.parametrize(
    "text", ["half", "0.5", "2x macs", "0.5 faster", "-1 macs", "3 dogs", "5% faster", "", "x"]
)
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UsageError, match=r"is not understood; expected for example '0\.5 parameters'"):
        Target.parse(text)


def test_numbers_out_of_range_are_refused():
    for text in ("0 macs", "0.5x faster"):
        with pytest.raises(UsageError, match="expected a number above 0, and a factor of at least 1"):
            Target.parse(text)
    with pytest.raises(UsageError, match="at most 1 for a fraction of the dense model"):
        Target("macs", 1.5, True)
    with pytest.raises(UsageError, match="expected more than 0"):
        Target.parse("150% macs")


@pytest.mark.parametrize("allocate", [per_layer, globally, Normalised(), PerCost()])
@pytest.mark.parametrize("text", ["0.5 parameters", "0.3 macs", "0.6 bytes", "9000 parameters"])
def test_a_target_is_met_within_two_percent(analysed, text, allocate):
    model, analysis = analysed
    pruned = deepcopy(model)
    masks = prune_(pruned, target=text, recipe=replace(L2, allocate=allocate), example=X)
    small = pruned_program(analysis, keep_of(analysis, masks))
    count = {
        "parameters": lambda net: sum(p.numel() for p in net.parameters()),
        "bytes": lambda net: 4 * sum(p.numel() for p in net.parameters()),
        "macs": lambda net: evaluate.flops(net, X)["macs"].value / len(X),
    }
    target = Target.parse(text)
    amount = count[target.quantity](small)
    wanted = target.value * (count[target.quantity](model) if target.relative else 1)
    assert abs(amount - wanted) <= 0.02 * wanted
    torch.testing.assert_close(small(X), pruned(X), rtol=1e-4, atol=1e-6)


def test_the_cost_of_a_unit_is_what_the_model_needs_less_without_it(analysed):
    model, analysis = analysed
    candidates = {units.name: Candidates((1, units.size), 1, lambda: X) for units in analysis.units}
    costs = with_costs(candidates, Target.parse("0.5 macs"), analysis)
    for units in analysis.units:
        small = pruned_program(analysis, {units.name: torch.arange(1, units.size)})
        less = evaluate.flops(model, X)["macs"].value - evaluate.flops(small, X)["macs"].value
        assert costs[units.name].cost() == less
    costs = with_costs(candidates, Target.parse("0.5 parameters"), analysis)
    small = pruned_program(analysis, {analysis.units[0].name: torch.arange(1, analysis.units[0].size)})
    assert costs[analysis.units[0].name].cost() == sum(map(torch.numel, model.parameters())) - sum(
        map(torch.numel, small.parameters())
    )


def test_per_cost_spares_what_is_cheap_to_compute(analysed):
    """The second convolution and the linear layer behind it: few places, many parameters."""
    model, analysis = analysed
    kept = {}
    for allocate in (Normalised(), PerCost()):
        masks = prune_(deepcopy(model), target="0.5 macs", recipe=replace(L2, allocate=allocate), example=X)
        kept[type(allocate)] = sum(
            map(torch.numel, pruned_program(analysis, keep_of(analysis, masks)).parameters())
        )
    assert kept[PerCost] > 1.2 * kept[Normalised]


def test_macs_are_those_of_one_row(analysed):
    model, _ = analysed
    each = evaluate.flops(model, X[:1])["macs"].value
    masks = [
        prune_(deepcopy(model), target=f"{each // 2} macs", recipe=L2, example=x) for x in (X, X[:1], X[:2])
    ]
    assert masks[0] == masks[1] == masks[2]


def test_multiples_are_kept_while_a_target_is_met(analysed):
    model, analysis = analysed
    pattern = Neurons(multiple=2) | Channels(multiple=4)
    masks = prune_(deepcopy(model), target="0.5 macs", recipe=replace(L2, pattern=pattern), example=X)
    kept = {name: len(units) for name, units in keep_of(analysis, masks).items()}
    assert all(count % (2 if "feed" in name else 4) == 0 for name, count in kept.items())


def test_a_target_that_nobody_can_meet_says_the_range(analysed):
    model, analysis = analysed
    before, whole = deepcopy(model.state_dict()), f"{analysis.parameter_count():,}"
    with pytest.raises(
        UsageError, match=rf"target of 10 parameters cannot be met within 2%: \d+ to {whole} can be"
    ):
        prune_(model, target="10 parameters", recipe=L2, example=X)
    with pytest.raises(UsageError, match=f"to {whole} can be reached in whole units, and nearest is {whole}"):
        prune_(model, target="50k parameters", recipe=L2, example=X)
    coarse = replace(L2, pattern=Channels(multiple=32))
    with pytest.raises(UsageError, match="Choose another target, more kinds of units, or a smaller multiple="):
        prune_(model, target="0.2 macs", recipe=coarse, example=X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 0.5, "recipe": L2}, "target and sparsity both say how much is cut"),
        ({"nonzero": 5, "recipe": L2}, "target and nonzero both say how much is cut"),
        ({"recipe": magnitude}, r"zeros from Weights\(\) leave every tensor as large as it was"),
        ({"recipe": replace(L2, allocate=Threshold(0.5))}, "decides how much is cut; leave target out"),
        ({"recipe": L2, "target": 0.5}, "target is 0.5; expected a text such as '0.5 parameters'"),
        ({"recipe": replace(taylor, pattern=Weights())}, "needs units that can be taken out"),
    ],
)  # fmt: skip
def test_a_target_that_does_not_fit_the_rest_is_refused(analysed, arguments, words):
    model, _ = analysed
    with pytest.raises(UsageError, match=words):
        prune_(model, **({"target": "0.5 parameters", "example": X} | arguments))


def test_a_plan_names_the_target(analysed):
    model, _ = analysed
    todo = plan(model, target="2x faster", recipe=L2, example=X)
    assert str(todo).endswith("units to 0.5000 of the dense model's ms")
    assert str(plan(model, target="12 ms", recipe=L2, example=X)).endswith("to 12.000 ms")
    assert todo.keep is None
    assert todo.sparsity is None


def test_time_is_measured_in_turns_on_programs_that_run(analysed, monkeypatch):
    model, analysis = analysed
    monkeypatch.setattr(structured, "ROUNDS", 3)
    example = analysis_of(model, X)[1]
    keep = {units.name: torch.arange(units.size // 8) for units in analysis.units}
    for text in ("5 ms", "2x faster"):
        assert meter_of(Target.parse(text), analysis, example)(keep) > 0
    with pytest.raises(UsageError, match="pass example= as an input, not an Analysis"):
        prune_(deepcopy(model), target="2x faster", recipe=L2, example=analysis)


def test_the_search_for_a_time_follows_the_clock(analysed, monkeypatch):
    """With a clock that is exact: time in proportion to the parameters that are left."""
    model, analysis = analysed
    whole = analysis.parameter_count()

    def clock(target, found, example):
        return lambda keep: found.parameter_count(keep) / whole

    monkeypatch.setattr(structured, "_stopwatch", clock)
    masks = prune_(deepcopy(model), target="2x faster", recipe=L2, example=X)
    left = analysis.parameter_count(keep_of(analysis, masks)) / whole
    assert left == pytest.approx(0.5, rel=0.02)
