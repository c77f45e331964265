"""In which order N:M keeps most of a matrix: neighbours share a quota, so who is whose neighbour matters."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.errors import NumericError, UsageError

__all__ = ["channel_order", "kept_score"]

CELLS = 1 << 24  # differences held at once: 64 MB


def kept_score(scores: Float[Tensor, "row channel"], n: int, m: int) -> float:
    """The sum of the scores that n of every m neighbours keep.

    Example:
        >>> kept_score(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2)
        6.0
    """
    groups = scores.reshape(scores.shape[0], -1, m)
    return float(groups.topk(n, dim=2).values.sum(dtype=torch.float64))


def channel_order(
    scores: Float[Tensor, "row channel"], n: int, m: int, *, block: int = 512
) -> Int[Tensor, " channel"]:
    """An order of the channels in which n of every m neighbours keep as much score as can be found.

    Channels are sorted by their sums and dealt to the groups back and forth, so that loud ones do not share a
    quota. Then, place by place, the channels that stand there in all groups are assigned anew to the groups, the
    best way that there is (Hungarian method); no step keeps less than the one before.

    Args:
        scores: what each weight is worth, at least 0.
        n, m: n of m are kept; the channels are a multiple of m.
        block: groups among which channels are assigned at a time; bounds the cost of wide layers.

    Returns:
        Channel `order[i]` comes to place `i`; the order as it is where none better was found.

    Raises:
        UsageError: scipy is not installed.
        NumericError: NaN or Inf among the scores.

    Cost: `row x channel x block` comparisons, and `m` assignments for every `block` groups.

    Source: Zhang et al. 2024, "Plug-and-Play" (RIA), section 3.3. Deviation: where dealing keeps less than the order
        as it is, the assignments start from that.

    Example:
        >>> channel_order(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2).tolist()
        [0, 3, 1, 2]
    """
    if not bool(scores.isfinite().all()):
        raise NumericError("NaN or Inf among the scores of the channels; look at the weights and the data")
    channels = scores.shape[1]
    same = torch.arange(channels, device=scores.device)
    order = max((_dealt(scores, m), same), key=lambda found: kept_score(scores[:, found], n, m))
    if n == m:
        return same
    groups = order.reshape(-1, m).clone()
    for start in range(0, len(groups), block):
        among = groups[start : start + block]
        for place in range(m):
            among[:, place] = among[_assigned(scores, among, place, n), place]
    order = groups.reshape(-1)
    return order if kept_score(scores[:, order], n, m) > kept_score(scores, n, m) else same


def _dealt(scores: Float[Tensor, "row channel"], m: int) -> Int[Tensor, " channel"]:
    """The loudest to the first place of each group, the next to the second places from the last group on ..."""
    ranked = scores.sum(0, dtype=torch.float64).sort(descending=True, stable=True).indices.reshape(m, -1)
    return torch.stack([row.flip(0) if place % 2 else row for place, row in enumerate(ranked)], 1).reshape(-1)


def _assigned(
    scores: Float[Tensor, "row channel"], groups: Int[Tensor, "group place"], place: int, n: int
) -> Int[Tensor, " group"]:
    """Which group's channel at this place each group is to have.

    Beside the others of group g, whose n-th largest score in a row is t, channel c adds `max(0, s - t)` to the row.
    """
    moving = scores[:, groups[:, place]]
    others = [other for other in range(groups.shape[1]) if other != place]
    bar = scores[:, groups[:, others]].topk(n, dim=2).values[..., -1]
    gain = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=scores.device)
    step = max(1, CELLS // len(groups) ** 2)
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        gain += (moving[rows, None] - bar[rows, :, None]).clamp_(min=0).sum(0)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UsageError(
            "putting channels in order needs the extra align: pip install 'secateur[align]'"
        ) from error
    _, found = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.as_tensor(found, device=scores.device)
