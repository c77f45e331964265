from __future__ import annotations

import pytest
import torch

from secateur import align
from secateur.align import Embeddings
from secateur.errors import NumericError, UsageError

from .test_fits import cloud


def test_two_models_are_never_compared_by_accident():
    one, two = Embeddings(cloud(5, 3), "pruned"), Embeddings(cloud(5, 3, 1), "original")
    for compare in (align.similarity, align.neighbours):
        with pytest.raises(
            UsageError, match="vectors of 'pruned' and of 'original' cannot be compared"
        ) as told:
            compare(one, two)
        assert "The axes of two trained spaces have nothing to do with each other" in str(told.value)
        assert "map = align.ridge(source, target)" in str(told.value)
        with pytest.raises(UsageError, match="needs vectors that say which model made them, got Tensor"):
            compare(one.values, two)
    map = align.ridge(one, two)
    assert align.similarity(map(one), two).shape == (5,)
    assert map(one).space == "original"
    with pytest.raises(UsageError, match="this map takes vectors of 'pruned', got vectors of 'original'"):
        map(two)
    with pytest.raises(UsageError, match=r"this map takes vectors of width 3 \('pruned'\), got width 4"):
        map(Embeddings(cloud(2, 4), "pruned"))
    with pytest.raises(UsageError, match="width 3 and of width 4 in one space"):
        align.neighbours(one, Embeddings(cloud(5, 4), "pruned"))


def test_embeddings_know_what_they_are():
    one = Embeddings(cloud(5, 3), "a")
    assert (len(one), one.width, len(one[1:3]), one[[0, 4]].space) == (5, 3, 2, "a")
    torch.testing.assert_close(one.normalized().values.norm(dim=1), torch.ones(5).double())
    with pytest.raises(UsageError, match="one row is no set of vectors"):
        one[3]
    with pytest.raises(UsageError, match="space is '', expected the name"):
        Embeddings(cloud(2, 2), "")
    with pytest.raises(UsageError, match=r"got shape \(4,\) of torch.int64"):
        Embeddings(torch.arange(4), "a")
    with pytest.raises(NumericError, match="the vectors of 'a': NaN or Inf in 1 of 2"):
        Embeddings(torch.tensor([[0.0, torch.inf], [0, 0]]), "a")


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_neighbours_are_those_of_brute_force(monkeypatch, chunk):
    monkeypatch.setattr("secateur.align.search._CHUNK", chunk)
    queries, index = cloud(6, 4), cloud(9, 4, 1)
    found = align.neighbours(Embeddings(queries, "a"), Embeddings(index, "a"), 3)
    for at in range(6):
        cosines = [float(torch.cosine_similarity(queries[at], row, dim=0)) for row in index]
        assert found[at].tolist() == sorted(range(9), key=lambda row: -cosines[row])[:3]
    own = align.neighbours(Embeddings(index, "a"), Embeddings(index, "a"), 8, exclude_self=True)
    assert all(at not in row for at, row in enumerate(own.tolist()))


def test_searches_that_cannot_be():
    one = Embeddings(cloud(5, 3), "a")
    for k in (0, 6, 2.0):
        with pytest.raises(UsageError, match=f"k is {k}, expected a whole number from 1 to the 5 vectors"):
            align.neighbours(one, one, k)
    with pytest.raises(UsageError, match="from 1 to the 4 vectors"):
        align.neighbours(one, one, 5, exclude_self=True)
    with pytest.raises(UsageError, match="got 2 queries and 5 rows"):
        align.neighbours(one[:2], one, 1, exclude_self=True)
    with pytest.raises(UsageError, match="row by row, got 2 and 5"):
        align.similarity(one[:2], one)
    with pytest.raises(UsageError, match=r"got shapes \(1, 2\) and \(1, 3\)"):
        align.overlap(torch.zeros(1, 2).long(), torch.zeros(1, 3).long())


def blurred(width: int, noise: float, seed: int) -> tuple[Embeddings, Embeddings]:
    """An original space and a worse one, rotated and noisy."""
    original = cloud(300, width, seed)
    worse = (original + noise * cloud(300, width, seed + 1)) @ cloud(width, width, seed + 2)
    return Embeddings(worse, "pruned"), Embeddings(original, "original")


def test_a_good_map_keeps_the_index():
    pruned, original = blurred(8, 0.1, 0)
    map = align.ridge(pruned[100:], original[100:])
    advice = align.advise(map, pruned[:100], original[:100])
    assert advice.verdict == "keep the index"
    assert advice.keeps_index
    assert advice.raw < 0.5 < advice.reindexed < advice.mapped
    assert str(advice).startswith(
        "keep the index: overlap@10 with the original's neighbours over 100 held-out queries"
    )
    assert advice.gain == pytest.approx(advice.mapped - advice.reindexed)
    # by hand: the mapped queries in the original's index
    truth = align.neighbours(original[:100], original[:100], exclude_self=True)
    found = align.neighbours(map(pruned[:100]), original[:100], exclude_self=True)
    assert advice.mapped == float(align.overlap(found, truth).mean())


def test_a_bad_map_says_re_index_and_a_bad_model_says_prune_less():
    pruned, original = blurred(8, 0.0, 0)
    same = Embeddings(original.values @ torch.linalg.qr(cloud(8, 8, 5))[0], "pruned")  # all angles as they were
    few = align.ridge(same[100:104], original[100:104])  # four pairs teach little
    advice = align.advise(few, same[:100], original[:100])
    assert (advice.verdict, advice.keeps_index, advice.reindexed) == ("re-index", False, 1.0)
    assert "a new index is better by 0." in str(advice)
    noise = Embeddings(cloud(300, 8, 9), "pruned")
    map = align.ridge(noise[100:], original[100:])
    advice = align.advise(map, noise[:100], original[:100])
    assert advice.verdict == "prune less"
    assert "neither way reaches 0.3" in str(advice)
    with pytest.raises(UsageError, match=r"least is 1\.5"):
        align.advise(map, noise[:100], original[:100], least=1.5)
    with pytest.raises(UsageError, match="by both models, or by neither"):
        align.advise(map, noise[:100], original[:100], noise)
    with pytest.raises(UsageError, match="queries: 100 vectors by one model and 99 by the other"):
        align.advise(map, noise[:100], original[:99])
    with pytest.raises(UsageError, match="1 held-out queries say nothing"):
        align.advise(map, noise[:1], original[:1], noise, original)
    wide = Embeddings(torch.cat([pruned.values, pruned.values], 1), "wide")
    assert align.advise(align.ridge(wide, original), wide[:50], original[:50], wide, original).raw is None
    assert len(pruned) == 300


def test_a_new_index_that_gains_less_than_the_margin_is_not_worth_it():
    _, original = blurred(8, 0.0, 0)
    pruned = Embeddings(original.values @ torch.linalg.qr(cloud(8, 8, 5))[0], "pruned")
    map = align.ridge(pruned[100:106], original[100:106])
    advice = align.advise(map, pruned[:100], original[:100], margin=1.0, least=0)
    assert advice.gain < -2 * advice.error
    assert advice.keeps_index
    assert "gains too little" in str(advice)
