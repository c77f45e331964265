"""Compile the native kernels while secateur is installed; without a compiler it is installed without them."""

from __future__ import annotations

import os
import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Adds `secateur/core/kernels.native` to a wheel, or puts it into the source tree of an editable installation.

    `SECATEUR_NATIVE=0` leaves it out; `SECATEUR_NATIVE=require` makes it an error when it cannot be built.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before files are collected."""
        native = runpy.run_path(str(Path(self.root) / "native" / "build.py"))
        target: Path = native["TARGET"]
        target.unlink(missing_ok=True)  # never one of another machine
        reason = native["build"](target)
        if reason is None:
            build_data["artifacts"].append(f"/{target.relative_to(self.root)}")
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"  # plain C: any Python will do
        elif os.environ.get("SECATEUR_NATIVE") == "require":
            raise RuntimeError(f"the native kernels were not built: {reason}")
        else:
            self.app.display_warning(f"secateur is installed without its native kernels: {reason}")
