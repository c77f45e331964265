"""How much memory a call takes: the peak of the whole process over it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from secateur.errors import UsageError
from secateur.measurement import Condition, Measurement

__all__ = ["peak_memory"]

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002

_open_peaks: list[int] = []
"""Peaks of the calls under way, outermost first: resetting the kernel's mark must not lose an outer one."""


def peak_memory(run: Callable[[], Result]) -> tuple[Measurement, Result]:
    """The most memory the process held at any time while `run` ran (resident set size), and what it returned.

    On Linux the kernel's own high-water mark is reset before and read after, so that no peak is missed. Where
    that cannot be done the resident size is sampled every 2 ms, which can miss a short peak; the conditions
    say which.

    Args:
        run: called without arguments.

    Returns:
        `peak_memory` in bytes, of the whole process; the condition `before` is what it held at the start, so
        the difference is what the call added (memory that Python or torch kept from earlier may hide a part).
        Then the result of `run`.

    Raises:
        UsageError: the system tells no resident size (it has no /proc).

    Example:
        >>> measured, size = peak_memory(lambda: len(bytes(1000)))
        >>> size, measured.unit
        (1000, 'bytes')
    """
    before = _field("VmRSS")
    if _reset_mark():
        method = "kernel's high-water mark"
        place = len(_open_peaks)
        _open_peaks.append(0)
        try:
            result = run()
        finally:
            peak = max(_open_peaks.pop(place), _field("VmHWM"))
    else:
        method = "sampled every 2 ms"
        with _Sampler() as sampler:
            result = run()
        peak = sampler.peak
    conditions: dict[str, Condition] = {"before": before, "method": method}
    return Measurement("peak_memory", max(peak, before), "bytes", conditions), result


def _field(name: str) -> int:
    """An entry of the process's status in bytes."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise UsageError("peak memory is read from /proc, which this system does not have") from error
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise UsageError(f"the system does not tell {name} in {_STATUS}, so peak memory cannot be measured")


def _reset_mark() -> bool:
    """Set the kernel's high-water mark back to what is held now; False where that is not allowed."""
    seen = _field("VmHWM")
    for number, peak in enumerate(_open_peaks):
        _open_peaks[number] = max(peak, seen)
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


class _Sampler:
    """Reads the resident size in a thread of its own until the block ends."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Sampler:
        self.peak = _field("VmRSS")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _field("VmRSS"))

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _field("VmRSS"))
