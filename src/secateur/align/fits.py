"""Fits: pairs of vectors of the same texts become a map; orthogonal, linear, canonical, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import NumericError, UsageError
from .embeddings import Embeddings, Floats, values_of
from .maps import Affine, Concatenation, Joint

__all__ = ["cca", "concatenate", "procrustes", "ridge"]

Vectors = Embeddings | Tensor | npt.ArrayLike
PENALTIES = tuple(10.0**power for power in range(-7, 3))


def procrustes(source: Vectors, target: Vectors, *, scale: bool = True, center: bool = True) -> Affine:
    """The rotation or reflection that brings `source` nearest to `target`, in least squares.

    Angles inside the source stay as they are, and distances too but for one factor: right where the two spaces differ
    by their axes, weak where one of them lost something that a general map could mend. A narrower source is laid
    isometrically into the wider target.

    Args:
        source, target: vectors of the same texts in the same order, "rows in" and "rows out", in <= out.
        scale: also fit one factor. Pruning shortens vectors; a rotation about the means alone then leaves short
            differences beside a long mean, and directions suffer.
        center: take the means apart first, so that the map is y = (x - mean x) Q + mean y; without, y = x Q.

    Returns:
        A callable map.

    Raises:
        UsageError: unequal numbers of rows, fewer than two, or a wider source.
        NumericError: NaN or Inf.

    Cost: one product "in rows out" and one SVD of an (out, out) matrix; 0.3 s at width 384 and 5,000 rows.

    Source: Schönemann (1966), "A generalized solution of the orthogonal Procrustes problem"; scipy's
        `orthogonal_procrustes`; the factor is sum(singular values) / |x|^2.

    Example:
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> procrustes(x, x.flip(1), center=False)(x).round().tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    linalg = _scipy("linalg")
    x, y = _pairs(source, target)
    narrow, wide = x.shape[1], y.shape[1]
    if narrow > wide:
        raise UsageError(
            f"procrustes keeps all distances, which {narrow} numbers cannot do in {wide}; use align.ridge for a map to "
            "a narrower space, or exchange the two sides"
        )
    mean_x, mean_y = (x.mean(0), y.mean(0)) if center else (np.zeros(narrow), np.zeros(wide))
    x, y = x - mean_x, y - mean_y
    rotation, total = linalg.orthogonal_procrustes(np.pad(x, ((0, 0), (0, wide - narrow))), y)
    squares = float((x * x).sum())
    if scale and squares == 0:
        raise NumericError("procrustes: all source vectors are the same point; no factor fits them")
    factor = float(total) / squares if scale else 1.0
    matrix = factor * rotation[:narrow]
    return _affine(
        matrix, mean_y - mean_x @ matrix, source, target, fit="procrustes", scale=scale, center=center
    )


def ridge(
    source: Vectors, target: Vectors, *, penalty: float | Sequence[float] = PENALTIES, center: bool = True
) -> Affine:
    """The linear map with the least squared error plus a penalty on its size; any two widths.

    It can mend what pruning distorted, direction by direction, which no rotation can; the penalty keeps it from
    learning the noise of a small sample.

    Args:
        source, target: vectors of the same texts in the same order, "rows in" and "rows out".
        penalty: above 0, in units of the mean variance of a source coordinate times the number of rows; of several the
            one with the least leave-one-out error is taken.
        center: fit a shift as well.

    Returns:
        A callable map; `settings["penalty"]` is the one taken.

    Raises:
        UsageError: unequal numbers of rows, fewer than two, or a penalty of 0 or less.
        NumericError: NaN or Inf, or a source that is one point.

    Cost: one decomposition of the (rows, in) matrix, then each penalty costs one product; 5 s at width 384 and 4,000
        rows with ten penalties on one core.

    Source: Hoerl and Kennard (1970); the leave-one-out error by generalized cross-validation as in scikit-learn's
        `RidgeCV`, which does the work.

    Example:
        >>> x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> map = ridge(x, x @ torch.ones(4, 2, dtype=torch.float64) + 3.0, penalty=1e-9)
        >>> map.matrix.round(decimals=3).tolist()[0], map.shift.round(decimals=3).tolist()
        ([1.0, 1.0], [3.0, 3.0])
    """
    penalties = np.atleast_1d(np.asarray(penalty, dtype=np.float64))
    if not penalties.size or not (np.isfinite(penalties).all() and (penalties > 0).all()):
        raise UsageError(f"penalty is {penalty}, expected numbers above 0")
    linear = _sklearn("linear_model")
    x, y = _pairs(source, target)
    spread = x - x.mean(0) if center else x
    unit = float((spread * spread).mean()) * len(x)
    if unit == 0:
        raise NumericError("ridge: all source vectors are the same point; nothing can be learnt from them")
    if len(penalties) > 1:
        found = linear.RidgeCV(alphas=unit * penalties, fit_intercept=center).fit(x, y)
        taken = float(found.alpha_) / unit
    else:
        found = linear.Ridge(alpha=unit * float(penalties[0]), fit_intercept=center, solver="cholesky").fit(
            x, y
        )
        taken = float(penalties[0])
    matrix = np.atleast_2d(found.coef_).T
    shift = np.broadcast_to(np.asarray(found.intercept_, dtype=np.float64), (matrix.shape[1],))
    return _affine(matrix, shift, source, target, fit="ridge", penalty=float(f"{taken:.6g}"), center=center)


def cca(source: Vectors, target: Vectors, *, components: int | None = None, penalty: float = 1e-6) -> Joint:
    """Canonical correlations: the joint axes along which two models agree best, one after another.

    Args:
        source, target: vectors of the same texts in the same order.
        components: joint axes to keep; all, the smaller of the two widths, by default.
        penalty: added to each covariance, in units of its mean variance; 0 for the textbook method, which needs many
            more rows than columns.

    Returns:
        A callable that takes either model's vectors to the joint space, where they compare; its `across` takes the
        source's to the target's own space.

    Raises:
        UsageError: unequal numbers of rows, fewer than two, or numbers out of range.
        NumericError: NaN, Inf, or a covariance that cannot be inverted.

    Cost: two Cholesky factorisations and one SVD at the models' widths.

    Source: Hotelling (1936); the regularised form of Vinod (1976). `across` is
        y = C_yy W_y R W_x^T (x - mean x) + mean y with R the correlations: without a penalty and with all axes it is
        ordinary least squares.
    """
    linalg = _scipy("linalg")
    if not (np.isfinite(penalty) and penalty >= 0):
        raise UsageError(f"penalty is {penalty}, expected a number of at least 0")
    x, y = _pairs(source, target)
    most = min(x.shape[1], y.shape[1])
    kept = most if components is None else components
    if not isinstance(kept, int) or not 1 <= kept <= most:
        raise UsageError(f"components is {components}, expected a whole number from 1 to {most}")
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    cov_x, cov_y = (_covariance(side, penalty) for side in (x, y))
    half_x, half_y = (_half(linalg, cov, name) for cov, name in ((cov_x, "source"), (cov_y, "target")))
    crossed = linalg.solve_triangular(half_x, x.T @ y / len(x), lower=True)
    crossed = linalg.solve_triangular(half_y, crossed.T, lower=True).T
    left, correlations, right = linalg.svd(crossed, full_matrices=False)
    into_x = linalg.solve_triangular(half_x, left[:, :kept], lower=True, trans="T")
    into_y = linalg.solve_triangular(half_y, right[:kept].T, lower=True, trans="T")
    correlations = np.minimum(correlations[:kept], 1.0)
    across = (into_x * correlations) @ (into_y.T @ cov_y)
    joint = f"joint space of {_space(source, 'source')} and {_space(target, 'target')}"
    settings: dict[str, Any] = {"fit": "cca", "components": kept, "penalty": penalty}
    name_x, name_y = _space(source, None), _space(target, None)
    return Joint(
        Affine(_tensor(into_x), _tensor(-mean_x @ into_x), name_x, joint, settings),
        Affine(_tensor(into_y), _tensor(-mean_y @ into_y), name_y, joint, settings),
        Affine(_tensor(across), _tensor(mean_y - mean_x @ across), name_x, name_y, settings),
        _tensor(correlations),
    )


def concatenate(
    *models: Embeddings,
    weights: Sequence[float] | None = None,
    normalize: str = "unit",
    center: bool = False,
) -> Concatenation:
    """Put the vectors of several models side by side, each normalised by what it is on these texts.

    Without that, a model whose vectors are ten times longer decides every neighbour.

    Args:
        models: vectors of the same texts by each model.
        weights: how much each model counts, above 0; equal by default.
        normalize: "unit" brings every vector of every model to length 1, so that a cosine of the whole is the weighted
            mean of the models' cosines; "rms" divides each model by its root mean square length on these texts and
            keeps the differences in length within a model.
        center: take each model's mean away first.

    Returns:
        A callable that takes one set of vectors a model.

    Raises:
        UsageError: fewer than two models, unequal numbers of rows, two of one space, or weights out of range.
        NumericError: a model whose vectors are all zero.

    Example:
        >>> one, two = Embeddings(torch.eye(2), "a"), Embeddings(10 * torch.eye(2), "b")
        >>> concatenate(one, two)(one, two).values.norm(dim=1).tolist()
        [1.0, 1.0]
    """
    if len(models) < 2:
        raise UsageError(f"concatenate joins two models or more, got {len(models)}")
    for given in models:
        if not isinstance(given, Embeddings):
            raise UsageError(
                f"concatenate needs align.Embeddings, which name their model, got {type(given).__name__}"
            )
    names = [given.space for given in models]
    if len(set(names)) < len(names):
        raise UsageError(f"concatenate: two models of one name among {names}; give each its own")
    if len({len(given) for given in models}) > 1:
        raise UsageError(
            f"every model must embed the same texts, got {[len(given) for given in models]} vectors"
        )
    shares = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(models) or not all(np.isfinite(w) and w > 0 for w in shares):
        raise UsageError(f"weights is {weights}, expected {len(models)} numbers above 0")
    if normalize not in ("unit", "rms"):
        raise UsageError(f"normalize is {normalize!r}, expected 'unit' or 'rms'")
    parts = tuple(_scaled(given, normalize, center) for given in models)
    return Concatenation(parts, normalize == "unit", tuple(w / sum(shares) for w in shares), " + ".join(names))


def _scaled(given: Embeddings, normalize: str, center: bool) -> Affine:
    values = values_of(given, given.space)
    mean = values.mean(0) if center else np.zeros(given.width)
    length = float(np.sqrt(((values - mean) ** 2).sum(1).mean()))
    if length == 0:
        raise NumericError(f"concatenate: all vectors of {given.space!r} are zero or the same; leave it out")
    factor = 1.0 if normalize == "unit" else 1.0 / length
    settings: dict[str, str | bool] = {"normalize": normalize, "center": center}
    return Affine(
        factor * torch.eye(given.width).double(), _tensor(-factor * mean), given.space, None, settings
    )


def _pairs(source: Vectors, target: Vectors) -> tuple[Floats, Floats]:
    x, y = values_of(source, "source"), values_of(target, "target")
    if len(x) != len(y):
        raise UsageError(
            f"source has {len(x)} vectors and target {len(y)}; row by row they must be of the same texts"
        )
    if len(x) < 2:
        raise UsageError(f"a map cannot be fitted to {len(x)} pairs; give a few thousand")
    if isinstance(source, Embeddings) and isinstance(target, Embeddings) and source.space == target.space:
        raise UsageError(f"source and target are both of the space {source.space!r}; give each its own name")
    return x, y


def _space(vectors: Vectors, otherwise: str | None) -> str | None:
    return vectors.space if isinstance(vectors, Embeddings) else otherwise


def _affine(matrix: Floats, shift: Floats, source: Vectors, target: Vectors, **settings: Any) -> Affine:
    named: Mapping[str, Any] = settings
    return Affine(_tensor(matrix), _tensor(shift), _space(source, None), _space(target, None), named)


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _covariance(x: Floats, penalty: float) -> Floats:
    covariance = x.T @ x / len(x)
    return covariance + penalty * float(np.trace(covariance)) / len(covariance) * np.eye(len(covariance))


def _half(linalg: Any, covariance: Floats, name: str) -> Floats:
    try:
        return linalg.cholesky(covariance, lower=True)
    except linalg.LinAlgError as error:
        raise NumericError(
            f"cca: the covariance of the {name} cannot be inverted ({error}); give more texts than its width, or a "
            "penalty above 0"
        ) from error


def _scipy(name: str) -> Any:
    try:
        import scipy.linalg
    except ImportError as error:
        raise UsageError(
            "aligning needs scipy, which is not installed: pip install 'secateur[align]'"
        ) from error
    return getattr(scipy, name)


def _sklearn(name: str) -> Any:
    try:
        import sklearn.linear_model
    except ImportError as error:
        raise UsageError(
            "aligning needs scikit-learn, which is not installed: pip install 'secateur[align]'"
        ) from error
    return getattr(sklearn, name)
