"""The user's own code, named on their own command line as `file.py:function`.

This is the one place where secateur runs code that is not its own, and only code that the user names: never
a name found in a checkpoint, a recipe or any other file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import UsageError, nearest

__all__ = ["call", "code_digest", "is_own", "near", "seeded", "split", "theirs"]

_SPEC = re.compile(r"(?P<file>.+\.py)(?::(?P<function>[^:@]*))?(?:@(?P<weights>.+))?")
_SHOWN = 6  # frames of the user's traceback


def is_own(spec: str) -> bool:
    """Whether `spec` names a function in a Python file.

    Example:
        >>> is_own("net.py:build"), is_own("net.py:build@net.safetensors"), is_own("org/net.pytorch")
        (True, True, False)
    """
    return _SPEC.fullmatch(spec) is not None


def split(spec: str) -> tuple[Path, str, str | None]:
    """Take `file.py:function@weights` apart; the weights are optional.

    Raises:
        UsageError: there is no function name.

    Example:
        >>> split("net.py:build@net.safetensors")
        (PosixPath('net.py'), 'build', 'net.safetensors')
    """
    found = _SPEC.fullmatch(spec)
    if found is None or not found["function"]:
        raise UsageError(
            f'"{spec}" names no function; expected file.py:function, for example {spec.split(":")[0]}:build.'
        )
    return Path(found["file"]).expanduser(), found["function"], found["weights"]


def call(spec: str, *, seed: int = 0, finish: Callable[[Any], Any] | None = None) -> Any:
    """Run the file afresh and call its function without arguments.

    The generators of torch, numpy and random start from `seed` and are put back afterwards, so the result
    depends on the seed alone. The file's folder can be imported from while the code runs, as with
    `python file.py`; nothing is written beside the file.

    Args:
        spec: `file.py:function`; a part from `@` on is not looked at.
        seed: in [0, 2**32).
        finish: applied to the result while the user's code may still run, as to draw from a generator.

    Returns:
        What the function returns, finished.

    Raises:
        UsageError: no such file or function, a function that needs arguments, or an exception in the user's
            code, which is shown with the end of its own traceback.
    """
    path, name, _ = split(spec)
    if not path.is_file():
        raise UsageError(f"{path}: no such file.{near(path.name, [p.name for p in path.parent.glob('*.py')])}")
    with seeded(seed), _importing_from(path.resolve().parent), theirs(f"{path}:{name}", path):
        result = _function(path, name)()
        return result if finish is None else finish(result)


def code_digest(spec: str, model: nn.Module) -> str | None:
    """SHA-256 of the code that a model computes by, as far as it is no library's; None where all of it is a library's.

    That is the file that `spec` names, and every file in which the class of a module stands that is not installed
    (a file imported from it, the code of a checkpoint): weights may be the same and mean something else.

    Example:
        >>> code_digest("a-folder", nn.Linear(2, 2)) is None
        True
    """
    found = {split(spec)[0].resolve()} if is_own(spec) else set()
    for kind in {type(module) for module in model.modules()}:
        place = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if place is not None and not _installed(Path(place)):
            found.add(Path(place).resolve())
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file())
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def _installed(path: Path) -> bool:
    """Whether a file belongs to Python, to an installed package (of whichever environment) or to secateur."""
    places = [*(sysconfig.get_path(key) for key in ("stdlib", "platstdlib")), str(Path(__file__).parent)]
    inside = any(Path(place).resolve() in path.resolve().parents for place in places)
    return inside or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)


def near(word: str, names: Iterable[str]) -> str:
    """A sentence that names what is there and looks like `word`, empty where nothing does.

    Example:
        >>> near("modle.py", ["model.py", ".git"])
        ' Nearest there: model.py.'
    """
    found = nearest(word, sorted(name for name in names if not name.startswith(".")) or [""])
    return f" Nearest there: {found.removeprefix('nearest: ')}." if found.startswith("nearest: ") else ""


@contextmanager
def theirs(who: str, path: Path) -> Iterator[None]:
    """Show an exception of the user's own code as theirs: what, and the end of its traceback from `path` on."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        first = next(
            (i for i, frame in enumerate(frames) if Path(frame.filename) == path.resolve()), len(frames)
        )
        tail = "".join(traceback.format_list(frames[first:][-_SHOWN:])).rstrip()
        what = " ".join("".join(traceback.format_exception_only(error)).split())
        raise UsageError(f"{who}: this code of yours raised {what}" + (f"\n{tail}" if tail else "")) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the generators of torch, numpy and random from `seed`, and put them back afterwards."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is not in [0, 2**32).")
    before = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _function(path: Path, name: str) -> Callable[[], Any]:
    """Execute the file as a module of its own and find the function in it."""
    source = path.read_bytes()
    module = types.ModuleType(f"{path.stem}_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]}")
    module.__file__ = str(path.resolve())
    sys.modules[module.__name__] = module  # dataclasses and typing look their module up
    try:
        code = compile(importlib.util.decode_source(source), str(path.resolve()), "exec", dont_inherit=True)
        exec(code, module.__dict__)  # what the user asked for, on their own command line
    except BaseException:
        del sys.modules[module.__name__]
        raise
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        said = "is no function" if hasattr(module, name) else "is not in it"
        raise UsageError(f"{path}: {name} {said}; {nearest(name, own)}.")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C: it will say itself what it needs
        parameters = []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    if needed:
        raise UsageError(
            f"{path}: {name} needs arguments ({', '.join(needed)}), and is called without; write a function "
            f"beside it that takes none and calls {name} with them."
        )
    return function
