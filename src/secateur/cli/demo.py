"""The verb `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Threads, app, use_threads

__all__ = ["demo"]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("secateur-demo"),
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "overwrite",
    texts: Annotated[
        list[str] | None, typer.Option("--text", help="more text to measure on; repeatable")
    ] = None,
    threads: Threads = None,
) -> None:
    """Prune a small real language model and a digit classifier, and show what it cost."""
    use_threads(threads)
    from secateur.demo import run_demo
    from secateur.terminal import progress

    with progress() as tell:
        written = run_demo(out, texts=texts or [], if_exists=if_exists, tell=tell, say=typer.echo)
    typer.echo(f"report   {written}")
