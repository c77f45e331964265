"""The native kernels of this tree, and each path in turn: AVX2, plain C++, torch."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.core import native
from secateur.deploy.sparse import kernels

BUILD = Path(__file__).resolve().parents[3] / "native" / "build.py"
PATHS = ("avx2", "plain", "torch")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path | None:
    """The library, None where there is no compiler; that of the installation where it is of these sources."""
    newest = max(
        file.stat().st_mtime for file in BUILD.parent.iterdir() if file.suffix in (".cpp", ".h", ".py")
    )
    sanitized = "SECATEUR_SANITIZED" in os.environ  # make test-sanitized
    if not sanitized and native.FILE.is_file() and native.FILE.stat().st_mtime > newest:
        return native.FILE
    target = tmp_path_factory.mktemp("native") / native.FILE.name
    return target if runpy.run_path(str(BUILD))["build"](target) is None else None


@pytest.fixture(params=PATHS)
def path(request, built, monkeypatch) -> Iterator[str]:
    """A test that uses this runs once on each path."""
    yield from _on(request.param, built, monkeypatch)


@pytest.fixture
def fast(built, monkeypatch) -> Iterator[str]:
    """The best kernels that this machine has."""
    yield from _on("best", built, monkeypatch)


def _on(name: str, built: Path | None, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("SECATEUR_NATIVE", "0" if name == "torch" else "1")
    if built is None and name != "torch":
        pytest.skip("the native kernels cannot be built here: no C++ compiler")
    monkeypatch.setattr(native, "FILE", built or native.FILE)
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    native._opened.cache_clear()
    if name == "avx2" and not kernels.level():
        pytest.skip("this machine has no AVX2")
    if name == "plain":
        monkeypatch.setenv(kernels.ENVIRONMENT, "plain")
    yield name
    monkeypatch.undo()
    native._opened.cache_clear()
