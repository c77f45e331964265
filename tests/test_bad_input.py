"""Bad weights, bad data and demands that cannot be met, for every score and update: a layer is named, nothing changes.

Files are treated in tests/stream (truncated shards, full disks) and tests/test_folder.py.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import (
    NM,
    Blocks,
    IntoBias,
    LeastSquares,
    Recipe,
    Rows,
    SparseGPT,
    Swaps,
    best_,
    permute_channels_,
    prune_,
)
from secateur import recipes as known
from secateur.errors import NumericError, UsageError
from secateur.recover import ADMM, ALPS

UPDATES = {
    "least squares": LeastSquares(),
    "sparsegpt": SparseGPT(),
    "sparsegpt, raw": SparseGPT(8, normalise=False),
    "admm": ADMM(),
    "alps": ALPS(),
    "swaps": Swaps(),
    "swaps alone": Swaps(None),
    "into bias": IntoBias(),
    "into bias alone": IntoBias(None),
}
MENDING = {name: replace(known.wanda, update=update) for name, update in UPDATES.items()}
SCORING = {name: known.METHODS[name] for name in ("wanda", "wanda-l1", "ria", "activation")}
ALL = {**MENDING, **SCORING}
DATA = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))

every = pytest.mark.parametrize("recipe", ALL.values(), ids=ALL)
mending = pytest.mark.parametrize("recipe", MENDING.values(), ids=MENDING)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).train()


def refused(model: nn.Module, error: type[Exception], words: str, work) -> None:
    """The error says so, and every bit, mode and hook of the model is as before."""
    before = deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        work(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


@every
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_ill_weights(recipe, bad):
    model = network()
    with torch.no_grad():
        model[2].weight[3, 5] = bad
    refused(
        model,
        NumericError,
        "^2.weight: NaN or Inf among its weights",
        lambda m: prune_(m, 0.5, recipe, data=[DATA]),
    )


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ill_data(recipe, bad):
    spoiled = DATA.clone()
    spoiled[7, 2] = bad
    words = "^0.weight: NaN or Inf among its input activations"
    refused(network(), NumericError, words, lambda m: prune_(m, 0.5, recipe, data=[DATA, spoiled]))


@every
def test_activations_that_go_wrong_on_the_way_name_the_layer_that_they_enter(recipe):
    model = network()
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    words = "^4.weight: NaN or Inf among its input activations"
    refused(model, NumericError, words, lambda m: prune_(m, 0.5, recipe, data=[DATA]))


@mending
def test_activations_whose_squares_are_no_numbers(recipe):
    words = r"^0.weight: (NaN or Inf|.*calibration data)"
    refused(network(), NumericError, words, lambda m: prune_(m, 0.5, recipe, data=[DATA * 1e25]))


@every
def test_no_batch(recipe):
    words = "data holds no batch; calibration needs at least one"
    refused(network(), UsageError, words, lambda m: prune_(m, 0.5, recipe, data=iter(())))


@every
def test_batches_without_a_row(recipe):
    words = "^0.weight: no calibration token reached this layer"
    refused(network(), UsageError, words, lambda m: prune_(m, 0.5, recipe, data=[DATA[:0]]))


@every
def test_a_dead_column_goes_first_and_spoils_nothing(recipe):
    silent = DATA.clone()
    silent[:, 3] = 0
    model = network().eval()
    masks = prune_(model, 0.5, recipe, data=[silent], only="0")
    mask = masks["0.weight"]
    assert int(mask.sum()) == 48
    assert not mask[:, 3].any()
    assert model[0].weight.isfinite().all()


@mending
@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_tokens_than_inputs(recipe, rows):
    model = network()
    masks = prune_(model, 0.5, recipe, data=[DATA[:rows]])
    assert masks.sparsity == 0.5
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@mending
def test_inputs_that_are_all_zero(recipe):
    model = network()
    masks = prune_(model, 0.5, recipe, data=[torch.zeros(9, 8)], only="0")
    assert masks.sparsity == 0.5
    assert model[0].weight.isfinite().all()


@every
def test_a_layer_narrower_than_m(recipe):
    words = r"^0: 8 input columns cannot be cut 8:16 \(8 % 16 = 8\)"
    wide = replace(recipe, pattern=NM(8, 16), allocate=known.per_row)
    refused(network(), UsageError, words, lambda m: prune_(m, recipe=wide, data=[DATA]))


@pytest.mark.parametrize("update", [None, *(u for name, u in UPDATES.items() if "swaps" not in name)], ids=str)
@pytest.mark.thorough
def test_a_sparsity_that_whole_units_cannot_reach(update):
    """An allocator that gives other counts than were asked, and blocks that do not fit."""
    recipe = Recipe(known.wanda.score, Rows(), lambda layers, keep: {"4.weight": torch.tensor([0])}, update)
    words = r"sparsity 0\.5000 cannot be reached in whole units; nearest 1\.0000"
    refused(network(), UsageError, words, lambda m: prune_(m, 0.5, recipe, data=[DATA], only="4"))
    words = r"^4: 4 output rows cannot be cut blocks of 3 x 1"
    recipe = Recipe(known.wanda.score, Blocks(3, 1), update=update)
    refused(network(), UsageError, words, lambda m: prune_(m, 0.5, recipe, data=[DATA], only="4"))


def test_what_works_on_a_copy_leaves_the_model_too():
    model = network()
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    words = "^2.weight: NaN or Inf among its"
    recipe = replace(known.ria, pattern=NM(2, 4))
    refused(model, NumericError, words, lambda m: permute_channels_(m, recipe, [DATA]))
    refused(model, NumericError, words, lambda m: best_(m, 0.5, [DATA]))
    refused(network(), UsageError, "data holds no batch", lambda m: best_(m, 0.5, []))
    refused(network(), UsageError, "leave nothing to fit on", lambda m: best_(m, 0.5, [DATA[:1]]))
