"""Attention or feed-forward, told from the widths of a few matrices that stand together.

Both read a residual stream of width `d` and close back to it; they differ in what lies between:

- attention: q `(a, d)` and k, v `(kv, e)` with `kv` dividing `a` (grouped queries); or one fused
  `(a + 2 kv, d)`; or q and one fused `(2 kv, e)`; closed by `(d, a)`. `e` is the other stack's width in
  cross-attention, else `d`.
- feed-forward: `(f, d)`; or gate and up, `(f, d)` twice; or one fused `(2 f, d)`; closed by `(d, f)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

__all__ = ["Group", "Matrix", "Part", "cover", "parts_of"]

Part = Literal["attention", "ffn"]

# beyond these sizes a pool of matrices is no flat transformer block, and trying every partition gets slow
LARGEST_RUN = 24
LARGEST_SCATTERED = 8


class Matrix(NamedTuple):
    """A matrix by its name and its two widths; fused matrices count with all their rows."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Group:
    """Matrices that make up one attention or one feed-forward, closing back to `width`."""

    part: Part
    members: tuple[Matrix, ...]
    width: int

    @property
    def widens(self) -> bool:
        """Whether what lies between is wider than what is read."""
        return any(matrix.columns > self.width for matrix in self.members)


def parts_of(matrices: Sequence[Matrix]) -> tuple[Group, ...]:
    """What all these matrices together can be, with the width they close to; the likelier reading first.

    Example:
        >>> q, k, v, o = (Matrix(n, r, 32) for n, r in zip("qkvo", (32, 8, 8, 32)))
        >>> [(group.part, group.width) for group in parts_of([q, k, v, o])]
        [('attention', 32)]
        >>> [(group.part, group.width) for group in parts_of([Matrix("up", 64, 32), Matrix("down", 32, 64)])]
        [('ffn', 32), ('ffn', 64)]
        >>> parts_of([q, k])
        ()
    """
    if not 2 <= len(matrices) <= 4:
        return ()
    readings: dict[tuple[Part, int], Group] = {}
    # the last one first: most code registers the closing matrix last
    for index in reversed(range(len(matrices))):
        closing = matrices[index]
        reading = [matrix for other, matrix in enumerate(matrices) if other != index]
        for part in _between(reading, closing):
            readings.setdefault((part, closing.rows), Group(part, tuple(matrices), closing.rows))
    return tuple(readings.values())


def _between(reading: list[Matrix], closing: Matrix) -> tuple[Part, ...]:
    """The parts in which `reading` lead from the residual width to the input of `closing`."""
    width, inner = closing.rows, closing.columns
    own = [matrix for matrix in reading if matrix.columns == width]
    if not own:
        return ()
    if len(reading) == 1:
        return _one_matrix(own[0].rows, inner, width)
    if len(reading) == 2:
        if len(own) == 2 and all(matrix.rows == inner for matrix in own):
            # squares say little: it may also be attention whose queries are its keys
            return ("ffn", "attention") if inner == width else ("ffn",)
        pairs = (reading, reading[::-1])
        fused = any(q.rows == inner and q in own and _attended(kv, 2, inner, width) for q, kv in pairs)
        return ("attention",) if fused else ()
    for query in own:
        key, value = (matrix for matrix in reading if matrix is not query)
        if query.rows == inner and key[1:] == value[1:] and _attended(key, 1, inner, width):
            # four equal squares say little: names may know better
            return ("attention", "ffn") if key[1:] == (width, width) == query[1:] else ("attention",)
    return ()


def _attended(matrix: Matrix, parts: int, inner: int, width: int) -> bool:
    """Keys or values; what they read may have a width of its own, but is not what the closing matrix reads."""
    return _divides(matrix.rows, parts, inner) and (matrix.columns == width or matrix.columns != inner)


def _one_matrix(rows: int, inner: int, width: int) -> tuple[Part, ...]:
    if rows == inner:
        return ("ffn",)
    if rows == 2 * inner:
        # a gated feed-forward that does not widen is rarer than two queries to a key; one that does is common
        return ("attention", "ffn") if inner == width else ("ffn", "attention")
    return ("attention",) if _divides(rows - inner, 2, inner) else ()


def _divides(rows: int, parts: int, inner: int) -> bool:
    """`rows` are `parts` equal matrices of keys or values whose width divides the queries'."""
    return rows >= 2 * parts and rows % parts == 0 and inner % (rows // parts) == 0


def cover(matrices: Sequence[Matrix], hint: Callable[[Matrix], Part | None]) -> tuple[Group, ...]:
    """Every matrix put into one group, all closing to the same width; empty when that is not possible.

    Neighbours in registration order are tried first, any partition of a small pool after that. Of several
    covers the one with the fewest groups wins, then the one with the more usual widths, then the one that names
    (`hint`) agree with most, then attention before feed-forward.

    Cost: some thousands of small checks at the most; the sizes tried are bounded.

    Example:
        >>> flat = [Matrix("a", 96, 32), Matrix("b", 32, 32), Matrix("c", 128, 32), Matrix("d", 32, 128)]
        >>> [(group.part, [m.name for m in group.members]) for group in cover(flat, lambda matrix: None)]
        [('attention', ['a', 'b']), ('ffn', ['c', 'd'])]
    """
    found: list[tuple[tuple, tuple[Group, ...]]] = []
    for adjacent, largest in ((True, LARGEST_RUN), (False, LARGEST_SCATTERED)):
        if not found and len(matrices) <= largest:
            found = [(_rank(groups, hint), groups) for groups in _covers(list(matrices), adjacent, None)]
    return min(found, key=lambda ranked: ranked[0])[1] if found else ()


def _covers(left: list[Matrix], adjacent: bool, width: int | None) -> Iterator[tuple[Group, ...]]:
    if not left:
        yield ()
        return
    first, rest = left[0], left[1:]
    for size in range(1, min(3, len(rest)) + 1):
        for chosen in [tuple(rest[:size])] if adjacent else combinations(rest, size):
            for group in parts_of([first, *chosen]):
                if width in (None, group.width):
                    others = [matrix for matrix in rest if matrix not in chosen]
                    for groups in _covers(others, adjacent, group.width):
                        yield (group, *groups)


def _rank(groups: tuple[Group, ...], hint: Callable[[Matrix], Part | None]) -> tuple:
    against = sum(hint(m) not in (None, group.part) for group in groups for m in group.members)
    order = tuple(group.part != "attention" for group in groups)
    return len(groups), sum(_unusual(group) for group in groups), against, order


def _unusual(group: Group) -> bool:
    """Attention that reads another stack, is not as wide as its input or has queries for keys; a feed-forward
    that does not widen."""
    widths = {matrix.columns for matrix in group.members}
    if group.part == "attention":
        return widths != {group.width} or (
            len(group.members) == 3 and {m.rows for m in group.members} == widths
        )
    # four squares say nothing either way
    return not group.widens and len(group.members) < 4
