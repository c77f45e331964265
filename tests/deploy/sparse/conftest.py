"""The native kernels of this tree, and each path in turn: AMX, AVX-512, AVX2, plain C++, torch.

AMX and AVX-512 run where a machine has them; everywhere their kernels are also built with instructions in plain C++.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from secateur.core import native
from secateur.deploy.sparse import kernels

from ...library import compiled, library

INSTEAD = Path(__file__).resolve().parents[2] / "native"  # the header of instructions in plain C++
EMULATED = {"emulated": "avx512", "emulated amx": "amx"}
IN_PLAIN = [pytest.param(name, marks=pytest.mark.thorough) for name in EMULATED]
PATHS = ("amx", "avx512", *IN_PLAIN, "avx2", "plain", "torch")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path | None:
    """The library, None where there is no compiler."""
    return library(tmp_path_factory.mktemp("native") / native.FILE.name)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path | None:
    """The library with AVX-512 and AMX in plain C++."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    target = tmp_path_factory.mktemp("emulated") / native.FILE.name
    return compiled(target, "-O1", "-DSECATEUR_EMULATED_AVX512", "-I", str(INSTEAD))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> Iterator[str]:
    """A test that uses this runs once on each path."""
    yield from _on(request, monkeypatch)


@pytest.fixture(params=("best", IN_PLAIN[-1]))
def fast(request, monkeypatch) -> Iterator[str]:
    """The best kernels that this machine has, and those of AMX, which take AVX-512's for few tokens."""
    yield from _on(request, monkeypatch)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Graphs of other tests do not count towards how often a layer may be compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _on(request, monkeypatch) -> Iterator[str]:
    name = request.param
    built = request.getfixturevalue("emulated" if name in EMULATED else "built")
    monkeypatch.setenv("SECATEUR_NATIVE", "0" if name == "torch" else "1")
    if built is None and name != "torch":
        pytest.skip("the native kernels cannot be built here: no C++ compiler")
    monkeypatch.setattr(native, "FILE", built or native.FILE)
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    native._opened.cache_clear()
    wanted = EMULATED.get(name, name)
    if wanted in kernels.LEVELS:
        if kernels.LEVELS.index(wanted) > kernels.level():
            pytest.skip(f"this machine has no {wanted}")
        monkeypatch.setenv(kernels.ENVIRONMENT, wanted)
    yield name
    monkeypatch.undo()
    native._opened.cache_clear()
