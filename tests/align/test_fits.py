from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import align
from secateur.align import Embeddings
from secateur.errors import NumericError, UsageError


def cloud(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(cloud(width, width, seed))[0]


def squares(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(((one - two) ** 2).sum())


@given(
    st.integers(0, 99), st.integers(1, 6), st.integers(0, 3), st.booleans(), st.sampled_from([1.0, 0.3, 7.0])
)
def test_procrustes_finds_a_rotation_factor_and_shift_again(seed, width, wider, center, factor):
    x = cloud(40, width, seed)
    isometry = rotation(width + wider, seed + 1)[:width]
    shift = 3.0 if center else 0.0
    y = factor * x @ isometry + shift
    map = align.procrustes(x, y, scale=factor != 1.0, center=center)
    torch.testing.assert_close(map(x), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(map.matrix, factor * isometry, rtol=1e-9, atol=1e-9)


def test_procrustes_keeps_distances_and_no_rotation_is_nearer():
    x, y = cloud(30, 5), cloud(30, 5, 1)
    map = align.procrustes(x, y, scale=False)
    torch.testing.assert_close(torch.pdist(map(x)), torch.pdist(x), rtol=1e-9, atol=0)
    best = squares(map(x), y)
    for seed in range(200):
        other = (x - x.mean(0)) @ rotation(5, seed) + y.mean(0)
        assert best <= squares(other, y)
    scaled = align.procrustes(x, y)
    assert squares(scaled(x), y) < best
    factor = float(torch.linalg.matrix_norm(scaled.matrix, 2))
    for other in (0.9 * factor, 1.1 * factor):
        moved = other / factor * (x - x.mean(0)) @ scaled.matrix + y.mean(0)
        assert squares(scaled(x), y) < squares(moved, y)


def test_procrustes_refuses_a_wider_source_and_one_point():
    with pytest.raises(UsageError, match=r"which 5 numbers cannot do in 4; use align\.ridge"):
        align.procrustes(cloud(9, 5), cloud(9, 4))
    with pytest.raises(NumericError, match="all source vectors are the same point"):
        align.procrustes(torch.ones(9, 3), cloud(9, 3))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("narrow", "wide"), [(3, 7), (7, 3), (4, 1)])
def test_ridge_is_the_closed_form(narrow, wide, center):
    x, y = cloud(60, narrow) + 1, cloud(60, wide, 1) - 2
    map = align.ridge(x, y, penalty=0.01, center=center)
    mean_x, mean_y = (x.mean(0), y.mean(0)) if center else (torch.zeros(narrow), torch.zeros(wide))
    a, b = x - mean_x, y - mean_y
    unit = float((a**2).mean()) * 60
    matrix = torch.linalg.solve(a.T @ a + 0.01 * unit * torch.eye(narrow).double(), a.T @ b)
    torch.testing.assert_close(map.matrix, matrix, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(map(x), a @ matrix + mean_y, rtol=1e-8, atol=1e-8)


def test_ridge_takes_the_penalty_with_the_least_error_of_leaving_one_out():
    x = cloud(30, 20)
    y = x @ cloud(20, 4, 1) + 3 * cloud(30, 4, 2)
    penalties = (1e-4, 1e-2, 1.0, 100.0)

    def left_out(penalty: float) -> float:
        unit = float(((x - x.mean(0)) ** 2).mean()) * 30
        total = 0.0
        for row in range(30):
            rest = [at for at in range(30) if at != row]
            a, mean = x[rest], x[rest].mean(0)
            own = float(((a - mean) ** 2).mean()) * 29
            map = align.ridge(a, y[rest], penalty=penalty * unit / own)  # the same penalty in absolute terms
            total += squares(map(x[row : row + 1]), y[row : row + 1])
        return total

    best = min(penalties, key=left_out)
    assert best in (1e-2, 1.0)  # neither end, or the test would show little
    assert align.ridge(x, y, penalty=penalties).settings["penalty"] == best


def test_ridge_refuses_what_it_cannot_do():
    for penalty in (0.0, -1.0, float("nan"), ()):
        with pytest.raises(UsageError, match="expected numbers above 0"):
            align.ridge(cloud(9, 3), cloud(9, 3), penalty=penalty)
    with pytest.raises(NumericError, match="all source vectors are the same point"):
        align.ridge(torch.ones(9, 3), cloud(9, 3))


def test_canonical_axes_are_uncorrelated_and_their_correlations_those_of_scikit_learn():
    cross_decomposition = pytest.importorskip("sklearn.cross_decomposition")
    shared = cloud(400, 3)
    x = torch.cat([shared, cloud(400, 2, 1)], 1) @ cloud(5, 5, 2)
    y = (shared + 0.5 * cloud(400, 3, 3)) @ cloud(3, 4, 4) + 0.1 * cloud(400, 4, 5)
    joint = align.cca(Embeddings(x, "one"), Embeddings(y, "two"), penalty=0)
    one, two = joint(Embeddings(x, "one")).values, joint(Embeddings(y, "two")).values
    for side in (one, two):
        torch.testing.assert_close(side.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(side.T @ side / 400, torch.eye(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(one.T @ two / 400, torch.diag(joint.correlations), rtol=0, atol=1e-9)
    assert joint.correlations.diff().max() <= 0
    theirs = cross_decomposition.CCA(n_components=3, max_iter=5000, tol=1e-10).fit(x.numpy(), y.numpy())
    u, v = theirs.transform(x.numpy(), y.numpy())
    found = [np.corrcoef(u[:, at], v[:, at])[0, 1] for at in range(3)]
    np.testing.assert_allclose(joint.correlations[:3].numpy(), found, rtol=1e-4)
    assert joint(Embeddings(x, "one")).space == joint(Embeddings(y, "two")).space


@pytest.mark.parametrize(("narrow", "wide"), [(3, 6), (6, 3), (4, 4)])
def test_canonical_correlations_across_all_axes_are_least_squares(narrow, wide):
    x, y = cloud(80, narrow), cloud(80, wide, 1)
    y = y + x @ cloud(narrow, wide, 2)
    across = align.cca(x, y, penalty=0).across
    ones = torch.cat([x, torch.ones(80, 1).double()], 1)
    torch.testing.assert_close(across(x), ones @ torch.linalg.lstsq(ones, y).solution, rtol=1e-7, atol=1e-8)


def test_canonical_correlations_refuse_what_they_cannot_do():
    with pytest.raises(UsageError, match="components is 4, expected a whole number from 1 to 3"):
        align.cca(cloud(9, 3), cloud(9, 5), components=4)
    with pytest.raises(UsageError, match="penalty is -1"):
        align.cca(cloud(9, 3), cloud(9, 5), penalty=-1)
    with pytest.raises(NumericError, match="the covariance of the source cannot be inverted"):
        align.cca(torch.zeros(9, 3), cloud(9, 2), penalty=0)
    joint = align.cca(Embeddings(cloud(9, 3), "a"), Embeddings(cloud(9, 3, 1), "b"))
    with pytest.raises(UsageError, match="this joint space is of 'a' and 'b', got vectors of 'c'"):
        joint(Embeddings(cloud(2, 3), "c"))
    with pytest.raises(UsageError, match="bare tensors do not say whose they are"):
        joint(cloud(2, 3))
    assert repr(joint).startswith("Joint('a' and 'b', 3 axes, correlations 0.")


@given(st.integers(0, 99), st.floats(0.1, 10), st.floats(1e-3, 1e3))
def test_a_cosine_of_concatenated_vectors_is_the_weighted_mean_of_cosines(seed, weight, length):
    one, two = Embeddings(cloud(12, 3, seed), "a"), Embeddings(length * cloud(12, 5, seed + 1), "b")
    both = align.concatenate(one, two, weights=[1.0, weight])(one, two)
    assert both.space == "a + b"
    found = align.similarity(both[:6], both[6:])
    parts = [align.similarity(each[:6], each[6:]) for each in (one, two)]
    torch.testing.assert_close(found, (parts[0] + weight * parts[1]) / (1 + weight), rtol=1e-9, atol=1e-9)


def test_root_mean_squares_are_equal_and_lengths_within_a_model_stay():
    one, two = Embeddings(cloud(50, 3) + 5, "a"), Embeddings(100 * cloud(50, 4, 1), "b")
    joined = align.concatenate(one, two, normalize="rms", center=True)(one, two).values
    halves = joined[:, :3], joined[:, 3:]
    for half in halves:
        assert float((half**2).sum(1).mean()) == pytest.approx(0.5)
    steps, given = halves[1].diff(dim=0), two.values.diff(dim=0)
    torch.testing.assert_close(steps / given, torch.full_like(steps, float(steps[0, 0] / given[0, 0])))


def test_concatenation_refuses_what_it_cannot_join():
    one, two = Embeddings(cloud(5, 3), "a"), Embeddings(cloud(5, 3, 1), "b")
    with pytest.raises(UsageError, match="two models or more, got 1"):
        align.concatenate(one)
    with pytest.raises(UsageError, match="which name their model, got Tensor"):
        align.concatenate(one, two.values)
    with pytest.raises(UsageError, match="two models of one name"):
        align.concatenate(one, one)
    with pytest.raises(UsageError, match=r"the same texts, got \[5, 4\] vectors"):
        align.concatenate(one, two[:4])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("inf")]):
        with pytest.raises(UsageError, match="expected 2 numbers above 0"):
            align.concatenate(one, two, weights=weights)
    with pytest.raises(UsageError, match="expected 'unit' or 'rms'"):
        align.concatenate(one, two, normalize="l2")
    with pytest.raises(NumericError, match="all vectors of 'z' are zero"):
        align.concatenate(one, Embeddings(torch.zeros(5, 2), "z"))
    both = align.concatenate(one, two)
    with pytest.raises(UsageError, match="this map takes vectors of 'a', got vectors of 'b'"):
        both(two, one)
    with pytest.raises(UsageError, match="2 models were concatenated, got the vectors of 1"):
        both(one)
    with pytest.raises(UsageError, match="same texts"):
        both(one, two[:2])


@pytest.mark.parametrize("fit", [align.procrustes, align.ridge, align.cca])
def test_every_fit_wants_pairs_of_finite_vectors(fit):
    with pytest.raises(UsageError, match="source has 9 vectors and target 8; row by row"):
        fit(cloud(9, 3), cloud(8, 3))
    with pytest.raises(UsageError, match="cannot be fitted to 1 pairs"):
        fit(cloud(1, 3), cloud(1, 3))
    with pytest.raises(UsageError, match=r"target: expected a matrix of real numbers .* got shape \(9,\)"):
        fit(cloud(9, 3), torch.zeros(9))
    with pytest.raises(UsageError, match="source and target are both of the space 'a'"):
        fit(Embeddings(cloud(9, 3), "a"), Embeddings(cloud(9, 3), "a"))
    broken = cloud(9, 3)
    broken[4, 1] = float("nan")
    with pytest.raises(NumericError, match="source: NaN or Inf in 1 of 9 vectors, the first in row 4"):
        fit(broken, cloud(9, 3))


@pytest.mark.parametrize(
    ("package", "fit"), [("scipy.linalg", align.cca), ("sklearn.linear_model", align.ridge)]
)
def test_a_missing_package_names_the_extra(monkeypatch, package, fit):
    import sys

    for name in (package, package.split(".")[0]):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"which is not installed: pip install 'secateur\[align\]'"):
        fit(cloud(9, 3), cloud(9, 3))


def test_arrays_of_any_kind_are_taken_and_maps_keep_the_type_of_what_they_are_given():
    x, y = cloud(40, 3), cloud(40, 3, 1)
    one = align.ridge(x.float(), y.float(), penalty=0.1)
    two = align.ridge(x.float().numpy(), y.float().numpy().tolist(), penalty=0.1)
    torch.testing.assert_close(one.matrix, two.matrix)
    assert one(x.half()).dtype == torch.float16
    assert isinstance(one(x), torch.Tensor)
