"""The verb `doctor`."""

from __future__ import annotations

import json

import typer

from secateur.cli.options import Json, app

__all__ = ["doctor"]


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this machine and this installation can do."""
    from secateur.doctor import findings

    found = findings()
    if json_:
        typer.echo(json.dumps(found))
    else:
        width = max(len(name) for name in found)
        typer.echo("\n".join(f"{name:{width}}  {value}" for name, value in found.items()))
