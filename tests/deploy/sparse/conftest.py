"""The native kernels of this tree, and each path in turn: AVX-512, AVX2, plain C++, torch.

AVX-512 runs where a machine has it; everywhere else its kernels are built with instructions in plain C++.
"""

from __future__ import annotations

import os
import platform
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.core import native
from secateur.deploy.sparse import kernels

BUILD = Path(__file__).resolve().parents[3] / "native" / "build.py"
INSTEAD = Path(__file__).resolve().parents[2] / "native"  # the header of instructions in plain C++
EMULATED = pytest.param("emulated", marks=pytest.mark.thorough)
PATHS = ("avx512", EMULATED, "avx2", "plain", "torch")


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


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path | None:
    """The library with AVX-512 in plain C++."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    target = tmp_path_factory.mktemp("emulated") / native.FILE.name
    flags = ("-O1", "-DSECATEUR_EMULATED_AVX512", "-I", str(INSTEAD))
    return target if runpy.run_path(str(BUILD))["build"](target, flags) is None else None


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> Iterator[str]:
    """A test that uses this runs once on each path."""
    yield from _on(request, monkeypatch)


@pytest.fixture(params=("best", EMULATED))
def fast(request, monkeypatch) -> Iterator[str]:
    """The best kernels that this machine has, and those of AVX-512."""
    yield from _on(request, monkeypatch)


def _on(request, monkeypatch) -> Iterator[str]:
    name = request.param
    built = request.getfixturevalue("emulated" if name == "emulated" else "built")
    monkeypatch.setenv("SECATEUR_NATIVE", "0" if name == "torch" else "1")
    if built is None and name != "torch":
        pytest.skip("the native kernels cannot be built here: no C++ compiler")
    monkeypatch.setattr(native, "FILE", built or native.FILE)
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    native._opened.cache_clear()
    if name in kernels.LEVELS:
        if kernels.LEVELS.index(name) > kernels.level():
            pytest.skip(f"this machine has no {name}")
        monkeypatch.setenv(kernels.ENVIRONMENT, name)
    yield name
    monkeypatch.undo()
    native._opened.cache_clear()
