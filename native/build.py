"""Compile the native kernels into the package: `python native/build.py`, and what an installation does.

One C++17 compiler call, no other tool: the functions are plain C, loaded with ctypes, so the library needs neither
Python's headers nor torch's and serves every version of them. Without a compiler nothing is built, and secateur
takes its torch path, which gives the same answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "src" / "secateur" / "core" / "kernels.native.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fvisibility=hidden"]


def compiler() -> str | None:
    """The compiler to use: `$CXX`, or the first of c++, g++ and clang++ that is there."""
    given = os.environ.get("CXX")
    return given if given else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(target: Path = TARGET, more: Sequence[str] = ()) -> str | None:
    """Compile, with more flags behind the usual ones; returns None when done, or the reason why there is no library.

    The library is written beside its place and renamed, so a process that has the old one open keeps it.
    """
    if os.environ.get("SECATEUR_NATIVE") == "0":
        return "SECATEUR_NATIVE=0"
    if os.name != "posix":
        return f"no native kernels for {os.name} yet"
    found = compiler()
    if found is None:
        return "no C++ compiler (c++, g++ or clang++) was found"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kernels-") as place:
        out = Path(place) / target.name
        sources = [str(path) for path in sorted(HERE.glob("*.cpp"))]
        command = [*found.split(), *FLAGS, *more, "-o", str(out), *sources]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "ldtilecfg" in done.stderr:  # an assembler of before AMX
                command.append("-DSECATEUR_NO_AMX")
                done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{found} cannot be run ({error})"
        if done.returncode:
            return f"{found} failed:\n{done.stderr.strip()[-2000:]}"
        os.replace(out, target)
    return None


def main() -> int:
    """Build in place and say so; 1 where nothing was built."""
    reason = build()
    print(f"native kernels: {TARGET}" if reason is None else f"no native kernels: {reason}")
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
