"""The held-out gate: keep the index of the original model, build a new one, or prune less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ..errors import UsageError
from .embeddings import Embeddings, same_space
from .maps import Affine
from .search import neighbours, overlap

__all__ = ["Advice", "advise"]

Verdict = Literal["keep the index", "re-index", "prune less"]


@dataclass(frozen=True)
class Advice:
    """What held-out texts say about a map.

    Attributes:
        verdict: "keep the index", "re-index" or "prune less".
        mapped: overlap@k with the original's neighbours, mapped queries in the original's index.
        reindexed: the same of the pruned model's queries in an index of its own.
        raw: the same of the pruned model's queries in the original's index without a map, which is what happens where
            nobody thinks of aligning; None where the widths differ.
        gain: mean of mapped - reindexed over the queries.
        error: standard error of `gain`.
        queries: how many were asked.
        k: neighbours of each.
        least: the overlap below which neither way is good.
    """

    verdict: Verdict
    mapped: float
    reindexed: float
    raw: float | None
    gain: float
    error: float
    queries: int
    k: int
    least: float

    @property
    def keeps_index(self) -> bool:
        """Whether the original's index may stay."""
        return self.verdict == "keep the index"

    def __str__(self) -> str:
        way = f"{self.mapped:.3f} with the map and the original's index, {self.reindexed:.3f} with a new index"
        told = f"overlap@{self.k} with the original's neighbours over {self.queries} held-out queries: {way}"
        reason = {
            "keep the index": "the map is as good as a new index or better"
            if self.gain > -2 * self.error
            else "a new index gains too little to be worth building",
            "re-index": f"a new index is better by {-self.gain:.3f} ± {2 * self.error:.3f}",
            "prune less": f"neither way reaches {self.least:g}; the pruned model has lost too much",
        }
        return f"{self.verdict}: {told}; {reason[self.verdict]}"


def advise(
    map: Affine,
    source_queries: Embeddings,
    target_queries: Embeddings,
    source_index: Embeddings | None = None,
    target_index: Embeddings | None = None,
    *,
    k: int = 10,
    margin: float = 0.02,
    least: float = 0.3,
) -> Advice:
    """Judge a map on texts that it was not fitted on, against the alternative of embedding the whole index again.

    The yardstick is what the original model finds in its own index. A new index is advised only where it is better by
    more than `margin` and by more than twice the standard error of the difference, query by query.

    Args:
        map: from the pruned model's space to the original's.
        source_queries: held-out texts by the pruned model.
        target_queries: the same texts by the original.
        source_index: the index's texts by the pruned model, a sample of them where there are many; by default the
            queries search each other.
        target_index: the same texts by the original.
        k: neighbours.
        margin: the overlap that a new index has to gain to be worth building, in [0, 1].
        least: the overlap below which neither way is good, in [0, 1].

    Raises:
        UsageError: unequal numbers of texts, wrong spaces, fewer than two queries, or numbers out of range.

    Cost: four exact searches.
    """
    for name, value in (("margin", margin), ("least", least)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} is {value}, expected an overlap in [0, 1]")
    if (source_index is None) != (target_index is None):
        raise UsageError("give the index by both models, or by neither and let the queries search each other")
    itself = source_index is None or target_index is None
    old = source_queries if source_index is None else source_index
    new = target_queries if target_index is None else target_index
    _same_texts(source_queries, target_queries, "queries")
    _same_texts(old, new, "index")
    if len(source_queries) < 2:
        raise UsageError(f"{len(source_queries)} held-out queries say nothing; give some hundred")

    def of(queries: Embeddings, index: Embeddings) -> Float[Tensor, " queries"]:
        return overlap(neighbours(queries, index, k, exclude_self=itself), truth)

    truth = neighbours(target_queries, new, k, exclude_self=itself)
    mapped, reindexed = of(map(source_queries), new), of(source_queries, old)
    raw = None
    if source_queries.width == new.width:  # the mistake, to show what it costs; labelled wrongly on purpose
        raw = float(of(Embeddings(source_queries.values, new.space), new).mean())
    difference = mapped - reindexed
    gain, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    verdict: Verdict = "keep the index"
    if max(float(mapped.mean()), float(reindexed.mean())) < least:
        verdict = "prune less"
    elif -gain > margin and -gain > 2 * error:
        verdict = "re-index"
    means = float(mapped.mean()), float(reindexed.mean())
    return Advice(verdict, *means, raw, gain, error, len(mapped), k, least)


def _same_texts(source: Embeddings, target: Embeddings, what: str) -> None:
    same_space(source, source, what)
    same_space(target, target, what)
    if len(source) != len(target):
        raise UsageError(
            f"{what}: {len(source)} vectors by one model and {len(target)} by the other; same texts?"
        )
