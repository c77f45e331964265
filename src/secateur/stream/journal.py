"""What a run has done so far, and what it was asked, for the one that goes on after it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import read_object
from secateur.errors import InputError, UsageError
from secateur.folder import interrupted, write_json
from secateur.manifest import STATE

__all__ = ["ANEW", "Before", "Journal", "asked_before"]

ANEW = 'start anew with if_exists="overwrite" (--if-exists overwrite)'


class Journal:
    """What is done, one line a unit, each after the disk has taken what it speaks of.

    Args:
        folder: the folder being written.
        facts: what decides the result; a journal of other facts is refused.
        asked: the caller's own words, for a later resume; those of the first start hold.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], asked: Mapping[str, Any] | None):
        state = folder / STATE
        self.asked = asked
        self.path = state / "journal.jsonl"
        self.done: dict[str, Any] = {}
        if not (state / "facts.json").is_file():
            state.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
            if asked is not None:
                around = {"directory": os.getcwd(), "threads": torch.get_num_threads()}
                write_json(state / "asked.json", {"asked": dict(asked), **around})
            write_json(state / "facts.json", dict(facts))
            return
        self._check(read_object(state / "facts.json"), json.loads(json.dumps(dict(facts))))
        if (state / "asked.json").is_file():
            self.asked = read_object(state / "asked.json").get("asked")
        try:
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # a line that a kill cut short says nothing
                    self.done.update(json.loads(line))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.path}: not readable ({error}); {ANEW}") from error

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name, value in now.items():
            then = before.get(name)
            if then == value:
                continue
            if isinstance(then, dict) and isinstance(value, dict):
                files = sorted(key for key in {*then, *value} if then.get(key) != value.get(key))
                said = f"{name} is another one: {', '.join(files[:3])} changed"
            else:
                said = f"{name} was {_short(then)} and is {_short(value)} now"
            raise UsageError(f"the interrupted run cannot be continued: {said}. Give what it had, or {ANEW}")

    def add(self, entries: Mapping[str, Any]) -> None:
        """Append entries; they are on the disk when this returns."""
        self.done.update(entries)
        whole = self.path.read_bytes()
        with open(self.path, "r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(dict(entries)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


@dataclass(frozen=True)
class Before:
    """What an interrupted run was asked.

    Attributes:
        asked: the caller's own words.
        directory: where it was started, for paths in them.
        threads: of torch.
    """

    asked: dict[str, Any]
    directory: str
    threads: int


def asked_before(target: str | Path) -> Before | None:
    """What a run of `target` that was interrupted was asked; None where none was, or one without words.

    Raises:
        InputError: the state is damaged.
    """
    folder = interrupted(target)
    path = None if folder is None else folder / STATE / "asked.json"
    if path is None or not path.is_file():
        return None
    found = read_object(path)
    try:
        asked, directory, threads = found["asked"], found["directory"], found["threads"]
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}; {ANEW}") from None
    if not (isinstance(asked, dict) and isinstance(directory, str) and isinstance(threads, int)):
        raise InputError(f"{path}: not what a run wrote there; {ANEW}")
    return Before(asked, directory, threads)
