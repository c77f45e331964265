"""The user's own code runs as they wrote it, from a seed, and its errors are shown as theirs."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur import own
from secateur.errors import UsageError


def write(tmp_path: Path, source: str, name: str = "net.py") -> str:
    (tmp_path / name).write_text(source)
    return str(tmp_path / name)


def test_the_function_is_called_and_the_world_is_as_before(tmp_path: Path) -> None:
    path = write(
        tmp_path, "import random, numpy, torch\nimport beside\n\ndef build():\n    return beside.add(3)\n"
    )
    write(tmp_path, "def add(x):\n    return x + 1\n", "beside.py")
    before = list(sys.path), sorted(tmp_path.iterdir())
    assert own.call(f"{path}:build") == 4
    assert (list(sys.path), sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__")) == before
    assert not list(tmp_path.glob("__pycache__/net*"))
    del sys.modules["beside"]


def test_three_generators_start_from_the_seed_and_are_put_back(tmp_path: Path) -> None:
    source = "import random, numpy, torch\nat_import = torch.rand(1).item()\n\ndef draw():\n"
    path = write(
        tmp_path, source + "    return at_import, random.random(), numpy.random.rand(), torch.rand(1).item()\n"
    )
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = own.call(f"{path}:draw", seed=1)
    assert own.call(f"{path}:draw", seed=1) == first
    assert all(a != b for a, b in zip(own.call(f"{path}:draw", seed=2), first, strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match=rf"seed {seed} is not in \[0, 2\*\*32\)"):
            own.call(f"{path}:draw", seed=seed)


def test_an_edited_file_is_run_anew(tmp_path: Path) -> None:
    path = write(tmp_path, "def build():\n    return 1\n")
    assert own.call(f"{path}:build") == 1
    write(tmp_path, "def build():\n    return 2\n")  # the same size, within the same second
    assert own.call(f"{path}:build") == 2


def test_dataclasses_classes_and_other_encodings_work(tmp_path: Path) -> None:
    source = (
        "# -*- coding: latin-1 -*-\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    )
    (tmp_path / "net.py").write_bytes(
        (source + "@dataclass\nclass Net:\n    name: str = 'ä'\n").encode("latin-1")
    )
    assert own.call(f"{tmp_path / 'net.py'}:Net").name == "ä"


def test_finish_runs_among_the_users_code(tmp_path: Path) -> None:
    path = write(
        tmp_path, "import torch\n\ndef batches():\n    while True:\n        yield torch.rand(1).item()\n"
    )

    def two(found: object) -> list[object]:
        return [next(found), next(found)]  # type: ignore[call-overload]

    assert own.call(f"{path}:batches", finish=two) == own.call(f"{path}:batches", finish=two)
    broken = write(tmp_path, "def batches():\n    yield 1\n    raise KeyError('gone')\n", "broken.py")
    with pytest.raises(
        UsageError, match=r"broken.py:batches: this code of yours raised KeyError: 'gone'\n.*line 3"
    ):
        own.call(f"{broken}:batches", finish=list)


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("def build(): return 1", "net.py:biuld", "net.py: biuld is not in it; nearest: build."),
        ("build = 3\ndef make(): return 1", "net.py:build", "net.py: build is no function; known: make."),
        ("def build(width): return 1", "net.py:build", "build needs arguments (width), and is called without"),
        ("def build(*a, b=1, **k): return 1", "nett.py:build", "nett.py: no such file. Nearest there: net.py."),
        (
            "def build(): return 1",
            "net.py",
            'net.py" names no function; expected file.py:function, for example',
        ),
        ("def build(): return 1", "net.py:", "names no function"),
        ("def build(:", "net.py:build", "net.py:build: this code of yours raised File"),
        (
            "import nothing_of_this_name",
            "net.py:build",
            "raised ModuleNotFoundError: No module named 'nothing_of_this",
        ),
        ("raise SystemExit(2)", "net.py:build", "net.py:build: this code of yours raised SystemExit: 2"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, source: str, spec: str, message: str) -> None:
    write(tmp_path, source)
    with pytest.raises(UsageError, match=re.escape(message)):
        own.call(str(tmp_path / spec))


def test_an_exception_of_the_user_is_shown_with_the_end_of_its_own_traceback(tmp_path: Path) -> None:
    path = write(tmp_path, "def inner(x):\n    return 1 / x\n\n\ndef build():\n    return inner(0)\n")
    with pytest.raises(UsageError) as caught:
        own.call(f"{path}:build")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}:build: this code of yours raised ZeroDivisionError: division by zero"
    assert lines[1] == f'  File "{path}", line 6, in build'
    assert f'  File "{path}", line 2, in inner' in lines
    assert not any("secateur" in line for line in lines[1:])
    assert caught.value.exit_code == 2
    deep = write(tmp_path, "def build(n=900):\n    return build(n - 1) if n else 1 / 0\n", "deep.py")
    with pytest.raises(UsageError) as caught:
        own.call(f"{deep}:build")
    assert 5 < len(str(caught.value).splitlines()) < 30


def test_a_failed_file_leaves_no_module_behind(tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(UsageError):
        own.call(write(tmp_path, "1 / 0") + ":build")
    assert set(sys.modules) == before


def test_interrupting_is_not_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        own.call(write(tmp_path, "raise KeyboardInterrupt") + ":build")


def test_the_code_of_a_model_is_its_file_and_what_that_imports(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "parts_of_mine.py").write_text("from torch import nn\n\nclass Part(nn.Linear):\n    pass\n")
    path = write(tmp_path, "from parts_of_mine import Part\ndef build():\n    return Part(2, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = own.call(f"{path}:build")
    seen = {own.code_digest(f"{path}:build", model), own.code_digest("elsewhere", model)}
    write(tmp_path, Path(path).read_text() + "# another word\n")
    seen.add(own.code_digest(f"{path}:build", model))
    (tmp_path / "parts_of_mine.py").write_text("from torch import nn\nPart = nn.Linear\n")
    seen.add(own.code_digest(f"{path}:build", model))
    assert len(seen) == 4
    assert own.code_digest("a-folder", torch.nn.Linear(2, 2)) is None
    del sys.modules["parts_of_mine"]
