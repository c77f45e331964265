"""The native kernels, compiled once for all tests where the installation has none, and both paths in turn."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.core import native

BUILD = Path(__file__).resolve().parents[2] / "native" / "build.py"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Path:
    """A library of the native kernels as they are in this tree; skips, with a word, where there is no compiler.

    That of the installation where it is of these sources.
    """
    newest = max(
        file.stat().st_mtime for file in BUILD.parent.iterdir() if file.suffix in (".cpp", ".h", ".py")
    )
    sanitized = "SECATEUR_SANITIZED" in os.environ  # make test-sanitized
    if not sanitized and native.FILE.is_file() and native.FILE.stat().st_mtime > newest:
        return native.FILE
    target = tmp_path_factory.mktemp("native") / native.FILE.name
    reason = runpy.run_path(str(BUILD))["build"](target)
    if reason is not None:
        pytest.skip(f"the native kernels cannot be built here: {reason}")
    return target


@pytest.fixture(scope="module", params=["native", "torch"])
def path(request) -> Iterator[str]:
    """The tests of a module that uses this run once on each path."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "native":
            patch.setattr(native, "FILE", request.getfixturevalue("kernels"))
        else:
            patch.setenv("SECATEUR_NATIVE", "0")
        native._opened.cache_clear()
        yield request.param
    native._opened.cache_clear()
