"""Weight updates: what the kept weights become, so that they make up for the pruned ones.

An update is `(weight "out in", choose, <statistics by parameter name>) -> Updated`, for one matrix. `choose` is the
mask's side of the bargain: it turns scores into a mask with the pattern and the counts of the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core import native
from secateur.recover.quadratic import LayerProblem, pose, refit

__all__ = ["ADMM", "ALPS", "Choose", "LeastSquares", "SparseGPT", "Updated"]


class Choose(Protocol):
    """Turns scores into a mask with the recipe's pattern and counts."""

    @property
    def bias(self) -> bool:
        """Whether the layer adds a bias of its own, which may take over a constant."""

    @property
    def swaps(self) -> int | None:
        """Columns within which the weights of a row may trade places; None where units are not single weights."""

    def width(self, block: int) -> int:
        """How many columns to choose at a time, when about `block` are wanted."""

    def __call__(self, scores: Tensor | None = None, columns: slice | None = None) -> Bool[Tensor, "out in"]:
        """The mask that keeps the highest scores; the recipe's own score without any; of some columns only."""


class Updated(NamedTuple):
    """What an update returns.

    Attributes:
        weight: the new weights, zero where the mask is False.
        mask: True = kept.
        damping: the multiple of the mean diagonal that was added to the second moment.
        shift: what the layer's bias gains; None leaves it as it is.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    damping: float = 0.0
    shift: Float[Tensor, " out"] | None = None


@dataclass(frozen=True)
class LeastSquares:
    """Mend any mask: the kept weights become the least-squares fit of the dense layer's outputs.

    Args:
        steps: conjugate-gradient steps; 10 gets most of the gain.

    Cost: one factorisation, O(in^3), to find the damping, then `steps` products `(out, in) x (in, in)`.

    Source: the refinement of Meng et al. 2024 (ALPS), applied to the mask of any score.
    """

    steps: int = 10

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """Choose by the recipe's score, then fit."""
        problem = pose(weight, second_moment)
        mask = choose()
        return Updated(problem.weights(refit(problem, mask, self.steps)), mask, problem.damping)


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgery, column by column: the columns after it make up for each pruned weight.

    With `G = R R^T`, `R` upper triangular, and `d_k` what column k has lost in all, column j becomes
    `w_j + sum_{k<j} d_k R_kj / R_jj`; in every block the weights with the lowest `(w_j R_jj)^2` are pruned.

    Args:
        block: columns chosen at a time; N:M chooses one group at a time.
        normalise: False for the authors' damping, 0.01 of the raw mean diagonal.

    Cost: one factorisation, O(in^3), then `out in^2` multiply-adds, nearly all of them in matrix products.

    Source: Frantar and Alistarh 2023, algorithm 1, where `U = R^-1` is the upper Cholesky factor of `G^-1`: the
        errors `e_j = d_j / U_jj` spread by rows of U are the same numbers, without an inverse. Deviations:
        columns are normalised before damping; counts are exact (the authors' `<=` against the element at
        index `int(n S)` prunes one weight too many in every block, and all ties); a dead column's weights are
        pruned first, but not zeroed where they are kept.
    """

    block: int = 128
    normalise: bool = True

    def __call__(
        self, weight: Float[Tensor, "out in"], choose: Choose, second_moment: Float[Tensor, "in in"]
    ) -> Updated:
        """One sweep over the columns."""
        problem = pose(weight, second_moment, normalise=self.normalise)
        sweep = _Sweep(problem, choose, choose.width(self.block))
        sweep.run(0, weight.shape[1])
        mask = sweep.keep.bool().t()
        return Updated(problem.weights(sweep.current.t() * mask), mask, problem.damping)


class _Sweep:
    """The columns of one matrix, eliminated left to right; a column of W is a row here, so that it is contiguous.

    The columns are halved until few are left: the first half, then its effect on the second half in one matrix
    product, then the second half. What is passed on is multiplied by `R_jj`, so R is used as it is.
    """

    def __init__(self, problem: LayerProblem, choose: Choose, width: int):
        self.choose, self.width = choose, width
        self.target = problem.target.t().contiguous()
        self.gained = torch.zeros_like(self.target)  # sum of d_k R_kj over the columns k before
        self.lost = torch.empty_like(self.target)
        self.keep = torch.empty_like(self.target)
        self.factor, self.own = problem.factor, problem.factor.diagonal()[:, None]
        self.scale = self.own.masked_fill(problem.dead[:, None], 0)

    @property
    def current(self) -> Float[Tensor, "in out"]:
        """The columns as they are now."""
        return torch.addcdiv(self.target, self.gained, self.own)

    def run(self, start: int, stop: int) -> None:
        """Choose and eliminate columns `start` to `stop`."""
        if stop - start <= self.width:
            self.keep[start:stop] = self.choose(self._scores(start, stop), slice(start, stop)).t()
            self._eliminate(start, stop)
            return
        chosen = -(-(stop - start) // self.width)
        middle = start + (chosen // 2) * self.width
        self.run(start, middle)
        self._pass_on(start, middle, stop)
        self.run(middle, stop)

    def _scores(self, start: int, stop: int) -> Float[Tensor, "out column"]:
        """`(w_j R_jj)^2` with the weights that these columns would have if all of them were kept."""
        among = self.factor[start:stop, start:stop].t()
        moved = torch.linalg.solve_triangular(among, self.gained[start:stop], upper=False)
        return moved.add_(self.target[start:stop]).mul_(self.scale[start:stop]).square_().t()

    def _eliminate(self, start: int, stop: int) -> None:
        """One column after the other; products and sums are rounded one by one, as the native kernel does."""
        here = slice(start, stop)
        if native.serves(self.target):
            among = self.factor[here, here]
            native.eliminate(self.target[here], self.keep[here], among, self.gained[here], self.lost[here])
            return
        for j in range(start, stop):
            now = torch.addcdiv(self.target[j], self.gained[j], self.own[j])
            torch.addcmul(self.target[j], now, self.keep[j], value=-1, out=self.lost[j])
            self.gained[j + 1 : stop] += self.factor[j, j + 1 : stop, None] * self.lost[j]

    def _pass_on(self, start: int, middle: int, stop: int) -> None:
        """What columns `start` to `middle` have lost changes those from `middle` to `stop`."""
        self.gained[middle:stop].addmm_(self.factor[start:middle, middle:stop].t(), self.lost[start:middle])


@dataclass(frozen=True)
class ADMM:
    """Alternating directions: dense least squares pulled towards the best sparse weights near them.

    Args:
        iterations: in all.
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
        inverse = problem.known.inverse(self.rho)
        fixed = problem.target @ problem.moment
        mask = choose(problem.worth(problem.target))
        dense, dual = problem.target, torch.zeros_like(problem.target)
        for _ in range(self.iterations):
            mask = choose(problem.worth(dense + dual))
            sparse = (dense + dual) * mask
            dual = dual + dense - sparse
            dense = (fixed + self.rho * (sparse - dual)) @ inverse
        return Updated(problem.weights(refit(problem, mask, self.refit_steps)), mask, problem.damping)


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
        mask = self._search(problem, choose, *problem.known.spectrum)
        return Updated(problem.weights(refit(problem, mask, self.refit_steps)), mask, problem.damping)

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
        mask = before = choose(problem.worth(sparse))
        for iteration in range(1, self.iterations + 1):
            spectral = (fixed - dual + rho * sparse) @ vectors
            dense = (spectral / (values + rho)) @ vectors.t()
            pulled = dense + dual / rho
            mask = choose(problem.worth(pulled))
            sparse = pulled * mask
            dual = dual + rho * (dense - sparse)
            if iteration % 3:
                continue
            change = int((mask != before).sum()) / 2 / max(1, int(mask.sum()))
            before = mask
            if (change == 0 and growing) or (iteration > 30 and change < 0.0003):
                break
            if change <= 0.005 and not growing and iteration <= 30:
                rho /= 5  # the pull decided at once: start more freely
                continue
            growing = growing or change > 0.005
            if change > 0:
                rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
        return mask
