"""Weight updates: what the kept weights become, so that they make up for the pruned ones.

An update is `(weight "out in", choose, second_moment "in in") -> (weight, mask)`. `choose(scores)` turns scores
into a mask with the pattern and the counts of the recipe; `choose()` uses the recipe's own score;
`choose(scores, columns)` chooses among a slice of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.recover.quadratic import LayerProblem, one_thread, pose, refit

__all__ = ["ADMM", "ALPS", "LeastSquares", "SparseGPT"]

Choose = Callable[..., Tensor]
Updated = tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]


@dataclass(frozen=True)
class LeastSquares:
    """Mend any mask: the kept weights become the least-squares fit of the dense layer's outputs.

    Args:
        steps: conjugate-gradient steps; 10 gets most of the gain.

    Source: the refinement of Meng et al. 2024 (ALPS), applied to the mask of any score.
    """

    steps: int = 10

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """Choose by the recipe's score, then fit."""
        problem = pose(weight, second_moment)
        mask = choose()
        return problem.weights(refit(problem, mask, self.steps)), mask


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgery, column by column: each pruned weight's error is spread over the columns after it.

    For every block of columns the weights with the lowest `w^2 / U_jj^2` are chosen, `U` the upper Cholesky factor
    of the inverse moment; then, left to right, `e = w_j (1 - m_j) / U_jj` and `w_k -= e U_jk` for k >= j.

    Args:
        block: columns chosen at a time, and after which the rest is updated.

    Cost: O(in^3 + out in^2).

    Source: Frantar and Alistarh 2023, algorithm 1. Deviations: columns are normalised before damping, so the
        damping has no scale (set `normalise=False` for the authors' arithmetic: 0.01 of the mean diagonal);
        counts are exact over the layer.
    """

    block: int = 128
    normalise: bool = True

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """One sweep over the columns."""
        problem = pose(weight, second_moment) if self.normalise else _as_published(weight, second_moment)
        with one_thread():
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.moment))
            factor = torch.linalg.cholesky(inverse, upper=True)
        current = problem.target.masked_fill(problem.dead, 0).t().contiguous()  # a column of W is a row here
        scale = factor.diagonal()
        masks = []
        for start in range(0, current.shape[0], self.block):
            columns = slice(start, min(start + self.block, current.shape[0]))
            scores = (current[columns] / scale[columns, None]).square().t()
            mask = choose(scores, columns)
            errors = self._sweep(current[columns], mask.t(), factor[columns, columns])
            current[columns.stop :] -= factor[columns, columns.stop :].t() @ errors
            masks.append(mask)
        mask = torch.cat(masks, dim=1)
        return problem.weights(current.t() * mask), mask

    @staticmethod
    def _sweep(
        rows: Float[Tensor, "column out"],
        keep: Bool[Tensor, "column out"],
        factor: Float[Tensor, "column column"],
    ) -> Float[Tensor, "column out"]:
        """Eliminate the pruned weights of one block in place; the errors to spread over later columns."""
        errors = torch.zeros_like(rows)
        for j in range(rows.shape[0]):
            errors[j] = (rows[j] / factor[j, j]).masked_fill(keep[j], 0)
            rows[j:].addr_(factor[j, j:], errors[j], alpha=-1)
        return errors


def _as_published(weight: Tensor, second_moment: Tensor) -> LayerProblem:
    """The authors' damping, 0.01 of the mean diagonal of the raw moment."""
    moment = second_moment.clone()
    dead = moment.diagonal() == 0
    moment.diagonal().masked_fill_(dead, 1)
    moment.diagonal().add_(0.01 * float(moment.diagonal().mean()))
    return LayerProblem(moment, weight, torch.ones_like(moment.diagonal()), dead, 0.01)


@dataclass(frozen=True)
class ADMM:
    """Alternating directions: dense least squares pulled towards the best sparse weights near them.

    Args:
        iterations: in all; the sparsity rises to its target by a cubic schedule in the first three quarters.
        rho: weight of the pull; near 1 in normalised columns.
        refit_steps: conjugate-gradient steps on the final mask.

    Cost: one inverse, then `iterations` products `(out, in) x (in, in)`.

    Source: Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models", algorithm 1.
        Deviations: masks follow the recipe's pattern and counts throughout (the cubic schedule made hardly any
        difference and is left out); damping 0.01 instead of 0.1; a final least-squares fit.
    """

    iterations: int = 20
    rho: float = 1.0
    refit_steps: int = 10

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """Iterate, then fit on the mask that was found."""
        problem = pose(weight, second_moment)
        shifted = problem.moment.clone()
        shifted.diagonal().add_(self.rho)
        with one_thread():
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        fixed = problem.target @ problem.moment
        dense, dual = problem.target, torch.zeros_like(problem.target)
        for _ in range(self.iterations):
            mask = choose((dense + dual).abs())
            sparse = (dense + dual) * mask
            dual = dual + dense - sparse
            dense = (fixed + self.rho * (sparse - dual)) @ inverse
        return problem.weights(refit(problem, mask, self.refit_steps)), mask


@dataclass(frozen=True)
class ALPS:
    """Support search with a growing pull, finished by conjugate gradients on the support.

    `B = (G + rho I)^-1 (G W - V + rho D)`, `D` = the best sparse weights near `B + V / rho`, `V += rho (B - D)`;
    rho grows as long as the support still changes, so the search starts free and ends decided. One
    eigendecomposition serves every rho.

    Args:
        rho: first pull, in normalised columns.
        iterations: at most.
        refit_steps: conjugate-gradient steps on the support.

    Cost: one eigendecomposition, O(in^3), then two products `(out, in) x (in, in)` an iteration.

    Source: Meng, Behdin, Wang, Mazumder 2024, "ALPS", algorithm 1 and its rho schedule as in the authors' code.
    """

    rho: float = 0.1
    iterations: int = 300
    refit_steps: int = 10

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """Search the support, then fit on it."""
        problem = pose(weight, second_moment)
        with one_thread():
            values, vectors = torch.linalg.eigh(problem.moment.double())
        values, vectors = values.to(weight.dtype), vectors.to(weight.dtype)
        mask = self._search(problem, choose, values, vectors)
        return problem.weights(refit(problem, mask, self.refit_steps)), mask

    def _search(
        self,
        problem: LayerProblem,
        choose: Choose,
        values: Float[Tensor, " in"],
        vectors: Float[Tensor, "in in"],
    ) -> Bool[Tensor, "out in"]:
        fixed = problem.target @ problem.moment
        rho, growing = self.rho, False
        sparse, dual = problem.target, torch.zeros_like(problem.target)
        before = choose(sparse.abs())
        for iteration in range(1, self.iterations + 1):
            spectral = (fixed - dual + rho * sparse) @ vectors
            dense = (spectral / (values + rho)) @ vectors.t()
            mask = choose((dense + dual / rho).abs())
            sparse = (dense + dual / rho) * mask
            dual = dual + rho * (dense - sparse)
            if iteration % 3:
                continue
            change = int((mask != before).sum()) / 2 / max(1, int(mask.sum()))
            before = mask
            if change == 0 and growing:
                break
            if change <= 0.005 and not growing and iteration <= 30:
                rho /= 5  # the pull decided at once: start more freely
                continue
            growing = growing or change > 0.005
            if change > 0:
                rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
            if iteration > 30 and change < 0.0003:
                break
        return mask
