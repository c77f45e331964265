"""The command line: parses words, calls the library, prints; heavy imports happen inside the verbs.

One file a verb; what all verbs share is in `options`.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

# importing a verb adds it to the program, in the order of --help
from secateur.cli import (  # noqa: F401
    align,
    bench,
    demo,
    depth,
    doctor,
    evaluate,
    export,
    inspect,
    prune,
    resume,
    run,
    study,
    sweep,
    verify,
)
from secateur.cli.options import app
from secateur.errors import SecateurError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback."""
    try:
        app()
    except SecateurError as error:
        _leave(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and "allocate memory" not in str(error)
            and "out of memory" not in str(error)
        ):
            raise
        _leave("out of memory; use a smaller model, --dtype bfloat16 or fewer --samples", 4)
    except OSError as error:
        if error.filename is None or isinstance(error, ConnectionError):
            raise
        from secateur.manifest import full_disk

        if (full := full_disk(error, error.filename)) is not None:
            _leave(str(full), full.exit_code)
        _leave(f"{error.filename}: {error.strerror}; check the path and its permissions.", 3)
    except SystemExit as end:
        if end.code == 130:
            _leave("interrupted; nothing half-finished was left behind", 130)
        raise


def _leave(message: str, code: int) -> NoReturn:
    typer.echo(f"secateur: {message}", err=True)
    sys.exit(code)
