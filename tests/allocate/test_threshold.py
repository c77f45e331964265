"""Threshold and percentile: what lies at tau is cut, whatever the precision; counts of a percentile are exact."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from secateur.allocate import Percentile, Threshold
from secateur.core.select import Candidates, smallest
from secateur.errors import UsageError

SCORES = hnp.arrays(
    "float32", st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(0, 4, width=32)
)


def layer(scores) -> Candidates:
    scores = torch.as_tensor(scores)
    return Candidates(tuple(scores.shape), 1, lambda: scores)


@given(SCORES, st.one_of(st.floats(0, 4), st.sampled_from([0.0, 0.4, 0.1])))
def test_what_is_kept_lies_above_tau(scores, tau):
    (count,) = Threshold(tau)({"a": layer(scores)}, 0)["a"].tolist()
    flat = torch.from_numpy(scores).reshape(1, -1)
    cut = smallest(flat, torch.tensor([scores.size - count]))
    assert bool((flat[~cut] > tau).all())
    assert bool((flat[cut] <= np.float32(tau)).all())


@given(SCORES, st.floats(0, 4), st.floats(0, 4))
def test_a_higher_tau_never_keeps_more(scores, one, other):
    low, high = sorted((one, other))
    found = {"a": layer(scores)}
    assert int(Threshold(low)(found, 0)["a"]) >= int(Threshold(high)(found, 0)["a"])


def test_a_score_at_tau_is_cut_in_its_own_precision():
    """0.4 is no float32: a weight that was set to 0.4 holds 0.4000000059 and still lies at tau = 0.4."""
    at = torch.tensor([[0.4, 0.4, np.nextafter(np.float32(0.4), np.float32(1))]])
    assert float(at[0, 0]) > 0.4
    assert Threshold(0.4)({"a": layer(at)}, 0)["a"].tolist() == [1]


def test_zero_cuts_only_zeros():
    scores = torch.tensor([[0.0, 1e-45, 0.0, 2.0]])
    assert Threshold(0.0)({"a": layer(scores)}, 0)["a"].tolist() == [2]


def test_the_first_glob_that_matches_gives_the_threshold():
    tau = {"h.0.*": 0.1, "*.weight": 0.3, "*": 0.5}
    found = {name: layer(torch.tensor([[0.05, 0.2, 0.4, 0.6]])) for name in ("h.0.weight", "h.1.weight", "fc")}
    counts = Threshold(tau)(found, 0)
    assert {name: int(count) for name, count in counts.items()} == {"h.0.weight": 3, "h.1.weight": 2, "fc": 1}


@given(SCORES, st.floats(0, 3))
def test_relative_tau_counts_in_root_mean_squares(scores, tau):
    rms = float(np.sqrt(np.mean(np.square(scores.astype(np.float64)))))
    expected = int((torch.from_numpy(scores) > tau * rms).sum())
    assert Threshold(tau, relative=True)({"a": layer(scores)}, 0)["a"].tolist() == [expected]


def test_relative_tau_of_magnitudes_is_in_standard_deviations():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 0.02
    kept = int(Threshold(1.0, relative=True)({"a": layer(weight.abs())}, 0)["a"])
    assert kept / weight.numel() == pytest.approx(0.3173, abs=0.005)  # a normal variable beyond one sigma


def test_relative_tau_leaves_out_what_is_already_pruned():
    scores = torch.tensor([[-float("inf"), 1.0, 3.0, -float("inf")]])
    assert Threshold(1.0, relative=True)({"a": layer(scores)}, 0)["a"].tolist() == [1]  # rms 2.24
    nothing = torch.full((1, 2), -float("inf"))
    assert Threshold(1.0, relative=True)({"a": layer(nothing)}, 0)["a"].tolist() == [0]


@given(SCORES, SCORES, st.floats(0, 100))
def test_a_percentile_of_the_model_counts_exactly(one, other, q):
    found = {"a": layer(one), "b": layer(other)}
    total = one.size + other.size
    for scope in ("layer", "model"):
        counts = Percentile(q, scope)(found, 0)
        assert sum(int(count) for count in counts.values()) == total - round(total * q / 100)


def test_a_percentile_of_each_layer_or_of_the_model():
    found = {"small": layer(torch.arange(10.0)[None]), "large": layer(100 + torch.arange(10.0)[None])}
    assert {n: int(c) for n, c in Percentile(50.0)(found, 0).items()} == {"small": 5, "large": 5}
    assert {n: int(c) for n, c in Percentile(50.0, "model")(found, 0).items()} == {"small": 0, "large": 10}


def test_29_percent_of_100_is_29():
    """Trap 1: int(100 * 0.29) is 28."""
    found = {"a": layer(torch.arange(100.0)[None])}
    assert Percentile(29.0)(found, 0)["a"].tolist() == [71]


@pytest.mark.thorough
def test_a_percentile_of_more_than_16_million():
    """Trap 4: torch.quantile refuses more than 2**24 elements."""
    scores = torch.arange((1 << 24) + 1000.0).reshape(1, -1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(scores, 0.5)
    found = {"a": layer(scores)}
    assert Percentile(25.0)(found, 0)["a"].tolist() == [scores.numel() - round(scores.numel() / 4)]
    assert Percentile(25.0, "model")(found, 0)["a"].tolist() == [scores.numel() - round(scores.numel() / 4)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Threshold(-0.1), "threshold tau is -0.1; expected a finite number of at least 0"),
        (lambda: Threshold(float("nan")), "threshold tau is nan; expected a finite number of at least 0"),
        (
            lambda: Threshold({"*": float("inf")}),
            "threshold tau is inf; expected a finite number of at least 0",
        ),
        (
            lambda: Threshold({"a.*": 1.0})(
                {"a.weight": layer(torch.ones(1, 1)), "fc": layer(torch.ones(1, 1))}, 0
            ),
            "fc: no threshold is given for it; add one, or a last pattern '*'",
        ),
        (
            lambda: Threshold({"fc1.wieght": 1.0, "*": 2.0})({"fc1.weight": layer(torch.ones(1, 1))}, 0),
            "the threshold for 'fc1.wieght' matches none of the 1 layers; nearest: fc1.weight",
        ),
        (lambda: Percentile(101.0), "percentile 101.0 is not in [0, 100]"),
        (lambda: Percentile(-1.0), "percentile -1.0 is not in [0, 100]"),
        (lambda: Percentile(float("nan")), "percentile nan is not in [0, 100]"),
        # by hand, because the tests check types at run time
        (
            lambda: Percentile.__post_init__(SimpleNamespace(q=5.0, scope="row")),
            "scope of a percentile is 'layer' or 'model', got 'row'",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(UsageError) as error:
        build()
    assert str(error.value) == message
