"""Integer counts as short text, so that thousands of histogram bins fit in a few kilobytes of JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from ..errors import InputError, UsageError

__all__ = ["pack_counts", "unpack_counts"]

_LARGEST = 2**53 - 1
"""JavaScript reads the counts too, and its integers are exact up to here."""


def pack_counts(counts: Sequence[int]) -> str:
    """Counts as base64 of variable-length integers, a run of zeros as a zero and how many follow it.

    Each integer is written 7 bits to a byte, lowest first, the eighth bit saying that more follow (LEB128).
    Most bins of a histogram hold fewer than 16,384 weights, hence two bytes, and empty stretches cost two
    bytes in all.

    Args:
        counts: integers from 0 to 2^53 - 1.

    Returns:
        ASCII text; `unpack_counts` gives the same counts back.

    Raises:
        UsageError: a count is negative or above 2^53 - 1.

    Example:
        >>> pack_counts([3, 0, 0, 0, 300])
        'AwACrAI='
        >>> unpack_counts("AwACrAI=")
        [3, 0, 0, 0, 300]
    """
    packed = bytearray()
    at = 0
    while at < len(counts):
        count = int(counts[at])
        if not 0 <= count <= _LARGEST:
            raise UsageError(f"bin {at}: count {count} is not in [0, 2^53 - 1] and cannot be stored.")
        _append(packed, count)
        at += 1
        if count == 0:
            start = at
            while at < len(counts) and counts[at] == 0:
                at += 1
            _append(packed, at - start)
    return base64.b64encode(packed).decode("ascii")


def unpack_counts(text: object, *, most: int = 1 << 20) -> list[int]:
    """The counts that `pack_counts` wrote.

    Args:
        text: what `pack_counts` returned, possibly damaged on its way.
        most: refuse to unpack more counts than this; a run of zeros is short to write and long in memory.

    Raises:
        InputError: the text is not such a list, is cut off, or holds more than `most` counts.
    """
    if not isinstance(text, str):
        raise InputError(f"stored counts are {type(text).__name__}, expected text. Write the file again.")
    try:
        packed = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise InputError(f"stored counts are no base64 ({error}). Write the file again.") from None
    counts: list[int] = []
    at = 0
    while at < len(packed):
        count, at = _take(packed, at)
        counts.append(count)
        if count == 0:
            run, at = _take(packed, at)
            if run > most - len(counts):
                raise InputError(f"stored counts hold more than {most} bins. Write the file again.")
            counts.extend([0] * run)
        if len(counts) > most:
            raise InputError(f"stored counts hold more than {most} bins. Write the file again.")
    return counts


def _append(packed: bytearray, value: int) -> None:
    while value > 0x7F:
        packed.append((value & 0x7F) | 0x80)
        value >>= 7
    packed.append(value)


def _take(packed: bytes, at: int) -> tuple[int, int]:
    """The integer that starts at byte `at`, and where the next one starts."""
    value = shift = 0
    while True:
        if at >= len(packed):
            raise InputError("stored counts end within a number. Write the file again.")
        byte = packed[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if value > _LARGEST or shift > 49:
            raise InputError("stored counts hold a number above 2^53 - 1. Write the file again.")
        if byte < 0x80:
            return value, at
        shift += 7
