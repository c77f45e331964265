"""Experts that meet few tokens: what is known of them leans on what is known of the whole layer."""

from __future__ import annotations

import torch

from secateur.core.statistics import Sums

__all__ = ["ENOUGH", "lean_on_the_layer"]

ENOUGH = 4  # tokens for each input column above which an expert stands on its own


def lean_on_the_layer(sums: Sums) -> None:
    """Mix the sums of parts that met few tokens with those of all parts together, in place.

    A part that met `n` of the `4 in` tokens it should keeps a share `n / (4 in)` of its own mean and takes the rest
    from the mean over all tokens of the layer, so a part without any tokens takes that mean. Parts that all
    met the same number of tokens (grouped convolutions, q/k/v) were not routed and stay as they are.

    Args:
        sums: all of the layer's sums, at the end of the data.
    """
    if len(set(sums.tokens)) == 1:
        return
    tokens = list(sums.tokens)
    for totals in sums.totals.values():
        whole = torch.stack([total for total in totals if total is not None]).sum(0) / sum(tokens)
        for part, (own, met) in enumerate(zip(totals, tokens, strict=True)):
            share = min(1.0, met / (ENOUGH * sums.columns))
            if share < 1:
                leaned = (1 - share) * max(met, 1) * whole
                totals[part] = leaned if own is None else leaned + share * own
    sums.tokens = [max(met, 1) for met in tokens]
