from __future__ import annotations

import os
import stat

import pytest

from secateur.errors import ResourceError, UsageError
from secateur.report import write


def test_writes_the_bytes_and_nothing_beside(tmp_path):
    path = write(tmp_path / "report.html", "<p>\nτ = 0.4 🌿</p>\n")
    assert path.read_bytes() == "<p>\nτ = 0.4 🌿</p>\n".encode()
    write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.html"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = write(tmp_path / "report.html", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(
        ResourceError, match=r"report\.html: the report could not be written \(No space left on device\)"
    ):
        write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(
        UsageError, match=r"missing/r\.html: the folder .*missing does not exist\. Make it first\.$"
    ):
        write(tmp_path / "missing" / "r.html", "x")
    with pytest.raises(UsageError, match=r"is a folder, expected the name of a file\. Name one inside it\.$"):
        write(tmp_path, "x")
