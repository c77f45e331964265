"""Least squares on a mask: laws against masking, the exact answer row by row, and ill-posed problems."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericError
from secateur.recover import quadratic
from secateur.recover.quadratic import loss, one_thread, pose, refit

from .problems import correlated

SIZES = st.integers(1, 12)


def damped_loss(problem, solution) -> float:
    return loss(solution, problem.target, problem.moment)


@given(SIZES, SIZES, st.integers(1, 30), st.integers(0, 99), st.floats(0, 1))
def test_never_worse_than_masking_and_monotone_in_steps(out, columns, tokens, seed, density):
    weight, moment = correlated(out, columns, tokens, seed)
    mask = torch.rand(out, columns) < density
    problem = pose(weight, moment)
    losses = [damped_loss(problem, refit(problem, mask, steps)) for steps in range(columns + 2)]
    slack = 1e-9 * (1 + losses[0])
    assert all(after <= before + slack for before, after in pairwise(losses))
    for steps in (1, columns):
        mended = problem.weights(refit(problem, mask, steps))
        assert loss(mended, weight, moment) <= loss(weight * mask, weight, moment) + slack
        assert not mended[~mask].any()


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 99))
@settings(max_examples=20)
def test_converges_to_the_masked_least_squares_of_every_row(out, columns, seed):
    """`min || L^T v - L^T w ||` with `L L^T` the damped moment, row by row, in normalised columns."""
    weight, moment = correlated(out, columns, 50, seed)
    mask = torch.rand(out, columns) < 0.5
    problem = pose(weight, moment)
    found = refit(problem, mask, 4 * columns)
    root = torch.linalg.cholesky(problem.moment)
    for row in range(out):
        kept = mask[row].nonzero()[:, 0]
        exact = torch.linalg.lstsq(root.t()[:, kept], (root.t() @ problem.target[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row, kept], exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_kept_and_nothing_kept(dtype):
    weight, moment = correlated(5, 7, 30, dtype=dtype)
    problem = pose(weight, moment)
    assert torch.equal(refit(problem, torch.ones(5, 7, dtype=torch.bool), 9), problem.target)
    assert not refit(problem, torch.zeros(5, 7, dtype=torch.bool), 9).any()


def test_many_steps_in_float32_stay_where_they_arrived():
    weight, moment = correlated(20, 30, 100, dtype=torch.float32)
    problem, mask = pose(weight, moment), torch.rand(20, 30) < 0.5
    few, many = (damped_loss(problem, refit(problem, mask, steps)) for steps in (40, 400))
    assert many <= few * (1 + 1e-4)


def test_dead_columns_stay_out_of_it():
    weight, moment = correlated(6, 8, 40)
    dead = [1, 5]
    moment[dead], moment[:, dead] = 0, 0
    problem = pose(weight, moment)
    assert problem.dead.nonzero()[:, 0].tolist() == dead
    assert not problem.worth(problem.target)[:, dead].any()
    mask = torch.rand(6, 8) < 0.6
    mended = problem.weights(refit(problem, mask, 10))
    assert torch.equal(mended[:, dead], (weight * mask)[:, dead])
    alive = [j for j in range(8) if j not in dead]
    alone = pose(weight[:, alive], moment[alive][:, alive])
    torch.testing.assert_close(mended[:, alive], alone.weights(refit(alone, mask[:, alive], 10)))


def test_fewer_tokens_than_inputs_are_damped():
    weight, moment = correlated(4, 32, 5)
    assert torch.linalg.matrix_rank(moment) == 5
    problem = pose(weight, moment)
    assert problem.damping == 0.01
    normalised = moment / problem.norm / problem.norm[:, None]
    torch.testing.assert_close(problem.moment, normalised + 0.01 * torch.eye(32, dtype=moment.dtype))
    torch.testing.assert_close(problem.factor @ problem.factor.t(), problem.moment)
    assert not problem.factor.tril(-1).any()


@pytest.mark.parametrize(("least", "damping"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_grows_until_it_is_enough(least, damping):
    """A correlation of `1 - least` between two inputs: no second moment in theory, one after rounding in practice."""
    moment = torch.tensor([[1.0, 1 - least], [1 - least, 1.0]])
    problem = pose(torch.ones(1, 2), moment)
    assert problem.damping == damping
    torch.testing.assert_close(problem.moment.diagonal(), torch.full((2,), 1 + damping))
    assert problem.moment[0, 1] == 1 - least  # damped, not replaced


def test_what_cannot_be_factorised_is_an_error():
    with pytest.raises(
        NumericError, match=r"of 2 inputs cannot be factorised with damping up to 1 .* more calibration"
    ):
        pose(torch.ones(1, 2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_no_number(bad):
    moment = torch.eye(3)
    moment[1, 2] = bad
    with pytest.raises(NumericError, match="NaN or Inf in the second moment"):
        pose(torch.ones(2, 3), moment)


def test_raw_columns_are_damped_by_the_raw_mean_diagonal():
    weight, moment = correlated(3, 6, 40)
    problem = pose(weight, moment, normalise=False)
    added = problem.moment - moment
    torch.testing.assert_close(added, torch.eye(6, dtype=moment.dtype) * 0.01 * moment.diagonal().mean())
    assert torch.equal(problem.target, weight)


def test_posing_leaves_its_arguments_alone():
    weight, moment = correlated(3, 6, 40)
    before = weight.clone(), moment.clone()
    refit(pose(weight, moment), torch.rand(3, 6) < 0.5, 3)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


def test_threads_are_put_back():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_layers_with_one_moment_share_one_factorisation(monkeypatch):
    counted = []
    factorise = quadratic._factorise
    monkeypatch.setattr(quadratic, "_factorise", lambda moment: counted.append(1) or factorise(moment))
    weight, moment = correlated(4, 6, 30, dtype=torch.float32)
    stacked = torch.stack([moment, 2 * moment])
    first = pose(weight, stacked[0])
    assert pose(2 * weight, stacked[0]).known is first.known
    assert first.known.spectrum is pose(weight, stacked[0]).known.spectrum
    assert first.known.inverse(1.0) is pose(weight, stacked[0]).known.inverse(1.0)
    assert len(counted) == 1
    assert pose(weight, stacked[1]).known is not first.known  # another part
    assert pose(weight, stacked[0], normalise=False).known is not first.known
    stacked[0].mul_(3)
    assert pose(weight, stacked[0]).known is not first.known  # changed since
    assert len(counted) == 4
    kept = len(quadratic._FACTORED)
    del stacked
    assert len(quadratic._FACTORED) == kept - 1  # nothing outlives the moment
