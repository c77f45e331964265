"""The one way in which tensors of ours become a safetensors file: whole or not at all, readable as any other file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from secateur.errors import ResourceError, UsageError

__all__ = ["save_tensors"]


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    *,
    flush: bool = False,
) -> None:
    """Write tensors beside, then rename: a kill leaves what was there before.

    safetensors writes for the owner alone, whatever the umask says; here the file gets the permissions of any other
    new file in that folder.

    Args:
        path: the file; its folder exists.
        tensors: contiguous, none sharing memory with another.
        header: text beside the tensors. Of several entries safetensors changes the order from process to process.
        flush: return only after the disk has taken the file.

    Raises:
        UsageError: the file cannot be written there.
        ResourceError: the disk is full; the earlier file is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.unlink(missing_ok=True)  # of a write that was killed, with permissions of its own
        beside.touch()
        mode = beside.stat().st_mode & 0o777  # what the umask, or the folder's default, gives a new file
        save_file(dict(tensors), beside, metadata=None if header is None else dict(header))
        beside.chmod(mode)
        if flush:
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        if "No space left" in str(error):
            raise ResourceError(
                f"{path}: no space left on the disk; the earlier file is intact. Free some and run again"
            ) from error
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UsageError(f"{path}: cannot be written here ({reason}); choose another place") from error
    finally:
        with suppress(OSError):
            beside.unlink()
