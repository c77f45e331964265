"""Attention or feed-forward by widths alone."""

from __future__ import annotations

import pytest

from secateur.core.widths import Group, Matrix, cover, parts_of


def matrices(*shapes: tuple[int, int]) -> list[Matrix]:
    return [Matrix(f"m{index}", *shape) for index, shape in enumerate(shapes)]


def silent(matrix: Matrix) -> None:
    return None


@pytest.mark.parametrize(
    ("shapes", "readings"),
    [
        # feed-forward, plain, gated, gated in one; a narrowing pair reads the same from the other side
        ([(64, 32), (32, 64)], [("ffn", 32), ("ffn", 64)]),
        ([(64, 32), (64, 32), (32, 64)], [("ffn", 32)]),
        ([(128, 32), (32, 64)], [("ffn", 32), ("attention", 32)]),
        # attention: separate, grouped, one key for all, narrow, across stacks
        ([(32, 32), (8, 32), (8, 32), (32, 32)], [("attention", 32)]),
        ([(8, 32), (8, 32), (32, 32), (32, 32)], [("attention", 32)]),
        ([(16, 32), (16, 32), (16, 32), (32, 16)], [("attention", 32)]),
        ([(32, 32), (32, 48), (32, 48), (32, 32)], [("attention", 32)]),
        # attention: fused, grouped and fused, keys and values fused
        ([(96, 32), (32, 32)], [("attention", 32)]),
        ([(40, 32), (32, 32)], [("attention", 32)]),
        ([(64, 32), (32, 32)], [("attention", 32), ("ffn", 32)]),
        ([(32, 32), (16, 32), (32, 32)], [("attention", 32)]),
        # squares
        ([(32, 32)] * 2, [("ffn", 32)]),
        ([(32, 32)] * 3, [("ffn", 32), ("attention", 32)]),
        ([(32, 32)] * 4, [("attention", 32), ("ffn", 32)]),
        # nothing
        ([(32, 32)], []),
        ([(32, 32)] * 5, []),
        ([(64, 32), (64, 32)], []),
        ([(67, 32), (32, 48)], []),
        ([(48, 32), (32, 64), (16, 8)], []),
        # three does not divide the width of the queries
        ([(38, 32), (32, 32)], []),
        ([(32, 32), (12, 32), (12, 32), (32, 32)], []),
    ],
)
def test_readings(shapes: list[tuple[int, int]], readings: list[tuple[str, int]]) -> None:
    assert [(group.part, group.width) for group in parts_of(matrices(*shapes))] == readings


def test_a_cover_takes_every_matrix_once() -> None:
    flat = matrices((96, 32), (32, 32), (64, 32), (32, 64))
    assert cover(flat, silent) == (
        Group("attention", tuple(flat[:2]), 32),
        Group("ffn", tuple(flat[2:]), 32),
    )
    assert cover(flat[:3], silent) == ()
    assert cover([], silent) == ()


def test_groups_of_a_cover_close_to_the_same_width() -> None:
    # both pairs alone are feed-forwards, of different streams
    assert cover(matrices((64, 32), (32, 64), (96, 48), (48, 96)), silent) == ()


def test_names_decide_between_equal_covers() -> None:
    squares = matrices(*[(32, 32)] * 6)
    assert [len(group.members) for group in cover(squares, silent)] == [4, 2]
    first = {"m0", "m1"}
    told = cover(squares, lambda matrix: "ffn" if matrix.name in first else "attention")
    assert [(group.part, len(group.members)) for group in told] == [("ffn", 2), ("attention", 4)]


def test_a_large_pool_is_left_alone() -> None:
    assert cover(matrices(*[(64, 32), (32, 64)] * 12), silent)
    assert cover(matrices(*[(64, 32), (32, 64)] * 13), silent) == ()
