"""The verb `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, app

__all__ = ["verify"]


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a run's folder")], json_: Json = False) -> None:
    """Check a run's folder: every file as it was written, masks readable, zeros really zero."""
    from secateur.verification import checked, problems

    found = problems(folder)
    if json_:
        typer.echo(json.dumps({"folder": str(folder), "problems": found}))
    else:
        typer.echo("\n".join(found) if found else f"{folder}: every file is as it was written{checked(folder)}")
    if found:
        raise typer.Exit(3)
