import mmap
import time
from pathlib import Path

import pytest

from secateur.errors import UsageError
from secateur.evaluate import peak_memory

MEGABYTE = 1 << 20


def take(megabytes, seconds=0.0):
    """Hold memory for a moment, every page of it written, and let it go.

    Of the system, not of the allocator, which may have as much left over from other tests.
    """
    with mmap.mmap(-1, megabytes * MEGABYTE) as block:
        block[::4096] = b"x" * (len(block) // 4096)
        time.sleep(seconds)
        return len(block)


def extra(measured):
    return measured.value - measured.conditions["before"]


@pytest.fixture(params=["kernel", "sampled"])
def method(request, monkeypatch, tmp_path):
    if request.param == "sampled":
        monkeypatch.setattr("secateur.evaluate.memory._RESET", tmp_path / "no" / "such")
    return "kernel's high-water mark" if request.param == "kernel" else "sampled every 2 ms"


def hold(megabytes):
    """Long enough for a sample to fall into it."""
    return take(megabytes, 0.05)


def test_the_peak_of_a_call_is_found_and_its_result_returned(method):
    measured, size = peak_memory(lambda: hold(100))
    assert size == 100 * MEGABYTE
    assert (measured.name, measured.unit) == ("peak_memory", "bytes")
    assert measured.conditions["method"] == method
    assert 95 * MEGABYTE < extra(measured) < 150 * MEGABYTE


def test_an_earlier_peak_does_not_count(method):
    take(150)
    measured, _ = peak_memory(lambda: hold(20))
    assert extra(measured) < 60 * MEGABYTE


def test_a_call_within_a_call_does_not_hide_the_outer_peak():
    inner = []

    def outer():
        take(120)
        inner.append(peak_memory(lambda: take(30))[0])

    measured, _ = peak_memory(outer)
    if measured.conditions["method"] != "kernel's high-water mark":
        pytest.skip("the kernel's high-water mark cannot be reset here")
    assert extra(measured) > 110 * MEGABYTE
    assert extra(inner[0]) < 60 * MEGABYTE


def test_the_books_are_closed_after_an_error(method):
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        peak_memory(fail)
    measured, _ = peak_memory(lambda: hold(40))
    assert extra(measured) > 35 * MEGABYTE


def test_a_system_that_tells_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("secateur.evaluate.memory._STATUS", tmp_path / "status")
    with pytest.raises(UsageError, match="peak memory is read from /proc, which this system does not have"):
        peak_memory(lambda: 1)
    Path(tmp_path / "status").write_text("VmSize: 1 kB\n")
    with pytest.raises(UsageError, match="the system does not tell VmRSS in"):
        peak_memory(lambda: 1)
