"""What can go wrong, told so that the next step is clear; each kind has its exit code.

A message says what is wrong, where, what was expected, what was found, and what to do. The command line
prints it in one line and leaves with `exit_code`; a traceback means a defect of secateur.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "FolderInUseError",
    "InputError",
    "InterruptedRunError",
    "NotPrunedWarning",
    "NumericError",
    "ResourceError",
    "SecateurError",
    "SweepError",
    "UsageError",
    "nearest",
]


class SecateurError(Exception):
    """Root of the errors that secateur raises on purpose."""

    exit_code = 1


class UsageError(SecateurError, ValueError):
    """The request cannot be carried out as asked; the user can mend it."""

    exit_code = 2


class InputError(SecateurError, ValueError):
    """A file is unreadable, truncated, altered or of a kind that is refused."""

    exit_code = 3


class ResourceError(SecateurError, RuntimeError):
    """Memory or disk ran out; earlier results are intact."""

    exit_code = 4


class NumericError(SecateurError, ArithmeticError):
    """NaN, Inf or a factorisation that fails."""

    exit_code = 5


class FolderInUseError(SecateurError, RuntimeError):
    """Another process works in this folder."""

    exit_code = 7


class SweepError(SecateurError, RuntimeError):
    """Points of a sweep failed; the others are done."""

    exit_code = 5


class InterruptedRunError(SecateurError, RuntimeError):
    """Stopped by the user; what was done is kept."""

    exit_code = 130


class NotPrunedWarning(UserWarning):
    """Matrices of a model stay dense that nobody asked to leave out; the command line lists them instead."""


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """The known names that look most like `word`, as the tail of an error message.

    Example:
        >>> nearest("wandaa", ["magnitude", "wanda", "ria"])
        'nearest: wanda'
        >>> nearest("xyz", ["wanda", "ria"])
        'known: wanda, ria'
    """
    names = list(dict.fromkeys(known))
    close = get_close_matches(word, names, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(close)
    shown = ", ".join(names[:12])
    return f"known: {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
