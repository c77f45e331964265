"""The native kernels as they are in this tree, for the tests: that of the installation, or compiled anew."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from secateur.core import native

BUILD = Path(__file__).resolve().parents[1] / "native" / "build.py"


def library(target: Path) -> Path | None:
    """The kernels; that of the installation where it is of these sources, but for `make test-sanitized`."""
    newest = max(
        file.stat().st_mtime for file in BUILD.parent.iterdir() if file.suffix in (".cpp", ".h", ".py")
    )
    sanitized = "SECATEUR_SANITIZED" in os.environ
    if not sanitized and native.FILE.is_file() and native.FILE.stat().st_mtime > newest:
        return native.FILE
    return compiled(target)


def compiled(target: Path, *flags: str) -> Path | None:
    """The kernels, None without a compiler; where one is there, sources that it refuses fail the test."""
    script = runpy.run_path(str(BUILD))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(
            "LD_PRELOAD", raising=False
        )  # a sanitizer is for the tests, and makes a compiler very slow
        reason = script["build"](target, flags)
    if reason is not None and script["compiler"]() is not None:
        pytest.fail(f"the native kernels do not build: {reason}")
    return target if reason is None else None
