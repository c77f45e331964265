"""Axis atoms: a union-find whose elements can be refined into a product or a sum of smaller atoms.

Every dimension of every tensor is a *label*, the row-major product of atoms: `(heads, head_dim)` for the 768
outputs of a query projection, `()` for a dimension of size 1. An operator says which labels are the same axis
(`unify`), how one is cut (`cut`), concatenated (`join`) or viewed in other sizes (`regroup`). Refinements reach
every tensor that carries the atom, so a view in one layer tells the granularity of a weight in another.

What cannot be expressed is frozen with a reason; nothing is guessed. The invariant: two atoms that are one
keep the same units, and every tensor's kept indices stay a product of sums of its leaves' kept units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

__all__ = ["Atom", "Axes", "Label", "Reason"]


@dataclass(frozen=True)
class Reason:
    """Why an axis cannot be pruned, and the operator and module that said so."""

    text: str
    operator: str = ""
    module: str = ""

    def __str__(self) -> str:
        where = f" at {self.module}" if self.module else ""
        return self.text + (f" ({self.operator}{where})" if self.operator else where)


NARROW = Reason("one unit wide")


class Atom:
    """One axis of `size` units, or a product or sum of smaller ones; compared by identity."""

    __slots__ = ("form", "parent", "parts", "reason", "size")

    def __init__(self, size: int, reason: Reason | None = None) -> None:
        self.size = size
        self.parent: Atom | None = None
        self.form = ""  # "" a leaf, "product" row-major, "sum" one after the other
        self.parts: tuple[Atom, ...] = ()
        self.reason = reason  # set on leaves only: frozen

    def __repr__(self) -> str:
        body = f"{self.form}{self.parts}" if self.form else ("frozen" if self.reason else "free")
        return f"<{self.size} {body}>"


Label = tuple[Atom, ...]


def size_of(label: Label) -> int:
    """Number of positions along a dimension with this label."""
    return prod(atom.size for atom in label)


class Axes:
    """The laws of atoms: find, unify, refine, freeze. Holds no list of atoms; labels hold them."""

    def label(self, size: int, reason: Reason | None = None) -> Label:
        """A fresh axis, frozen if a reason is given; a dimension of size 1 has none."""
        return () if size == 1 else (Atom(size, reason),)

    def root(self, atom: Atom) -> Atom:
        """The representative of the atoms unified with this one."""
        top = atom
        while top.parent is not None:
            top = top.parent
        while atom.parent is not None:  # path compression
            atom.parent, atom = top, atom.parent
        return top

    def flat(self, label: Iterable[Atom]) -> Label:
        """The label as representatives, with every product opened."""
        out: list[Atom] = []
        for atom in label:
            top = self.root(atom)
            if top.form == "product":
                out.extend(self.flat(top.parts))
            else:
                out.append(top)
        return tuple(out)

    def leaves(self, label: Iterable[Atom]) -> Iterator[Atom]:
        """The leaves below a label, each as often as it occurs."""
        for atom in label:
            top = self.root(atom)
            if top.form:
                yield from self.leaves(top.parts)
            else:
                yield top

    def frozen(self, label: Label) -> bool:
        """Whether no leaf of the label can be pruned."""
        return all(leaf.reason is not None for leaf in self.leaves(label))

    def why(self, label: Label) -> Reason | None:
        """The reason of the first frozen leaf, None when every leaf is free."""
        return next((leaf.reason for leaf in self.leaves(label) if leaf.reason is not None), None)

    def freeze(self, label: Label, reason: Reason) -> None:
        """Give every free leaf of the label this reason not to be pruned."""
        for leaf in list(self.leaves(label)):
            if leaf.reason is None:
                leaf.reason = reason

    def wrap(self, label: Label) -> Atom:
        """The label as one atom."""
        if len(label) == 1:
            return self.root(label[0])
        atom = Atom(size_of(label), None if label else NARROW)
        if label:
            atom.form, atom.parts = "product", label
        return atom

    def join(self, labels: Sequence[Label]) -> Label:
        """The label of a concatenation."""
        if len(labels) == 1:
            return labels[0]
        atom = Atom(sum(size_of(label) for label in labels))
        atom.form, atom.parts = "sum", tuple(self.wrap(label) for label in labels)
        return (atom,)

    def unify(self, left: Label, right: Label, reason: Reason) -> None:
        """Declare two labels of equal size the same axis; what cannot be aligned is frozen with `reason`."""
        a, b = list(left), list(right)
        if size_of(left) != size_of(right):
            self.freeze(left + right, reason)
            return
        while a and b:
            a, b = list(self.flat(a)), list(self.flat(b))
            x, y = a[0], b[0]
            if x.size == y.size:
                self._unify_atoms(x, y, reason)
                del a[0], b[0]
            elif not self._split_larger(x, y):
                self._freeze_block(a, b, reason)

    def _split_larger(self, x: Atom, y: Atom) -> bool:
        large, small = (x, y) if x.size > y.size else (y, x)
        return large.size % small.size == 0 and self.split(large, small.size, large.size // small.size)

    def _freeze_block(self, a: list[Atom], b: list[Atom], reason: Reason) -> None:
        """Freeze the shortest leading parts of equal size, and drop them from both lists."""
        na, nb = a[0].size, b[0].size
        i = j = 1
        while na != nb:
            if na < nb:
                na, i = na * a[i].size, i + 1
            else:
                nb, j = nb * b[j].size, j + 1
        found = self.why(tuple(a[:i] + b[:j])) or reason
        self.freeze(tuple(a[:i] + b[:j]), found)
        del a[:i], b[:j]

    def _unify_atoms(self, x: Atom, y: Atom, reason: Reason) -> None:
        if x is y:
            return
        for one, other in ((x, y), (y, x)):
            if self.frozen((one,)):  # frozen axes need not be one, they only have to stay whole
                self.freeze((other,), self.why((one,)) or reason)
                return
        if not x.form:
            x.parent = y
        elif not y.form:
            y.parent = x
        else:
            self._unify_sums(x, y, reason)

    def _unify_sums(self, x: Atom, y: Atom, reason: Reason) -> None:
        bounds = sorted(set(self._bounds(x)) | set(self._bounds(y)))
        left, right = self.cut((x,), bounds), self.cut((y,), bounds)
        if left is None or right is None:
            self.freeze((x, y), self.why((x, y)) or reason)
            return
        for p, q in zip(left, right, strict=True):
            self.unify(p, q, reason)
        if self.root(x) is not self.root(y) and self.root(x).form == "sum" == self.root(y).form:
            self.root(x).parent = self.root(y)

    def _segments(self, total: Atom) -> list[Atom]:
        """The parts of a sum, nested sums opened."""
        out: list[Atom] = []
        for part in total.parts:
            top = self.root(part)
            out.extend(self._segments(top) if top.form == "sum" else [top])
        return out

    def _bounds(self, total: Atom) -> list[int]:
        sizes = [segment.size for segment in self._segments(total)]
        return [sum(sizes[:i]) for i in range(1, len(sizes))]

    def split(self, atom: Atom, outer: int, inner: int) -> bool:
        """Refine an atom into `outer` runs of `inner`; False, and nothing lost, when its form forbids it."""
        atom = self.root(atom)
        if not atom.form:
            atom.parts = (Atom(outer, atom.reason), Atom(inner, atom.reason))
            atom.form, atom.reason = "product", None
            return True
        if atom.form == "product":
            return False
        segments = self._segments(atom)
        if all(segment.size % inner == 0 for segment in segments):
            return self._split_by_segments(atom, segments, inner)
        pieces = self.cut((atom,), [inner * i for i in range(1, outer)])
        if pieces is None:
            return False
        why = Reason("its runs are parts of one another: only equal positions of each can be kept")
        for piece in pieces[1:]:
            self.unify(pieces[0], piece, why)
        atom.form, atom.parts = "product", (Atom(outer, why), self.wrap(pieces[0]))
        return True

    def _split_by_segments(self, atom: Atom, segments: list[Atom], inner: int) -> bool:
        """sum(a·i, b·i) is sum(a, b)·i: fused q, k, v viewed as heads."""
        why = Reason("segments of different structure share a view")
        pairs = [self.regroup((segment,), (segment.size // inner, inner), why) for segment in segments]
        for pair in pairs[1:]:
            self.unify(pairs[0][1], pair[1], why)
        runs = self.join([pair[0] for pair in pairs])
        atom.form, atom.parts = "product", (self.wrap(runs), self.wrap(pairs[0][1]))
        return True

    def cut(self, label: Label, bounds: Sequence[int]) -> list[Label] | None:
        """The labels between the bounds (strictly inside, ascending); None when its form forbids it."""
        if not bounds:
            return [label]
        flat = self.flat(label)
        head, rest = flat[0], flat[1:]
        run = size_of(rest)
        if any(bound % run for bound in bounds):
            return None
        inside = [bound // run for bound in bounds]
        if not head.form:
            edges = [0, *inside, head.size]
            sizes = [stop - start for start, stop in pairwise(edges)]
            parts = [Atom(size, head.reason or (NARROW if size == 1 else None)) for size in sizes]
            head.form, head.parts, head.reason = "sum", tuple(parts), None
            pieces: list[Label] | None = [() if part.size == 1 else (part,) for part in parts]
        else:
            pieces = self._cut_sum(head, inside)
        return None if pieces is None else [piece + rest for piece in pieces]

    def _cut_sum(self, total: Atom, bounds: Sequence[int]) -> list[Label] | None:
        parts: list[Label] = []
        start = 0
        for segment in self._segments(total):
            inside = [bound - start for bound in bounds if start < bound < start + segment.size]
            pieces = self.cut((segment,), inside)
            if pieces is None:
                return None
            parts.extend(pieces)
            start += segment.size
        out: list[Label] = []
        group: list[Label] = []
        edge, start = iter([*bounds, total.size]), 0
        stop = next(edge)
        for part in parts:
            group.append(part)
            start += size_of(part)
            if start == stop:
                out.append(self.join(group))
                group, stop = [], next(edge, -1)
        return out

    def regroup(self, label: Label, sizes: Sequence[int], reason: Reason) -> list[Label]:
        """The labels of a view of `label` in other sizes; blocks that do not align are frozen."""
        atoms = list(self.flat(label))
        out: list[Label] = []
        i = 0
        while i < len(sizes):
            taken, j, na, nb = 0, i, 1, 1
            while j == i or na != nb or (j < len(sizes) and sizes[j] == 1):
                if nb <= na and j < len(sizes):
                    nb, j = nb * sizes[j], j + 1
                else:
                    na, taken = na * atoms[taken].size, taken + 1
            block, atoms = tuple(atoms[:taken]), atoms[taken:]
            out.extend(self._regroup_block(block, sizes[i:j], reason))
            i = j
        return out

    def _regroup_block(self, block: Label, sizes: Sequence[int], reason: Reason) -> list[Label]:
        if not self.frozen(block):
            found = self._take(list(block), sizes)
            if found is not None:
                return found
            self.freeze(block, self.why(block) or reason)
        why = self.why(block) or reason
        return [self.label(size, why) for size in sizes]

    def _take(self, stack: list[Atom], sizes: Sequence[int]) -> list[Label] | None:
        stack = stack[::-1]
        out: list[Label] = []
        for size in sizes:
            got: list[Atom] = []
            while size > 1:
                atom = self.root(stack.pop())
                if atom.form == "product":
                    stack.extend(atom.parts[::-1])
                elif size % atom.size == 0:
                    got.append(atom)
                    size //= atom.size
                elif atom.size % size == 0 and self.split(atom, size, atom.size // size):
                    stack.append(atom)
                else:
                    return None
            out.append(tuple(got))
        return out
