"""Scores: the laws that any score obeys, and the published equations by loops over single weights."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secateur.score import RIA, activation, fisher, magnitude, random, taylor, wanda, wanda_l1

SCORES = {
    "magnitude": magnitude,
    "wanda": wanda,
    "wanda_l1": wanda_l1,
    "ria": RIA(),
    "ria without data": RIA(power=0.0),
    "activation": activation,
}
# no overflow in a product of two, but exact zeros, denormals and both signs
VALUES = st.one_of(st.floats(-(2.0**49), 2.0**49, width=32), st.sampled_from([0.0, -0.0, 1e-45, -1e-40]))


@st.composite
def layer(draw, elements=VALUES):
    """A weight and a statistic of its input columns."""
    out, columns = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    weight = draw(hnp.arrays("float32", (out, columns), elements=elements))
    norm = draw(hnp.arrays("float32", columns, elements=elements))
    return torch.from_numpy(weight), torch.from_numpy(norm).abs()


def call(score, weight, statistic):
    wants_data = len(inspect.signature(score).parameters) > 1
    return score(weight, statistic) if wants_data else score(weight)


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=20)
@given(layer())
def test_a_score_is_finite_and_one_number_for_every_weight(name, drawn):
    weight, statistic = drawn
    before = weight.clone()
    scores = call(SCORES[name], weight, statistic)
    assert scores.shape == weight.shape
    assert bool(scores.isfinite().all())
    assert bool((scores >= 0).all())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=20)
@given(layer(st.floats(-8, 8, width=32)), st.randoms(use_true_random=False))
def test_a_score_commutes_with_permuting_columns_and_their_statistics(name, drawn, shuffler):
    weight, statistic = drawn
    order = list(range(weight.shape[1]))
    shuffler.shuffle(order)
    permuted = call(SCORES[name], weight[:, order], statistic[order])
    expected = call(SCORES[name], weight, statistic)[:, order]
    # sums over a row are taken in another order
    torch.testing.assert_close(permuted, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=20)
@given(layer(st.floats(-8, 8, width=32)), st.randoms(use_true_random=False))
def test_a_score_commutes_with_permuting_rows(name, drawn, shuffler):
    weight, statistic = drawn
    order = list(range(weight.shape[0]))
    shuffler.shuffle(order)
    permuted = call(SCORES[name], weight[order], statistic)
    torch.testing.assert_close(permuted, call(SCORES[name], weight, statistic)[order], rtol=1e-5, atol=0)


@settings(max_examples=20)
@given(layer())
def test_magnitude_is_the_absolute_weight(drawn):
    weight, _ = drawn
    assert magnitude(weight).tolist() == [[abs(w) for w in row] for row in weight.tolist()]


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_wanda_is_equation_1(out, columns, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator)
    l2 = [math.sqrt(sum(x * x for x in column)) for column in inputs.t().tolist()]
    l1 = [sum(abs(x) for x in column) for column in inputs.t().tolist()]
    for score, norms in ((wanda, l2), (wanda_l1, l1)):
        scores = score(weight, torch.tensor(norms))
        expected = [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.tolist()]
        torch.testing.assert_close(scores, torch.tensor(expected))


@settings(max_examples=20)
@given(layer(st.floats(-8, 8, width=32)), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_ria_is_equations_2_and_3(drawn, power):
    weight, norm = drawn
    assume(bool((weight.abs().sum(0) > 1e-30).all() and (weight.abs().sum(1) > 1e-30).all()))
    rows = weight.double().abs().tolist()
    expected = [
        [
            (rows[i][j] / sum(row[j] for row in rows) + rows[i][j] / sum(rows[i])) * norm.tolist()[j] ** power
            for j in range(len(rows[0]))
        ]
        for i in range(len(rows))
    ]
    scores = RIA(power)(weight, norm)
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-30)


def test_ria_gives_an_empty_row_and_column_no_worth():
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert RIA()(weight, torch.ones(2)).tolist() == [[0.0, 0.0], [0.0, 2.0]]


def test_ria_keeps_a_faint_column_alive_where_magnitude_empties_it():
    weight = torch.tensor([[1.0, 0.1, 1e-3], [0.1, 1.0, 2e-3]])
    lowest = magnitude(weight).flatten().argsort()[:2] % 3
    assert lowest.tolist() == [2, 2]
    lowest = RIA()(weight, torch.ones(3)).flatten().argsort()[:2] % 3
    assert 2 not in lowest.tolist()


def test_activation_is_the_same_for_a_whole_column():
    scores = activation(torch.randn(3, 2), torch.tensor([0.5, 3.0]))
    assert scores.tolist() == [[0.5, 3.0]] * 3


def test_random_depends_on_its_generator_alone():
    weight, state = torch.randn(4, 5), torch.get_rng_state()
    draw = random(weight, torch.Generator().manual_seed(3))
    assert torch.equal(draw, random(-9 * weight, torch.Generator().manual_seed(3)))
    assert not torch.equal(draw, random(weight, torch.Generator().manual_seed(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(((draw >= 0) & (draw < 1)).all())


@settings(max_examples=20)
@given(layer(st.floats(-8, 8, width=32)), st.integers(0, 99))
def test_scores_of_gradients_are_their_equations(drawn, seed):
    weight, _ = drawn
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    for i, j in itertools.product(*map(range, weight.shape)):
        without = weight.clone()
        without[i, j] = 0
        lost = abs(float(((without - weight) * gradient).double().sum()))
        assert taylor(weight, gradient)[i, j].item() == pytest.approx(lost, rel=1e-5, abs=1e-30)
        expected = float(weight[i, j].double() ** 2) * float(gradient[i, j].double() ** 2) / 2
        assert fisher(weight, gradient**2)[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-30)
