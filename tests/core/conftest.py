"""The native kernels, compiled once for all tests where the installation has none, and both paths in turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.core import native

from ..library import library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Path:
    """A library of the native kernels as they are in this tree; skips, with a word, where there is no compiler."""
    found = library(tmp_path_factory.mktemp("native") / native.FILE.name)
    if found is None:
        pytest.skip("the native kernels cannot be built here: no C++ compiler")
    return found


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
