"""The file of measurements: versioned JSON in the user's cache folder, written beside and renamed.

`SECATEUR_CACHE` names another folder. A file that is not sound is measured anew, with a warning.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["ENVIRONMENT", "VERSION", "add", "place", "read"]

ENVIRONMENT = "SECATEUR_CACHE"
VERSION = 2
Rows = list[list[float]]


def place() -> Path:
    """Where the file is."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given) / "sparse.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secateur" / "sparse.json"


def read(rows: int, columns: int) -> dict[str, Rows]:
    """What earlier processes measured, tables of so many rows and columns by name.

    Nothing where there is no file, or one of another version; what is not sound is left out with a warning.
    """
    path = place()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return _doubted(path, type(error).__name__)
    if not isinstance(found, dict) or not isinstance(found.get("times"), dict):
        return _doubted(path, "it holds no table of times")
    if found.get("version") != VERSION:
        return {}
    times = {name: value for name, value in found["times"].items() if _sound(value, rows, columns)}
    if len(times) < len(found["times"]):
        _doubted(path, "some of its times are no times")
    return times


def add(times: Mapping[str, Rows], rows: int, columns: int) -> None:
    """Put measurements beside those that are there; where the file cannot be written they are taken again."""
    path = place()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said on reading
            content = {"version": VERSION, "times": {**read(rows, columns), **times}}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _doubted(path: Path, why: str) -> dict[str, Rows]:
    warnings.warn(f"{path}: not a sound file of measurements ({why}); measuring anew", stacklevel=3)
    return {}


def _sound(value: object, rows: int, columns: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(isinstance(x, float) and 0 < x <= 1e9 for row in value for x in row)
    )
