"""Scores of whole units by loops over a two-layer network, and their equations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import score
from secateur.core.site import look_of
from secateur.pattern import Neurons
from secateur.prune import plan, prune_
from secateur.recipes import Recipe
from secateur.scoring import candidates_of, gather_for

N = 6  # neurons


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, N), nn.ReLU(), nn.Linear(N, 4))


def batches() -> list:
    x, y = torch.randn(9, 3), torch.randint(0, 4, (9,))
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def weights_of(model, unit: int):
    """(weight, its gradient's place) of every weight of a neuron, biases left out."""
    for column in range(3):
        yield "0.weight", (unit, column)
    for row in range(4):
        yield "2.weight", (row, unit)


def gradients(model, data):
    parameters = dict(model.named_parameters())
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def by_loops(name: str, model, data) -> list[float]:
    """The score of every neuron from its definition."""
    x = torch.cat([x for x, _ in data])
    hidden = torch.relu(model[0](x)).detach()
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    slopes = gradients(model, data)
    norms = {"0.weight": x.norm(dim=0), "2.weight": hidden.norm(dim=0)}
    found = []
    for unit in range(N):
        members = list(weights_of(model, unit))
        weights = [float(parameters[key][at]) for key, at in members]
        slope = [float(slopes[key][at]) for key, at in members]
        reading = parameters["2.weight"][:, unit]
        found.append(
            {
                "magnitude": lambda w=weights: sum(map(abs, w)) / len(w),
                "l2": lambda w=weights: (sum(v * v for v in w) / len(w)) ** 0.5,
                "taylor": lambda w=weights, g=slope: (
                    sum(abs(a * b) for a, b in zip(w, g, strict=True)) / len(w)
                ),
                "taylor_whole": lambda w=weights, g=slope: abs(sum(a * b for a, b in zip(w, g, strict=True))),
                "wanda": lambda w=weights, m=members: (
                    sum(abs(v) * float(norms[key][at[1]]) for v, (key, at) in zip(w, m, strict=True)) / len(w)
                ),
                "activation": lambda u=unit: float(hidden[:, u].abs().mean()),
                "active": lambda u=unit: float((hidden[:, u] > 0).float().mean()),
                "flap": lambda u=unit, r=reading: float(hidden[:, u].var(correction=0) * r.square().sum()),
            }[name]()
        )
    return found


def scores_of(measure, model, data, pattern=None) -> torch.Tensor:
    recipe = Recipe(measure, pattern or Neurons())
    todo = plan(model, 0.5, recipe, example=data[0])
    known = gather_for(model, recipe, todo.layers, data)
    (site,) = todo.sites
    return candidates_of(recipe, replace(site, least=0), lambda: known, None, 0, False).scores()[0]


@pytest.mark.parametrize(
    "name", ["magnitude", "l2", "taylor", "taylor_whole", "wanda", "activation", "active", "flap"]
)
def test_the_score_of_a_neuron_is_its_definition(name):
    model, data = network(), batches()
    found = scores_of(getattr(score, name), model, data)
    torch.testing.assert_close(found, torch.tensor(by_loops(name, model, data)), rtol=1e-4, atol=1e-7)


def test_a_gate_is_a_factor_on_the_neuron_row_by_row():
    model, data = network(), batches()
    found = scores_of(score.gate, model, data)
    rows = []
    for x, y in data:
        for i in range(len(x)):
            gate = torch.ones(N, requires_grad=True)
            F.cross_entropy(model[2](torch.relu(model[0](x[i : i + 1])) * gate), y[i : i + 1]).backward()
            rows.append(gate.grad.abs())
    torch.testing.assert_close(found, torch.stack(rows).mean(0), rtol=1e-4, atol=1e-7)


def test_fisher_is_the_mean_of_single_weights():
    model, data = network(), batches()
    squared = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for x, y in data:
        for i in range(len(x)):
            for key, g in gradients(model, [(x[i : i + 1], y[i : i + 1])]).items():
                squared[key] += g.square() / 9
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = [
        sum(float(0.5 * parameters[k][at] ** 2 * squared[k][at]) for k, at in weights_of(model, unit)) / 7
        for unit in range(N)
    ]
    torch.testing.assert_close(
        scores_of(score.fisher, model, data), torch.tensor(expected), rtol=1e-4, atol=1e-9
    )


def test_whose_weights_are_looked_at_can_be_chosen():
    model, data = network(), batches()
    first, second = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    readers = scores_of(score.magnitude, model, data, Neurons(over="readers"))
    torch.testing.assert_close(readers, second.mean(0))
    writers = scores_of(score.magnitude, model, data, Neurons(over="writers"))
    torch.testing.assert_close(writers, first.mean(1))


def test_slimming_looks_at_the_scale_behind_the_channel():
    from secateur.pattern import Channels

    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 3)
    ).eval()
    nn.init.normal_(model[1].weight)
    masks = prune_(model, 0.4, Recipe(score.slimming, Channels()), example=torch.randn(2, 2, 8, 8))
    scale = masks["1.weight"]
    assert int((~scale).sum()) == 2
    lowest = model[1].weight.detach()  # what is left is zero where pruned
    assert bool((lowest[~scale] == 0).all())
    assert masks["4.weight"].reshape(3, 5, 36).all(2).all(0).tolist() == scale.tolist()


def test_random_scores_of_units_are_seeded():
    data = batches()
    model = network()
    first, again = scores_of(score.random, model, data), scores_of(score.random, model, data)
    assert torch.equal(first, again)
    assert first.unique().numel() == N


def test_what_a_score_looks_at():
    assert look_of(score.magnitude, ()).about == "weights"
    assert not look_of(score.taylor, ("grad",)).needs_inputs
    assert look_of(score.wanda, ("input_norm",)).needs_inputs
    assert look_of(score.flap, ("input_variance",)).about == "inputs"
    assert look_of(score.slimming, ()).about == "scales"


def test_scores_made_for_units_serve_single_weights_too():
    model, data = network(), batches()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = prune_(model, 0.5, Recipe(score.l2), data=data)
    assert masks == prune_(nn_copy(before), 0.5, Recipe(score.magnitude), data=data)
    columns = prune_(nn_copy(before), 0.5, Recipe(score.gate), data=data)
    assert columns.sparsity == pytest.approx(0.5)
    whole = prune_(nn_copy(before), 0.5, Recipe(score.taylor_whole), data=data)
    assert whole == prune_(nn_copy(before), 0.5, Recipe(score.taylor), data=data)


def nn_copy(state) -> nn.Sequential:
    model = network()
    model.load_state_dict(state)
    return model
