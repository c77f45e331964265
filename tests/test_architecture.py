"""The rules of docs/architecture.md, read from the import statements and from what a fresh process loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "secateur"
AXES = ["score", "pattern", "allocate", "recover", "deploy", "evaluate", "report", "align"]
# packages of the extras; importing one of them takes seconds, or fails where the extra is not installed
HEAVY = {
    "transformers",
    "tokenizers",
    "plotly",
    "sklearn",
    "rouge_score",
    "lm_eval",
    "pyarrow",
    "datasets",
    "accelerate",
    "lightning",
    "scipy",
    "torchao",
    "matplotlib",
    "wandb",
    "ray",
}
SMALL = {"torch", "numpy", "jaxtyping", "safetensors", "secateur", *sys.stdlib_module_names}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that is carried out, and whether that happens inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif not type_checking_only(child):
            yield from statements(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def meant(module: str, statement: ast.Import | ast.ImportFrom) -> set[str]:
    """Full names of the modules that a statement loads; names that are no modules count for where they are."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    start = statement.module or ""
    if statement.level:
        package = module.split(".")
        if FILES[module].name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - statement.level + 1]
        start = ".".join([*package, *([start] if start else [])])
    return {name if (name := f"{start}.{alias.name}") in FILES else start for alias in statement.names}


@cache
def imports(module: str, *, on_loading: bool = False) -> frozenset[str]:
    """Everything that a module imports; with `on_loading` only what is loaded along with it."""
    found = statements(tree(module))
    return frozenset(
        name for each, inside in found if not (on_loading and inside) for name in meant(module, each)
    )


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if below(name, "secateur")}


def modules_of(package: str) -> list[str]:
    return [module for module in FILES if below(module, f"secateur.{package}")]


def test_the_imports_are_read_as_python_reads_them():
    """A test that finds no imports would find no broken rule."""
    assert {"torch", "secateur.core.site", "secateur.core.masks", "secateur.recipes"} <= imports(
        "secateur.prune"
    )
    assert "secateur.pattern.shapes" in imports("secateur.pattern")
    assert "secateur.errors" in imports("secateur.report.page")  # relative
    assert "secateur.prune" not in imports("secateur")  # only for the type checker
    assert "safetensors" not in imports("secateur.core.masks", on_loading=True)
    assert any(below(name, "safetensors") for name in imports("secateur.core.masks"))


@pytest.mark.parametrize("module", modules_of("core"))
def test_core_imports_torch_and_little_else(module):
    others = {name for name in imports(module) if name.split(".")[0] not in SMALL}
    assert not others
    assert not {name for name in ours(module) if not below(name, "secateur.core", "secateur.errors")}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_imports_core_and_errors_and_nothing_of_another_axis(axis):
    allowed = ("secateur.core", "secateur.errors", "secateur.measurement", f"secateur.{axis}")
    found = modules_of(axis)
    assert found
    for module in found:
        # the package itself is named for its version, which names no other part
        assert not {name for name in ours(module) if name != "secateur" and not below(name, *allowed)}, module


@pytest.mark.parametrize("axis", ["score", "pattern", "allocate", "recover"])
def test_an_axis_of_pruning_needs_no_extra(axis):
    for module in modules_of(axis):
        assert {name.split(".")[0] for name in imports(module)} <= SMALL, module


@pytest.mark.parametrize("axis", ["evaluate", "report"])
def test_judging_and_showing_know_neither_masks_nor_recipes(axis):
    unknown = (
        "secateur.core.masks",
        "secateur.core.where",
        "secateur.recipes",
        "secateur.prune",
        "secateur.mend",
    )
    for module in modules_of(axis):
        assert not {name for name in ours(module) if below(name, *unknown)}, module


@pytest.mark.thorough
def test_no_import_cycle():
    """Imports inside functions included: they hide a cycle, they do not remove it."""
    graph = {module: {name for name in ours(module) if name in FILES and name != module} for module in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                walk(name, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("module", FILES)
def test_heavy_packages_are_imported_where_they_are_used(module):
    assert not {name for name in imports(module, on_loading=True) if name.split(".")[0] in HEAVY}


def test_one_function_writes_files_of_tensors():
    """Any other would write them for the owner alone, whatever the umask says."""
    writers = ("save_file", "serialize_file")
    assert [module for module, file in FILES.items() if any(word in file.read_text() for word in writers)] == [
        "secateur.core.stored"
    ]


# the user's own file.py, named on their own command line, is code and is meant to be
OWN = "secateur.own"


@pytest.mark.parametrize("module", [module for module in FILES if module != OWN])
def test_data_never_become_code(module):
    """Trap 12: no pickle, no eval; a name in a file is looked up in a table of ours or refused."""
    names = {name.split(".")[0] for name in imports(module)}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load"}, (
                node.lineno
            )
            if called == "torch.load":
                assert "weights_only" in {keyword.arg for keyword in node.keywords}, node.lineno


def loaded_by(program: str) -> set[str]:
    """The outermost packages that a fresh process has loaded after a program."""
    code = f"{program}\nimport sys\nprint(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_importing_the_package_loads_none_of_the_large_packages():
    loaded = loaded_by("import secateur\nsecateur.__all__\ndir(secateur)")
    assert "secateur" in loaded
    assert not loaded & {"torch", "numpy", *HEAVY}


@pytest.mark.thorough
def test_pruning_loads_torch_and_no_extra():
    loaded = loaded_by(
        "import secateur\nsecateur.prune_, secateur.sparsity, secateur.Measurement, secateur.Masks"
    )
    assert {"secateur", "torch"} <= loaded
    assert not loaded & HEAVY


def test_help_loads_none_of_the_large_packages():
    program = (
        "import runpy, sys\n"
        "sys.argv = ['secateur', '--help']\n"
        "try:\n    runpy.run_module('secateur', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    loaded = loaded_by(program)
    assert {"secateur", "typer"} <= loaded
    assert not loaded & {"torch", "numpy", *HEAVY}


def test_every_file_that_the_architecture_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("## Files")[1].split("```")[1]
    named = [word.rstrip(",") for line in block.splitlines() for word in re.split(r"  +", line)[0].split()]
    assert len(named) > 10
    assert not [name for name in named if "/" in name or name.endswith(".py") if not (PACKAGE / name).exists()]
