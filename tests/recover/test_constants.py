"""Biases that take over constants: the optimum by brute force, layers without a bias, undone and put back whole."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import Recipe, prune_, undo_
from secateur.errors import NumericError
from secateur.recipes import wanda
from secateur.recover import IntoBias, LeastSquares
from secateur.recover.constants import centred
from secateur.score import magnitude


def inputs(count: int = 200) -> torch.Tensor:
    """Correlated inputs far from zero; the last one never changes."""
    x = torch.randn(count, 8) @ (torch.eye(8) + 0.4) + torch.linspace(-3, 3, 8)
    x[:, 7] = 2.5
    return x


def recipe(then) -> Recipe:
    return replace(wanda, update=IntoBias(then))


@pytest.mark.parametrize("then", [None, LeastSquares()], ids=["kept weights", "least squares"])
def test_the_bias_is_the_best_for_the_weights_that_are_left(then):
    model, x = nn.Sequential(nn.Linear(8, 6)), inputs()
    dense = deepcopy(model)
    prune_(model, 0.5, recipe(then), data=[x])
    with torch.no_grad():
        rest = dense(x) - x @ model[0].weight.t()
    torch.testing.assert_close(model[0].bias.detach(), rest.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_nearer_than_without_it(seed):
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(8, 6)), inputs()

    def error(update):
        pruned = deepcopy(model)
        prune_(pruned, 0.5, replace(wanda, update=update), data=[x])
        return float((pruned(x) - model(x)).detach().square().mean())

    assert error(IntoBias(LeastSquares())) < error(LeastSquares())


def test_a_constant_input_is_free_to_lose():
    model, x = nn.Sequential(nn.Linear(8, 6)), inputs()
    pruned = deepcopy(model)
    constant = Recipe(lambda weight: torch.arange(8.0).flip(0).expand_as(weight), update=IntoBias(None))
    prune_(pruned, 1 / 8, constant, data=[x])  # the last column goes
    assert not pruned[0].weight[:, 7].any()
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_bias_is_updated_as_if_it_were_not_there():
    model, x = nn.Sequential(nn.Linear(8, 6, bias=False)), inputs()
    plain = deepcopy(model)
    masks = prune_(model, 0.5, recipe(LeastSquares()), data=[x])
    assert prune_(plain, 0.5, replace(wanda, update=LeastSquares()), data=[x]) == masks
    assert torch.equal(model[0].weight, plain[0].weight)


def test_a_bias_that_others_use_too_is_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.b(self.a(x))

    model = Shared()
    before = model.a.bias.detach().clone()
    prune_(model, 0.5, recipe(None), data=[inputs()])
    assert torch.equal(model.a.bias, before)


def test_parts_have_biases_of_their_own():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 6, 1, groups=2)

        def forward(self, x):
            return self.conv(x[..., None])[..., 0]

    model, x = Grouped(), inputs()
    dense = deepcopy(model)
    prune_(model, 0.5, Recipe(magnitude, update=IntoBias(None)), data=[x])
    torch.testing.assert_close(model(x).detach().mean(0), dense(x).detach().mean(0), rtol=1e-4, atol=1e-4)


def test_undoing_and_failing_put_the_bias_back_too():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = prune_(model, 0.5, recipe(None), data=[x], keep_originals=True)
    assert not torch.equal(model[0].bias, before["0.bias"])
    undo_(model, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def second_fails(weight, choose, second_moment, input_mean, tokens):
        if weight.shape[0] == 4:
            raise NumericError("no such luck")
        return IntoBias(None)(weight, choose, second_moment, input_mean, tokens)

    with pytest.raises(NumericError, match=r"2\.weight: no such luck"):
        prune_(model, 0.5, replace(wanda, update=second_fails), data=[x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_pruned_changes_no_bit():
    model, x = nn.Sequential(nn.Linear(8, 6)), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, 0.0, recipe(LeastSquares()), data=[x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_centred_moment_is_that_of_deviations():
    x = inputs()
    found = centred(x.t() @ x, x.mean(0), torch.tensor(float(len(x))))
    deviations = x - x.mean(0)
    torch.testing.assert_close(found[:7, :7], (deviations.t() @ deviations)[:7, :7], rtol=1e-3, atol=1e-2)
    assert not found[7].any()
    assert not found[:, 7].any()
