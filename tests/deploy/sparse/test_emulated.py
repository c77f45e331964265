"""AVX-512 instructions in plain C++ do what AVX2 and BMI2 do to parts of a vector; the unit compiles as it is."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess

import pytest

from ...library import BUILD
from .conftest import INSTEAD

pytestmark = pytest.mark.thorough
BASELINE = ("-std=c++17", "-O1", "-ffp-contract=off")


@pytest.fixture(scope="module")
def compiler() -> str:
    found = runpy.run_path(str(BUILD))["compiler"]()
    if found is None or shutil.which(found.split()[0]) is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no C++ compiler for x86-64")
    return found.split()[0]


def test_emulated_instructions_agree_with_narrower_ones(compiler, tmp_path):
    from secateur.deploy.sparse import kernels

    if kernels.level() < 1:
        pytest.skip("this machine has no avx2")
    program = tmp_path / "check"
    source = INSTEAD / "check_emulated.cpp"
    subprocess.run([compiler, *BASELINE, f"-I{INSTEAD}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_all_levels_agree_without_python(compiler, tmp_path):
    from secateur.deploy.sparse import kernels

    if kernels.level() < 1:
        pytest.skip("this machine has no avx2")
    program, sources = tmp_path / "levels", [*BUILD.parent.glob("sparse*.cpp"), BUILD.parent / "pool.cpp"]
    flags = [*BASELINE, "-pthread", f"-I{INSTEAD}", f"-I{BUILD.parent}", "-DSECATEUR_EMULATED_AVX512"]
    names = [str(source) for source in (*sources, INSTEAD / "check_levels.cpp")]
    subprocess.run([compiler, *flags, *names, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "level 2: 8288 products compared, 0 differ so far" in done.stdout


def test_the_unit_compiles_with_the_real_instructions(compiler, tmp_path):
    """Not only into a unit that stands for nothing."""
    unit = tmp_path / "unit.s"
    source = BUILD.parent / "sparse_avx512.cpp"
    subprocess.run([compiler, *BASELINE, "-S", str(source), "-o", str(unit)], check=True)
    text = unit.read_text()
    for instruction in ("vpexpandb", "vpexpandw", "vexpandps", "vpcompressb", "vpdpbusd", "vpmultishiftqb"):
        assert instruction in text
