"""Every request that prune_ refuses: what it says, and that no bit of the model changes."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import (
    NM,
    Blocks,
    Masks,
    Recipe,
    Rows,
    Threshold,
    global_magnitude,
    globally,
    magnitude,
    per_row,
    percentile,
    plan,
    prune_,
    random,
    threshold,
    wanda,
)
from secateur.core.counts import distinct_parameters
from secateur.errors import NumericError, UsageError

NAN, INF = float("nan"), float("inf")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def misspelt(weight, input_nrom):
    return weight.abs() * input_nrom


def too_few(layers, keep):
    return {name: torch.tensor([0]) for name in layers}


BLOCKS = replace(magnitude, pattern=Blocks(2, 2))

# what is asked -> what is said
REFUSED = {
    "a name for a recipe": (
        {"sparsity": 0.5, "recipe": "wnda"},
        "recipe is 'wnda'; expected a Recipe such as secateur.wanda; nearest: wanda",
    ),
    "a function for a recipe": (
        {"sparsity": 0.5, "recipe": len},
        "recipe is <built-in function len>; expected a Recipe such as secateur.wanda",
    ),
    "a recipe for a sparsity": (
        {"sparsity": wanda},
        "sparsity is a recipe, which goes to recipe=; expected a number in [0, 1]",
    ),
    "text for a sparsity": ({"sparsity": "0.5"}, "sparsity is '0.5'; expected a number in [0, 1]"),
    "percent": ({"sparsity": 50}, "sparsity 50 is not in [0, 1]. Did you mean 0.5?"),
    "negative": ({"sparsity": -0.1}, "sparsity -0.1 is not in [0, 1]."),
    "too much": ({"sparsity": 101.0}, "sparsity 101 is not in [0, 1]."),
    "nan": ({"sparsity": NAN}, "sparsity nan is not in [0, 1]."),
    "no sparsity": ({}, "no sparsity given; say how many of the weights are to become zero, e.g. 0.5"),
    "half a parameter": ({"nonzero": 10.5}, "nonzero is 10.5; expected a whole number of parameters"),
    "infinitely many": ({"nonzero": INF}, "nonzero is inf; expected a whole number of parameters"),
    "text for a number": ({"nonzero": "10"}, "nonzero is '10'; expected a whole number of parameters"),
    "both": (
        {"nonzero": 10, "sparsity": 0.5},
        "nonzero fixes the count; give it without a sparsity and with a recipe that can follow it",
    ),
    "nonzero and threshold": (
        {"nonzero": 10, "recipe": threshold(0.1)},
        "nonzero fixes the count; give it without a sparsity and with a recipe that can follow it",
    ),
    "nonzero and n:m": (
        {"nonzero": 10, "recipe": replace(magnitude, pattern=NM(1, 2))},
        "nonzero fixes the count; give it without a sparsity and with a recipe that can follow it",
    ),
    "nonzero in blocks": (
        {"nonzero": 40, "recipe": BLOCKS},
        "an exact number of non-zeros needs single weights as units, got Blocks(rows=2, columns=2)",
    ),
    "fewer non-zeros than the rest has": (
        {"nonzero": 11},
        "11 non-zero parameters cannot be reached: the chosen layers hold 80 of the model's 92, so 12 to 92 are "
        "possible. Choose other layers or another number",
    ),
    "more non-zeros than there are": (
        {"nonzero": 93},
        "93 non-zero parameters cannot be reached: the chosen layers hold 80 of the model's 92, so 12 to 92 are "
        "possible. Choose other layers or another number",
    ),
    "negative non-zeros": (
        {"nonzero": -1, "only": "0"},
        "-1 non-zero parameters cannot be reached: the chosen layers hold 48 of the model's 92, so 44 to 92 are "
        "possible. Choose other layers or another number",
    ),
    "n:m and another sparsity": (
        {"sparsity": 0.7, "recipe": replace(magnitude, pattern=NM(1, 2))},
        "NM(n=1, m=2) fixes the sparsity at 0.5, got 0.7; leave the sparsity out",
    ),
    "n:m that does not fit": (
        {"recipe": replace(magnitude, pattern=NM(2, 4))},
        '0: 6 input columns cannot be cut 2:4 (6 % 4 = 2). Skip it with skip="0" or choose another pattern',
    ),
    "blocks that do not fit": (
        {"sparsity": 0.5, "recipe": replace(magnitude, pattern=Blocks(8, 1))},
        '2: 4 output rows cannot be cut blocks of 8 x 1 (4 % 8 = 4). Skip it with skip="2" or choose another pattern',
    ),
    "threshold and sparsity": (
        {"sparsity": 0.5, "recipe": threshold(0.1)},
        "Threshold(tau=0.1, relative=False) decides how much is cut, got sparsity 0.5 as well; leave it out",
    ),
    "a threshold that cuts nothing": (
        {"recipe": threshold(0.0)},
        "magnitude on Weights(), Threshold(tau=0.0, relative=False): no weight is pruned by it; every score lies "
        "above. Raise it",
    ),
    "a percentile that cuts nothing": (
        {"recipe": percentile(0.0)},
        "magnitude on Weights(), Percentile(q=0.0, scope='layer'): no weight is pruned by it; every score lies "
        "above. Raise it",
    ),
    "a threshold for no layer": (
        {"recipe": Recipe(magnitude.score, allocate=Threshold({"3.*": 0.1, "*": 0.2}))},
        "the threshold for '3.*' matches none of the 2 layers; known: 0.weight, 2.weight",
    ),
    "an unknown statistic": (
        {"sparsity": 0.5, "recipe": Recipe(misspelt)},
        "score 'misspelt' asks for 'input_nrom', which is no known statistic; nearest: input_norm",
    ),
    "a score without names": (
        {"sparsity": 0.5, "recipe": Recipe(torch.abs)},
        "is no function of (weight, <statistics by name>)",
    ),
    "a score of another shape": (
        {"sparsity": 0.5, "recipe": Recipe(lambda weight: weight.abs().sum(0))},
        "0.weight: score '<lambda>' is to return one number for each of the weights, shape (8, 6), got (6,)",
    ),
    "a score that is none": (
        {"sparsity": 0.5, "recipe": Recipe(lambda weight: None)},
        "0.weight: score '<lambda>' is to return one number for each of the weights, shape (8, 6), got NoneType",
    ),
    "no data": ({"sparsity": 0.5, "recipe": wanda}, "wanda needs calibration data for input_norm; pass data="),
    "empty data": (
        {"sparsity": 0.5, "recipe": wanda, "data": []},
        "data holds no batch; calibration needs at least one",
    ),
    "one batch for data": (
        {"sparsity": 0.5, "recipe": wanda, "data": {"input": torch.ones(2, 6)}},
        "data is one batch; expected an iterable of batches, such as [batch]",
    ),
    "an allocator that misses": (
        {"sparsity": 0.5, "recipe": Recipe(magnitude.score, allocate=too_few)},
        "magnitude on Weights(), too_few: sparsity 0.5000 cannot be reached in whole units; nearest 1.0000",
    ),
    "masks of a layer that is skipped": (
        {"sparsity": 0.5, "skip": "0", "masks": Masks({"0.weight": torch.ones(8, 6, dtype=torch.bool)})},
        "the earlier masks prune 0.weight, which is not chosen now; choose it too, or leave masks out",
    ),
    "masks of another model": (
        {"sparsity": 0.5, "masks": Masks({"0.weight": torch.ones(8, 7, dtype=torch.bool)})},
        "mask of 0.weight: expected shape (8, 6), got (8, 7); these masks belong to another model",
    ),
    "less than the earlier masks": (
        {"sparsity": 0.5, "masks": Masks({"0.weight": torch.zeros(8, 6, dtype=torch.bool)})},
        "0.weight: 24 of the weights that the earlier masks prune would be kept again; ask for a higher sparsity "
        "with the pattern and allocation of before, or leave masks out",
    ),
    "units that earlier masks cut in part": (
        {
            "sparsity": 0.25,
            "recipe": replace(magnitude, pattern=Rows()),
            "masks": Masks({"0.weight": torch.eye(8, 6, dtype=torch.bool).logical_not()}),
        },
        "of the weights that the earlier masks prune would be kept again; ask for a higher sparsity with the pattern",
    ),
    "no layer of that name": (
        {"sparsity": 0.5, "only": "encoder.*"},
        'only="encoder.*" matches none of the 2 prunable layers',
    ),
}

# messages with an address, a list that grows with the package, or a count that is beside the point
SAID_IN_PART = {
    "a name for a recipe",
    "an unknown statistic",
    "a score without names",
    "units that earlier masks cut in part",
    "no layer of that name",
}
# what only scores and data can show
SEEN_LATER = {
    "no data",
    "a threshold that cuts nothing",
    "a percentile that cuts nothing",
    "a threshold for no layer",
    "an allocator that misses",
    "a score of another shape",
    "a score that is none",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(case):
    options, message = REFUSED[case]
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        prune_(model, **options)
    assert message in str(error.value)
    assert message == str(error.value) or case in SAID_IN_PART
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "case", [case for case, (options, _) in REFUSED.items() if not {"data", "masks"} & set(options)]
)
def test_a_plan_refuses_what_needs_no_data_to_be_seen(case):
    """A dry run has to find them; what only scores or data can show is found when pruning."""
    options, message = REFUSED[case]
    if case in SEEN_LATER:
        plan(network(), **options)
        return
    with pytest.raises(UsageError) as error:
        plan(network(), **options)
    assert message in str(error.value)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "recipe", [magnitude, global_magnitude, random, wanda, replace(magnitude, pattern=Rows())], ids=str
)
def test_an_ill_weight_is_named_by_its_layer(bad, recipe):
    model = network()
    model[2].weight.data[1, 3] = bad
    before = {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}
    with pytest.raises(NumericError) as error:
        prune_(model, 0.5, recipe, data=[torch.ones(2, 6)])
    expected = "2.weight: NaN or Inf among its weights, read as float32; it cannot be pruned. Mend it, "
    assert str(error.value).startswith(expected)
    assert all(torch.equal(p.view(torch.int32), before[name]) for name, p in model.named_parameters())


def test_an_ill_weight_of_a_layer_that_is_left_alone_is_no_obstacle_without_data():
    model = network()
    model[0].weight.data[1, 3] = NAN
    assert list(prune_(model, 0.5, skip="0")) == ["2.weight"]


def test_ill_activations_are_named_by_the_layer_that_they_enter():
    model = network()
    model[0].bias.data[0] = INF
    with pytest.raises(
        NumericError, match=r"^2\.weight: NaN or Inf among its input activations; look at the data"
    ):
        prune_(model, 0.5, wanda, data=[torch.ones(2, 6)])
    with pytest.raises(NumericError, match=r"^0\.weight: NaN or Inf among its input activations"):
        prune_(network(), 0.5, wanda, data=[torch.full((2, 6), NAN)])


@pytest.mark.parametrize(
    "recipe", [Recipe(lambda weight: weight.log()), Recipe(lambda weight: weight / 0, allocate=globally)]
)
def test_ill_scores_are_named_by_their_layer(recipe):
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(NumericError) as error:
        prune_(model, 0.5, recipe)
    assert str(error.value) == "0.weight: NaN or Inf among its scores; look at its weights and at the data"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_equal_shares_that_would_keep_zeros_are_no_exact_number_of_nonzeros():
    model = network()
    model[0].weight.data[:6] = 0
    before = deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        prune_(model, nonzero=12 + 40)
    assert str(error.value) == (
        "0.weight: 12 of the weights it would keep are already zero, so 52 non-zeros cannot be reached with equal "
        "shares; use a global allocation"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune_(model, nonzero=12 + 40, recipe=global_magnitude)
    assert sum(int(torch.count_nonzero(p)) for p in model.parameters()) == 52


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 1)])
@pytest.mark.parametrize("allocate", [globally, Threshold(0.1)])
def test_n_of_m_leaves_an_allocator_nothing_to_decide(pattern, allocate):
    name = "globally" if allocate is globally else "Threshold(tau=0.1, relative=False)"
    with pytest.raises(UsageError) as error:
        replace(magnitude, pattern=pattern, allocate=allocate)
    expected = (
        f"{pattern} fixes the sparsity of every group; {name} has nothing to decide. Leave allocate at per_row"
    )
    assert str(error.value) == expected
    assert replace(wanda, pattern=pattern, allocate=per_row).fixed_by_pattern


def test_a_layer_that_is_the_whole_model_is_named_by_its_parameter():
    with pytest.raises(UsageError) as error:
        prune_(nn.Linear(7, 4), recipe=replace(magnitude, pattern=NM(2, 4)))
    assert str(error.value) == (
        'weight: 7 input columns cannot be cut 2:4 (7 % 4 = 3). Skip it with skip="weight" or choose another pattern'
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights():
    with pytest.raises(UsageError) as error:
        prune_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0)), 0.5)
    assert str(error.value) == '1: shape (0, 4) holds no weight. Skip it with skip="1"'


def test_a_model_without_values():
    model = network().to("meta")
    assert plan(model, 0.5).keep == 40
    with pytest.raises(UsageError) as error:
        prune_(model, 0.5)
    assert str(error.value) == "0.weight is on the meta device and has no values; load the weights first"


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.LayerNorm(4)), nn.LSTM(3, 3)])
def test_a_model_with_nothing_to_prune_is_an_error_and_no_quiet_success(model):
    with pytest.raises(UsageError, match=f"nothing to prune in {type(model).__name__}"):
        prune_(model, 0.5)


def test_skipping_everything_is_an_error():
    with pytest.raises(UsageError, match="nothing to prune in Sequential, all 2 layers are left out"):
        prune_(network(), 0.5, skip=["0", "2"])


def test_a_tensor_that_reads_its_memory_twice_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(distinct_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


def test_the_name_of_a_recipe_is_no_recipe_with_data_either():
    with pytest.raises(UsageError, match=r"recipe is 'wandaa'; expected a Recipe such as .*nearest: wanda"):
        prune_(network(), 0.5, "wandaa", data=[torch.ones(2, 6)])
