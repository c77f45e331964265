"""The files of a run: written whole or not at all, listed with their checksums, and checked against the list.

`MANIFEST.sha256` has the format of sha256sum, which can check it; its first line, a comment to sha256sum,
marks a folder as one that a run wrote.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.errors import InputError, NumericError, ResourceError, UsageError

__all__ = [
    "MANIFEST",
    "STATE",
    "check_listed",
    "check_run",
    "full_disk",
    "read_manifest",
    "sha256",
    "unlisted",
    "verify",
    "write_json",
    "write_manifest",
    "write_text",
]

MANIFEST = "MANIFEST.sha256"
STATE = "run/state"  # what resume needs: no part of the result
_HEADER = "# secateur run folder"
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  ([^\n]+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_LIMIT = 64 * 2**20  # bytes: half a million files; more is no manifest of a run


def write_manifest(folder: str | Path) -> Path:
    """Write MANIFEST.sha256, one line per file in the order of the paths; `sha256sum -c` reads it.

    Hidden files and run/state are left out: they are no part of the result.

    Args:
        folder: the folder whose files are listed by their relative paths.

    Returns:
        The manifest's path.

    Raises:
        UsageError: the folder is missing, or holds a symbolic link, a special or an unreadable file.
        ResourceError: the disk is full.

    Cost:
        One read of all files, each of which the disk has taken before it is listed.
    """
    root = _folder(folder)
    entries = {}
    for name, kind in _walk(root):
        if kind != "file":
            raise UsageError(f"{root / name}: {kind} in a run's folder; put the file itself there.")
        entries[name] = sha256(root / name, flush=True)
    write_text(root / MANIFEST, _render(entries))
    return root / MANIFEST


def read_manifest(folder: str | Path) -> dict[str, str]:
    """The manifest as relative path -> SHA-256 in hexadecimal.

    Raises:
        InputError: the manifest is missing, is none that a run wrote, or names paths outside the folder.
    """
    entries, problems = _parse(Path(folder))
    if problems:
        raise InputError(f"{Path(folder) / MANIFEST} {problems[0]}.")
    return entries


def check_listed(folder: str | Path, found: Mapping[str, str]) -> None:
    """Compare files with the manifest of the run that wrote the folder; without a manifest there is nothing to compare.

    Args:
        folder: where they lie.
        found: relative path -> SHA-256 in hexadecimal.

    Raises:
        InputError: a file is altered or was added after the run, or the manifest is unsound.
    """
    root = Path(folder)
    if not found or not (root / MANIFEST).is_file():
        return
    listed = read_manifest(root)
    for name, digest in found.items():
        if listed.get(name) != digest:
            what = "is altered since the run wrote it" if name in listed else "was added after the run"
            raise InputError(
                f"{root / name}: {what}, says {MANIFEST}; restore it, or remove {MANIFEST} to accept it."
            )


def check_run(folder: str | Path, known: Container[str] = ()) -> None:
    """Refuse a run's folder of which a file is altered: what is made of it would stand for a run that never was.

    Files that were taken away or added are no obstacle; a folder without a manifest is none of a run.

    Args:
        folder: a run's folder.
        known: relative paths that have been compared.

    Raises:
        InputError: a file is altered, or the manifest is unsound.

    Cost:
        One read of all other files.
    """
    root = Path(folder)
    if (root / MANIFEST).is_file():
        names = [name for name in read_manifest(root) if name not in known and (root / name).is_file()]
        check_listed(root, {name: sha256(root / name) for name in names})


def verify(folder: str | Path) -> list[str]:
    """Compare a run's folder with its manifest; an empty list means that every file is as it was written.

    Nothing outside the folder is opened: symbolic links are problems themselves and never followed, and a
    manifest line with `..`, an absolute path or a path through a link is reported, not obeyed.

    Args:
        folder: a run's folder.

    Returns:
        One line per problem: missing, altered, extra or unreadable files, links, and what is wrong in the
        manifest itself; a single line where there is no manifest.

    Raises:
        UsageError: `folder` is no folder.

    Cost:
        One read of all files.
    """
    root = _folder(folder)
    entries, wrong = _parse(root)
    problems = [f"{MANIFEST} {problem}" for problem in wrong]
    if not os.path.lexists(root / MANIFEST):
        return [
            f"{problems[0]}, so nothing says which files belong here and whether they are as they were written"
        ]
    present = dict(_walk(root))
    for name, expected in entries.items():
        if (kind := present.get(name)) is None:
            problems.append(f"{name}: missing")
        elif kind == "file":
            try:
                found = sha256(root / name)
            except OSError as error:
                problems.append(f"{name}: unreadable ({error.strerror})")
                continue
            if found != expected:
                problems.append(
                    f"{name}: altered (SHA-256 {found[:12]}..., the manifest says {expected[:12]}...)"
                )
    problems += [f"{name}: {kind}" for name, kind in sorted(present.items()) if kind != "file"]
    problems += [f"{name}: extra, not in the manifest" for name in sorted(present) if name not in entries]
    return problems


def unlisted(folder: str | Path) -> str | None:
    """Why `folder` is not wholly a run's own: no marked manifest, or something in it that no run wrote.

    Hidden entries count here, so that a folder in which somebody keeps a `.git` is not taken for ours.

    Returns:
        The reason, None where the manifest lists everything that is there.
    """
    root = Path(folder)
    entries, problems = _parse(root)
    if problems:
        return f"it is not the folder of a run ({MANIFEST} {problems[0]})"
    for name, kind in _walk(root, hidden=True):
        if name not in entries or kind != "file":
            return f"{name} in it is not a file that a run wrote"
    return None


def sha256(path: str | Path, *, flush: bool = False) -> str:
    """SHA-256 of a file in hexadecimal; with `flush` only after the disk has taken the file."""
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: beside, flushed, then renamed over what was there.

    Raises:
        ResourceError: the disk is full; the earlier file is as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if (full := full_disk(error, path)) is not None:
            raise full from error
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all.

    Raises:
        NumericError: a number is NaN or infinite, which JSON cannot hold.
        ResourceError: the disk is full; the earlier file is as it was.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise NumericError(f"{path}: {error}; leave the value out or measure again.") from error
    write_text(path, text + "\n")


def full_disk(error: BaseException, path: Path) -> ResourceError | None:
    """The error to raise where `error` means a full disk, also from a library that passes on only its text."""
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    else:
        full = isinstance(error, Exception) and "No space left on device" in str(error)
    if not full:
        return None
    return ResourceError(
        f"{path}: no space left on the disk; earlier results are intact. Free some and run again."
    )


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; give the folder that a run wrote.")
    return root


def _walk(root: Path, below: str = "", *, hidden: bool = False) -> Iterator[tuple[str, str]]:
    """Relative path and kind of everything below `root`, sorted in each folder; links are never followed."""
    try:
        with os.scandir(root / below) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError:
        yield below.rstrip("/"), "unreadable folder"
        return
    for entry in entries:
        name = below + entry.name
        if name in (MANIFEST, STATE):
            continue
        if entry.name.startswith("."):
            if hidden:
                yield name, "hidden"
            continue
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(root, name + "/", hidden=hidden)
        elif stat.S_ISREG(mode):
            yield name, "file"
        else:
            yield name, "symbolic link" if stat.S_ISLNK(mode) else "special file"


def _render(entries: dict[str, str]) -> str:
    lines = [_HEADER]
    for name, digest in sorted(entries.items()):
        escaped = re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name)  # as sha256sum writes such names
        lines.append(("\\" if escaped != name else "") + f"{digest}  {escaped}")
    return "\n".join(lines) + "\n"


def _parse(root: Path) -> tuple[dict[str, str], list[str]]:
    """The manifest's safe entries, and what is wrong with the manifest; hostile lines give no entry."""
    path = root / MANIFEST
    if path.is_symlink() or not path.is_file():
        return {}, ["is no regular file" if os.path.lexists(path) else "is missing"]
    if path.stat().st_size > _LIMIT:
        return {}, [f"is larger than {_LIMIT} bytes"]
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    header, *lines = text.split("\n")
    if header != _HEADER:
        return {}, [f'does not begin with the line "{_HEADER}"']
    entries: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines[:-1], start=2):
        found = _LINE.fullmatch(line)
        if found is None:
            problems.append(f"has a line {number} that is not of the form SHA-256, two blanks, path")
            continue
        escaped, digest, name = found.groups()
        if escaped:
            name = re.sub(r"\\([\\nr])", lambda pair: {"\\": "\\", "n": "\n", "r": "\r"}[pair[1]], name)
        plain = name == str(PurePosixPath(name)) and "\0" not in name
        if not plain or name.startswith("/") or name == "." or ".." in name.split("/"):
            problems.append(
                f"has a line {number} with a path outside the folder or not in plain form: {name!r}"
            )
        elif name in entries:
            problems.append(f"has a line {number} that lists {name!r} a second time")
        else:
            entries[name] = digest
    if not problems and text != _render(entries):
        problems.append("is not in the form in which it was written")
    return entries, problems
