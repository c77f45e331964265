"""prune_: the laws that hold for every recipe, and brute force where all masks can be tried."""

from copy import deepcopy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import secateur.recipes as recipes
from secateur import (
    NM,
    Blocks,
    Columns,
    Masks,
    Recipe,
    Rows,
    Weights,
    global_magnitude,
    globally,
    magnitude,
    per_layer,
    per_row,
    percentile,
    plan,
    prune_,
    random,
    ria,
    score,
    sparsity,
    threshold,
    undo_,
    wanda,
)
from secateur.errors import NotPrunedWarning
from secateur.pattern import Neurons
from secateur.recipes import METHODS

SPARSITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.29, 0.5, 1.0]))
DRAWS = [torch.Generator().manual_seed(seed) for seed in range(3)]
DATA = [(torch.randn(7, 8, generator=draw), torch.randint(4, (7,), generator=draw)) for draw in DRAWS]
# every recipe whose units are single weights, whose sparsity is asked for, and that leaves kept weights alone
FINE = {
    **{
        name: recipe
        for name, recipe in METHODS.items()
        if recipe.update is None and recipe.pattern == Weights()
    },
    "global wanda": replace(wanda, allocate=globally),
    "layer wanda": replace(wanda, allocate=per_layer),
    "row magnitude": replace(magnitude, allocate=per_row),
    "row ria": replace(ria, allocate=per_row),
}
COARSE = {
    "blocks": replace(magnitude, pattern=Blocks(2, 2)),
    "row blocks": replace(wanda, pattern=Blocks(4, 1)),
    "global blocks": replace(global_magnitude, pattern=Blocks(2, 4)),
    "rows": replace(magnitude, pattern=Rows()),
    "global rows": replace(global_magnitude, pattern=Rows()),
    "columns": replace(wanda, pattern=Columns(), allocate=per_layer),
    "global columns": replace(global_magnitude, pattern=Columns()),
}
EVERY = {**FINE, **COARSE}


def network(seed: int = 0, **levels: int) -> nn.Sequential:
    """Three layers of 8, 12 and 4 outputs; with `levels`, weights of so few values that most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        if levels:
            parameter.data = (parameter.data * 2).round().clamp(-2, 2) + 0.5
    return model


def pruned(recipe, amount=None, seed=0, **options):
    """The masks of a fresh network and the network."""
    model = network(seed)
    return prune_(model, amount, recipe, data=DATA, **options), model


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() == 2}


@pytest.mark.parametrize("name", FINE)
@settings(max_examples=3)
@given(SPARSITIES, st.integers(0, 9))
def test_the_count_is_exact(name, amount, seed):
    """Traps 1 and 3: neither one too few nor one too many, at 0 and at 1 too."""
    masks, model = pruned(FINE[name], amount, seed)
    size = 8 * 12 + 12 * 8 + 8 * 4
    assert (masks.size, masks.zeros) == (size, round(size * amount))
    assert sparsity(model).prunable.zeros == round(size * amount)


@pytest.mark.parametrize("name", COARSE)
@settings(max_examples=3)
@given(SPARSITIES)
def test_the_count_of_larger_units_is_exact_within_half_a_unit(name, amount):
    masks, _ = pruned(COARSE[name], amount)
    assert 2 * abs(masks.zeros - round(masks.size * amount)) <= 12


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=3)
@given(SPARSITIES, st.booleans())
def test_masks_say_where_the_zeros_are_and_all_else_keeps_its_bits(name, amount, tied):
    model = network(levels=5) if tied else network()
    before = deepcopy(model.state_dict())
    masks = prune_(model, amount, EVERY[name], data=DATA)
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]
    for key, value in model.state_dict().items():
        if key not in masks:
            assert torch.equal(value, before[key])
            continue
        assert masks[key].shape == value.shape
        assert torch.equal(value == 0, ~masks[key])  # no weight was zero by chance
        assert not bool(torch.signbit(value[~masks[key]]).any())
        assert torch.equal(value[masks[key]], before[key][masks[key]])


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=3)
@given(st.tuples(SPARSITIES, SPARSITIES).map(sorted), st.booleans())
def test_a_higher_sparsity_prunes_more_of_the_same(name, amounts, tied):
    models = [network(levels=5) if tied else network() for _ in amounts]
    low, high = (
        prune_(model, amount, EVERY[name], data=DATA) for model, amount in zip(models, amounts, strict=True)
    )
    assert all(not bool((high[key] & ~low[key]).any()) for key in low)


@pytest.mark.parametrize("name", FINE)
@settings(max_examples=3)
@given(SPARSITIES)
def test_pruning_again_to_the_same_sparsity_changes_nothing(name, amount):
    masks, model = pruned(FINE[name], amount)
    state = deepcopy(model.state_dict())
    again = prune_(model, amount, FINE[name], data=DATA, masks=masks)
    assert again == masks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@settings(max_examples=10)
@given(SPARSITIES)
@pytest.mark.thorough
def test_magnitude_needs_no_masks_to_find_its_zeros_again(amount):
    for recipe in (magnitude, global_magnitude, replace(magnitude, allocate=per_row)):
        masks, model = pruned(recipe, amount)
        assert prune_(model, amount, recipe) == masks


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=3)
@given(st.tuples(SPARSITIES, SPARSITIES).map(sorted))
@example([0.5, 0.5])
@pytest.mark.thorough
def test_what_earlier_masks_prune_stays_pruned_and_counts(name, amounts):
    """Trap 7: sparsity is of all weights, not of those that are left; weights that grew back are no exception."""
    masks, model = pruned(EVERY[name], amounts[0])
    direct, _ = pruned(EVERY[name], amounts[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(parameter == 0, 99.0, parameter))
    further = prune_(model, amounts[1], EVERY[name], data=DATA, masks=masks)
    assert further.zeros == direct.zeros
    assert all(not bool((further[key] & ~masks[key]).any()) for key in masks)
    assert all(torch.equal(zero, ~further[key]) for key, zero in zeros(model).items())


def test_magnitude_in_two_steps_is_magnitude_in_one():
    for recipe in (magnitude, global_magnitude):
        first, model = pruned(recipe, 0.4)
        assert prune_(model, 0.7, recipe, masks=first) == pruned(recipe, 0.7)[0]


def test_twelve_equal_weights_lose_exactly_eight_and_the_first_ones():
    """Trap 2: `score <= threshold` would take all twelve."""
    for recipe in (magnitude, global_magnitude, replace(magnitude, allocate=per_row)):
        layer = nn.Linear(12, 1)
        nn.init.constant_(layer.weight, -0.5)
        masks = prune_(layer, 8 / 12, recipe)
        assert masks["weight"].tolist() == [[False] * 8 + [True] * 4]


@pytest.mark.parametrize(("size", "amount", "cut"), [(100, 0.29, 29), (1000, 0.57, 570), (10, 0.7, 7)])
def test_a_whole_product_is_not_one_short(size, amount, cut):
    """Trap 1: int(100 * 0.29) is 28."""
    assert prune_(nn.Linear(size, 1), amount).zeros == cut


def test_rows_that_cannot_be_cut_evenly_still_make_the_total():
    layer = nn.Linear(7, 6)
    masks = prune_(layer, 0.5, replace(magnitude, allocate=per_row))
    assert masks["weight"].sum(1).tolist() == [4, 4, 4, 3, 3, 3]


@settings(max_examples=10)
@given(st.integers(0, 8), st.integers(0, 30))
def test_wanda_keeps_the_best_of_all_subsets_of_a_row_of_eight(count, seed):
    layer, x = nn.Linear(8, 3), torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    layer.weight.data = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed + 100))
    worth = layer.weight.detach().double().abs() * x.double().norm(dim=0)
    masks = prune_(layer, 1 - count / 8, wanda, data=[x])
    for row, mask in zip(worth.tolist(), masks["weight"], strict=True):
        best = max(combinations(range(8), count), key=lambda kept: sum(row[j] for j in kept))
        assert tuple(mask.nonzero()[:, 0].tolist()) == best


@pytest.mark.parametrize("score", [random.score, wanda.score], ids=["random", "wanda"])
def test_the_number_of_nonzeros_is_exact_although_zeros_are_not_what_the_score_likes_least(score):
    model = network()
    model[0].weight.data[3:9] = 0
    data = [
        (torch.nn.functional.pad(x[:, :5], (0, 3)), y) for x, y in DATA
    ]  # dead inputs, so that scores tie at zero
    for nonzero in (24 + 160, 24 + 101, 24):  # 24 biases
        prune_(model, nonzero=nonzero, recipe=Recipe(score, allocate=globally), data=data)
        assert sum(int(torch.count_nonzero(p)) for p in model.parameters()) == nonzero


@settings(max_examples=10)
@given(st.integers(0, 8), st.integers(0, 30))
def test_global_magnitude_keeps_the_best_of_all_subsets_of_two_layers(count, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    size = torch.cat([model[0].weight, model[1].weight]).detach().abs().flatten().tolist()
    best = max(combinations(range(8), count), key=lambda kept: sum(size[j] for j in kept))
    masks = prune_(model, nonzero=count + 4, recipe=global_magnitude)
    kept = torch.cat([masks["0.weight"], masks["1.weight"]]).flatten().nonzero()[:, 0]
    assert tuple(kept.tolist()) == best


@settings(max_examples=10)
@given(st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 3), (1, 2)]), st.integers(0, 30))
def test_n_of_m_keeps_the_best_of_all_subsets_of_every_group(nm, seed):
    n, m = nm
    layer, x = nn.Linear(24, 3), torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    worth = (layer.weight.detach().double().abs() * x.double().norm(dim=0)).reshape(-1, m)
    masks = prune_(layer, recipe=replace(wanda, pattern=NM(n, m)), data=[x])
    for group, mask in zip(worth.tolist(), masks["weight"].reshape(-1, m), strict=True):
        best = max(combinations(range(m), n), key=lambda kept: sum(group[j] for j in kept))
        assert tuple(mask.nonzero()[:, 0].tolist()) == best


def test_n_of_m_takes_its_sparsity_from_the_pattern():
    recipe = replace(magnitude, pattern=NM(2, 4))
    assert prune_(network(), recipe=recipe) == prune_(network(), 0.5, recipe)
    assert plan(network(), recipe=recipe).keep == 112


@settings(max_examples=10)
@given(st.floats(0.1, 2), st.integers(0, 9))
def test_a_threshold_cuts_what_lies_at_or_below_it(tau, seed):
    model = network(seed)
    before = {name: weight.detach().abs() for name, weight in model.named_parameters() if weight.dim() == 2}
    masks = prune_(model, recipe=threshold(tau))
    assert all(torch.equal(masks[name], size > tau) for name, size in before.items())


def test_a_relative_threshold_counts_in_standard_deviations_of_each_layer():
    model = network()
    model[0].weight.data *= 100
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.dim() == 2}
    masks = prune_(model, recipe=threshold(0.7, relative=True))
    for name, weight in before.items():
        assert torch.equal(masks[name], weight.abs() > 0.7 * weight.square().mean().sqrt())


@settings(max_examples=10)
@given(st.floats(1, 100))
def test_a_percentile_cuts_that_much_of_every_layer(q):
    masks = prune_(network(), recipe=percentile(q))
    assert masks.zeros == round(224 * q / 100)
    assert all(abs(int((~mask).sum()) - mask.numel() * q / 100) <= 1 for mask in masks.values())


@settings(max_examples=10)
@given(SPARSITIES)
def test_undoing_gives_back_every_bit(amount):
    model = network()
    model[0].weight.data[0, :4] = torch.tensor([0.0, -0.0, 1e-45, -3.0])
    before = {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}
    masks = prune_(model, amount, keep_originals=True)
    undo_(model, masks)
    assert all(torch.equal(p.view(torch.int32), before[name]) for name, p in model.named_parameters())


def test_originals_are_copies_and_are_kept_only_when_asked_for():
    masks, model = pruned(magnitude, 0.5, keep_originals=True)
    assert masks.originals["0.weight"].data_ptr() != model[0].weight.data_ptr()
    assert not pruned(magnitude, 0.5)[0].originals


def test_a_weight_that_is_zero_by_chance_is_not_a_pruned_weight():
    """Trap 6: the mask says what is pruned, not the value."""
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert prune_(layer, 0.0)["weight"].all()
    assert prune_(layer, 0.5, Recipe(lambda weight: 1 / (1 + weight.abs())))["weight"].tolist() == [
        [True, False, False, True]
    ]


def test_random_depends_on_the_seed_and_the_layer_alone():
    masks = pruned(random, 0.5, seed=1)[0]
    assert masks == pruned(random, 0.5, seed=2)[0]  # other weights
    other = prune_(network(), 0.5, random, seed=1)
    assert other != masks
    alone = prune_(network(), 0.5, random, only="2")
    assert torch.equal(alone["2.weight"], masks["2.weight"])
    twins = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    masks = prune_(twins, 0.5, random)
    assert not torch.equal(masks["0.weight"], masks["1.weight"])


def test_two_calls_share_nothing():
    """Trap 8: no default is an object that a call could change, and sparsity is what is removed in every call."""
    assert prune_(network(), 0.3).sparsity == pytest.approx(0.3, abs=0.003)
    assert prune_(network(), 0.3) == prune_(network(), 0.3)
    with pytest.raises(AttributeError):
        magnitude.allocate = globally
    assert recipes.magnitude == Recipe(magnitude.score)
    assert hash(replace(wanda, pattern=NM(2, 4))) == hash(replace(wanda, pattern=NM(2, 4)))


def test_a_plan_says_what_will_happen():
    todo = plan(network(), 0.25, wanda, skip="4")
    assert [layer.name for layer in todo.layers] == ["0.weight", "2.weight"]
    assert [(layer.name, why) for layer, why in todo.left_out] == [("4.weight", 'skipped by skip="4"')]
    assert (todo.size, todo.keep, todo.sparsity, todo.statistics) == (192, 144, 0.25, ("input_norm",))
    assert str(todo) == "wanda on Weights(), per_row: 2 layers with 192 weights to sparsity 0.2500"
    decided = plan(network(), recipe=threshold(0.4))
    assert (decided.keep, decided.sparsity) == (None, None)
    assert str(decided).endswith("3 layers with 224 weights as much as the threshold says")


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_touches_nothing_and_keeps_its_word(name):
    model = network()
    before = deepcopy(model.state_dict())
    todo = plan(model, 0.5, EVERY[name])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    masks = prune_(model, 0.5, EVERY[name], data=DATA)
    assert list(masks) == [layer.name for layer in todo.layers]
    assert abs(masks.nonzeros - todo.keep) < 12


def test_masks_are_masks():
    assert isinstance(pruned(magnitude, 0.5)[0], Masks)
    assert pruned(magnitude, 0.5)[0].sparsity == 0.5


def test_a_layer_whose_weight_is_computed_is_not_left_out_in_silence(capsys):
    from secateur.results import layer_lines
    from secateur.terminal import show_layers

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    (line,) = layer_lines(plan(model, 0.5))
    assert line.startswith("0.weight: is computed from other parameters; make it plain first")
    show_layers(model, (), ())
    assert f"left out {line}" in capsys.readouterr().out


def with_norm(*layers: int) -> nn.Sequential:
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(6, 6), nn.ReLU())))
    for layer in layers:
        nn.utils.parametrizations.weight_norm(model[layer])
    return model


def test_a_computed_weight_is_told_where_prune_was_called():
    model = with_norm(0, 2)
    model[4].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.warns(NotPrunedWarning) as told:
        assert set(prune_(model, 0.5)) == {"6.weight"}
    (one,) = told
    assert str(one.message) == (
        "not pruned: 0.weight, 2.weight: is computed from other parameters; make it plain first "
        "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove or remove_weight_norm); "
        "4.weight: holds torch.int8, not floating-point weights; or name what is to stay in skip="
    )
    assert one.filename == __file__


@pytest.mark.parametrize(
    "chosen",
    [
        {"skip": "0,2"},
        {"skip": ["0", "2.weight"]},
        {"skip": lambda path, module: path in "02"},
        {"only": "4,6"},
        {"only": lambda path, module: path == "6"},
    ],
)
def test_a_computed_weight_that_is_left_out_on_purpose_is_not_told(chosen):
    prune_(with_norm(0, 2), 0.5, **chosen)  # warnings are errors here


@pytest.mark.parametrize(
    "chosen", [{"only": "all"}, {"only": "*"}, {"only": nn.Linear}, {"only": nn.Sequential}]
)
def test_a_computed_weight_among_those_asked_for_is_told(chosen):
    with pytest.warns(NotPrunedWarning, match=r"not pruned: 0\.weight: is computed"):
        prune_(with_norm(0), 0.5, **chosen)


def test_units_beside_a_computed_weight_are_told_too():
    recipe = Recipe(score.l2, Neurons())
    with pytest.warns(NotPrunedWarning, match=r"not pruned: 0\.weight"):
        masks = prune_(with_norm(0), 0.5, recipe, example=torch.randn(2, 6))
    assert "4.weight" in masks
    prune_(with_norm(0), 0.5, recipe, example=torch.randn(2, 6), skip="0")
