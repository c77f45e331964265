"""Installing: the kernels go into a wheel of the platform, and without a compiler into none, which is said."""

from __future__ import annotations

import runpy
import shutil
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Hook:
    """What of hatchling the hook uses."""

    def __init__(self, root: Path):
        self.root, self.said = str(root), []
        self.app = types.SimpleNamespace(display_warning=self.said.append)


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """The build hook on a tree of its own, beside hatchling or without it."""
    if not (ROOT / "hatch_build.py").is_file():
        pytest.skip("the repository's build files are not here")
    interface: Any = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = Hook
    for name in (
        "hatchling",
        "hatchling.builders",
        "hatchling.builders.hooks",
        "hatchling.builders.hooks.plugin",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    (tmp_path / "src" / "secateur" / "core").mkdir(parents=True)
    (tmp_path / "native").mkdir()
    shutil.copy(ROOT / "native" / "build.py", tmp_path / "native")
    (tmp_path / "native" / "small.cpp").write_text('extern "C" int secateur_abi() { return 0; }\n')
    monkeypatch.delenv("SECATEUR_NATIVE", raising=False)
    return runpy.run_path(str(ROOT / "hatch_build.py"))["NativeKernels"](tmp_path)


@pytest.mark.parametrize("missing", ["/nowhere/c++", "false"])
def test_without_a_compiler_it_is_installed_all_the_same_and_says_so(hook, monkeypatch, missing):
    monkeypatch.setenv("CXX", missing)
    data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", data)
    assert data == {"artifacts": []}  # a wheel of pure Python
    assert hook.said[0].startswith("secateur is installed without its native kernels: ")
    assert missing in hook.said[0]


def test_no_compiler_anywhere_is_named_and_an_error_where_kernels_are_required(hook, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    hook.initialize("standard", {"artifacts": []})
    assert hook.said[0].endswith("no C++ compiler (c++, g++ or clang++) was found")
    monkeypatch.setenv("SECATEUR_NATIVE", "require")
    with pytest.raises(RuntimeError, match="the native kernels were not built: no C"):
        hook.initialize("standard", {"artifacts": []})


def test_with_a_compiler_the_wheel_is_of_the_platform_and_of_any_python(hook):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    data: dict[str, Any] = {"artifacts": []}
    hook.initialize("standard", data)
    assert data["artifacts"] == ["/src/secateur/core/kernels.native.so"]
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-")
    assert not hook.said


def test_the_release_requires_the_kernels_in_its_wheels():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the repository's build files are not here")
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    assert said["environment"]["SECATEUR_NATIVE"] == "require"
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "cibuildwheel" in workflow


def test_an_assembler_of_before_amx_is_asked_again_without_it(monkeypatch, tmp_path):
    """It refuses the unit as such assemblers do, and takes the rest."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-DSECATEUR_NO_AMX*) while [ "$1" != -o ]; do shift; done; echo made > "$2";;\n'
        '*) echo "Error: no such instruction: \\`ldtilecfg (%rax)\'" >&2; exit 1;; esac\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("SECATEUR_NATIVE", raising=False)
    target = tmp_path / "library.so"
    build = runpy.run_path(str(Path(__file__).resolve().parents[1] / "native" / "build.py"))["build"]
    assert build(target) is None
    assert target.read_text() == "made\n"
