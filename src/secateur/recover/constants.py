"""What removed weights gave on average goes into the bias, where the layer has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.recover.update import ALPS, Choose, Updated

__all__ = ["IntoBias", "centred"]

# A column whose variance is below this share of its second moment is a constant within float32's rounding.
CONSTANT = 1e-5


@dataclass(frozen=True)
class IntoBias:
    """An update of the weights, and a bias that takes over the constant part of what they lost.

    The outputs `x w' + b'` of a layer are nearest to `x w + b` with `b' = b + (w - w') mean(x)`, whatever the
    weights are; so those are fitted to the inputs' deviations from their mean, `X^T X - T mean mean^T`, and an input
    that never changes costs nothing to remove. A layer without a bias is updated as if this were not there.

    Args:
        then: the update of the weights; None leaves kept weights as they are under the score's own mask.

    Cost: that of the update, and one product `(out, in) x in`.

    Source: An et al. 2024, "FLAP: Fluctuation-based Adaptive Structured Pruning", section 3.3 (bias compensation).
        Deviations: single weights as well as channels; the weights are fitted knowing that the bias follows.

    Example:
        >>> from secateur.recipes import Recipe, wanda
        >>> from secateur.score import wanda as score
        >>> print(Recipe(score, update=IntoBias(None)))
        wanda on Weights(), per_layer, updated by IntoBias(then=None)
    """

    then: Callable[..., Any] | None = ALPS()  # noqa: RUF009 - frozen, so it may be shared

    def __call__(
        self,
        weight: Float[Tensor, "out in"],
        choose: Choose,
        second_moment: Float[Tensor, "in in"],
        input_mean: Float[Tensor, " in"],
        tokens: Float[Tensor, ""],
    ) -> Updated:
        """Update, then say what the bias gains."""
        moment = centred(second_moment, input_mean, tokens) if choose.bias else second_moment
        if self.then is None:
            mask = choose()
            found = Updated(weight * mask, mask)
        else:
            found = Updated(*self.then(weight, choose, moment))
        if not choose.bias:
            return found
        kept_whole = found.mask.all(1, keepdim=True)  # such rows stay as they are, see `mend_`
        lost = (weight - found.weight).masked_fill(kept_whole, 0)
        return found._replace(shift=lost @ input_mean)


def centred(
    second_moment: Float[Tensor, "in in"], mean: Float[Tensor, " in"], tokens: Float[Tensor, ""]
) -> Float[Tensor, "in in"]:
    """`X^T X - T mean mean^T`: the second moment of the deviations from the mean; exact zeros for constant inputs.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> centred(rows.t() @ rows, rows.mean(0), torch.tensor(2.0))
        tensor([[2., 0.],
                [0., 0.]])
    """
    moment = second_moment - tokens * torch.outer(mean, mean)
    constant = moment.diagonal() <= CONSTANT * second_moment.diagonal()
    return moment.masked_fill_(constant, 0).masked_fill_(constant[:, None], 0)
