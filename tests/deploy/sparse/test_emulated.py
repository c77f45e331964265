"""AVX-512 instructions in plain C++ do what AVX2 and BMI2 do to parts of a vector; the units compile as they are."""

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
    program, sources = tmp_path / "levels", sorted(BUILD.parent.glob("*.cpp"))
    flags = [*BASELINE, "-pthread", f"-I{INSTEAD}", f"-I{BUILD.parent}", "-DSECATEUR_EMULATED_AVX512"]
    names = [str(source) for source in (*sources, INSTEAD / "check_levels.cpp")]
    subprocess.run([compiler, *flags, *names, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "level 3: 18736 products compared, 0 differ so far" in done.stdout


@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        (
            "sparse_avx512.cpp",
            ("vpexpandb", "vpexpandw", "vexpandps", "vpcompressb", "vpdpbusd", "vpmultishiftqb"),
        ),
        ("squares_avx512.cpp", ("vpdpbusd", "vcompressps", "vpermd")),
        ("sparse_amx.cpp", ("vpexpandb", "vpexpandw", "ldtilecfg", "tileloadd", "tdpbssd", "tdpbf16ps")),
    ],
)
def test_the_units_compile_with_the_real_instructions(compiler, tmp_path, name, instructions):
    """Not only into units that stand for nothing."""
    unit = tmp_path / "unit.s"
    subprocess.run([compiler, *BASELINE, "-S", str(BUILD.parent / name), "-o", str(unit)], check=True)
    text = unit.read_text()
    for instruction in instructions:
        assert instruction in text
