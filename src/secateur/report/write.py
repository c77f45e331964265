"""A page on the disk, whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ..errors import ResourceError, UsageError

__all__ = ["write"]


def write(path: str | os.PathLike[str], html: str) -> Path:
    """Write a page so that a reader finds the old file or the new one, never half of it.

    The text goes to a file beside it, reaches the disk, and takes the name last.

    Args:
        path: the file's name; its folder exists.
        html: what `secateur.report.page` made.

    Returns:
        The path written.

    Raises:
        UsageError: the folder does not exist, or the path is a folder.
        ResourceError: the disk is full or read-only, or refuses; what was there before is intact.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"{target}: the folder {target.parent} does not exist. Make it first.")
    if target.is_dir():
        raise UsageError(f"{target} is a folder, expected the name of a file. Name one inside it.")
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with open(beside, "x", encoding="utf-8", newline="\n") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise ResourceError(
            f"{target}: the report could not be written ({error.strerror or error}). "
            f"Free the disk or choose another folder; nothing was changed."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return target
