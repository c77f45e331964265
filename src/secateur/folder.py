"""A run's output folder: written beside its place and renamed into it once, by one process at a time.

A run writes into a hidden sibling, `.NAME.secateur-partial`, which is renamed to NAME when the run has
succeeded, so whatever is called NAME is finished. A lock on a second sibling, `.NAME.secateur-lock`, lets one
process at a time work on NAME; the kernel drops it with the process, so a killed run leaves no stale lock.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import FolderInUseError, UsageError, nearest
from secateur.manifest import (
    MANIFEST,
    STATE,
    full_disk,
    read_manifest,
    sha256,
    unlisted,
    verify,
    write_json,
    write_manifest,
    write_text,
)

__all__ = [
    "MANIFEST",
    "interrupted",
    "is_run_folder",
    "new_folder",
    "read_manifest",
    "sha256",
    "told",
    "verify",
    "write_json",
    "write_manifest",
    "write_text",
]


@contextmanager
def new_folder(path: str | Path, if_exists: str = "fail") -> Iterator[Path]:
    """Give a folder to write in that takes the place of `path` when the block succeeds, and never before.

    Args:
        path: the folder wanted; missing parents are made. Symbolic links and files are refused.
        if_exists: "fail" refuses a `path` that holds anything, and an interrupted run that left its state in
            run/state; "overwrite" starts anew and replaces an earlier run's folder, in one step, after
            success; "resume" goes on in the interrupted run's own folder where there is one, and is "fail"
            otherwise.

    Yields:
        The hidden sibling to write in. A block that raises leaves nothing, unless run/state holds something:
        then the sibling stays for "resume". After success the manifest is written and run/state removed.

    Raises:
        FolderInUseError: another process, or another thread of this one, works on `path`.
        UsageError: `path` is taken, is no run's folder, or cannot be written to.
        ResourceError: the disk is full; earlier results are as they were.

    Cost:
        One read of all files for the manifest.
    """
    if if_exists not in (choices := ("fail", "overwrite", "resume")):
        raise UsageError(f'if_exists="{if_exists}" is not known; {nearest(if_exists, choices)}.')
    target = _target(path)
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        partial = _sibling(target, "partial")
        with told(target):
            _clear(target, partial)
            _refuse(target, partial, if_exists)
            _begin(target, partial, if_exists)
        try:
            yield partial
            with told(target):
                _place(partial, target)
        except BaseException as error:
            if not _holds_state(partial):
                shutil.rmtree(partial, ignore_errors=True)
                _permission(target).unlink(missing_ok=True)
            if (full := full_disk(error, target)) is not None:
                raise full from error
            raise


def interrupted(path: str | Path) -> Path | None:
    """The folder in which an interrupted run of `path` left its state, None where none is."""
    partial = _sibling(_target(path), "partial")
    return partial if _holds_state(partial) else None


def is_run_folder(path: str | Path) -> bool:
    """Whether `path` is a finished run's folder: a marked manifest that lists everything in it."""
    return unlisted(path) is None


def _target(path: str | Path) -> Path:
    """The absolute place asked for, parents resolved; the last component itself must be no link and no file."""
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()
    with told(path):
        target = path.parent.resolve() / path.name
        if not path.name or target == Path.cwd():
            raise UsageError(
                f"{target}: a run replaces its folder as a whole; name a new folder inside this one."
            )
        if target.is_symlink():
            raise UsageError(f"{target} is a symbolic link; give the folder itself.")
        if os.path.lexists(target) and not target.is_dir():
            raise UsageError(f"{target} is a file; give the name of a folder.")
    return target


def _sibling(target: Path, kind: str) -> Path:
    name = target.name
    if len(os.fsencode(name)) > 220:  # the sibling's name must fit in 255 bytes as well
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.with_name(f".{name}.secateur-{kind}")


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the exclusive lock of `target`, or raise at once."""
    place = _sibling(target, "lock")
    while True:
        with told(target):
            lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                if not isinstance(error, BlockingIOError):
                    raise
                raise FolderInUseError(
                    f"{target}: another process works in this folder; wait for it or choose another folder."
                ) from error
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)  # the holder before us removed the file between our open and our lock: take the new one
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # while held, so that nobody can lock a name about to vanish
        os.close(lock)


def _clear(target: Path, partial: Path) -> None:
    """Undo or finish what a run that died in the middle of a swap left; needs the lock."""
    old = _sibling(target, "old")
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
    if (target / STATE).is_dir() and is_run_folder(target):  # it died right after the swap
        shutil.rmtree(target / STATE)
    if not _holds_state(partial):
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        _permission(target).unlink(missing_ok=True)


def _refuse(target: Path, partial: Path, if_exists: str) -> None:
    """Raise where the folder, or an interrupted run's state, must not be touched."""
    if _occupied(target):
        reason = unlisted(target)
        if reason is not None:
            raise UsageError(f"{target} is not empty and not overwritten: {reason}. Choose another folder.")
        if if_exists == "fail" or (if_exists == "resume" and not _permission(target).is_file()):
            raise UsageError(
                f"{target} already holds a finished result; choose another folder, or replace it with "
                f'if_exists="overwrite" (--if-exists overwrite).'
            )
    if if_exists == "fail" and partial.exists():
        raise UsageError(
            f'{target}: a run was interrupted here and left its state; continue it with if_exists="resume" '
            f'(--if-exists resume), or start anew with "overwrite".'
        )


def _begin(target: Path, partial: Path, if_exists: str) -> None:
    """Make the folder to write in, or keep the interrupted run's where that is to go on."""
    if partial.exists():
        if if_exists == "resume":
            (partial / MANIFEST).unlink(missing_ok=True)  # no longer true once the run goes on
            return
        shutil.rmtree(partial)
    partial.mkdir()
    if if_exists == "overwrite":
        _permission(target).touch()  # a resume of this run may replace the old result as well


def _place(partial: Path, target: Path) -> None:
    """Give the finished folder its name, in exchange with an earlier result where that is allowed."""
    for leftover in partial.rglob(".*.tmp"):  # a write that a kill cut short, before this run was resumed
        leftover.unlink()
    _open_up(partial)
    write_manifest(partial)
    _flush(partial)
    if not _occupied(target):
        os.rename(partial, target)
        _flush(target.parent)
    elif _permission(target).is_file() and is_run_folder(target):
        _exchange(partial, target)
        _flush(target.parent)
        shutil.rmtree(partial, ignore_errors=True)  # what resists is removed by the next run
    else:
        spare = tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent)
        os.rename(partial, spare)
        raise UsageError(f"{target} was taken while the run worked; the result is in {spare} instead.")
    shutil.rmtree(target / STATE, ignore_errors=True)  # last: until the result is in place it is all there is
    _permission(target).unlink(missing_ok=True)


def _open_up(folder: Path) -> None:
    """Give files the permissions that the umask gave the folder; transformers' safetensors are for the owner alone."""
    wanted = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | wanted)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names in one step where the system can, else in steps that `_clear` can undo."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is not None and rename(-100, os.fsencode(new), -100, os.fsencode(old), 2) == 0:
        return  # -100 is AT_FDCWD, 2 is RENAME_EXCHANGE
    aside = _sibling(old, "old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def _occupied(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _holds_state(partial: Path) -> bool:
    return not partial.is_symlink() and _occupied(partial / STATE)


def _permission(target: Path) -> Path:
    """The empty file that says that the run under way was told to overwrite."""
    return _sibling(target, "overwrite")


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one clear line about `target`."""
    try:
        yield
    except OSError as error:
        if (full := full_disk(error, target)) is not None:
            raise full from error
        raise UsageError(f"{target}: cannot be written here ({error.strerror}: {error.filename}).") from error
