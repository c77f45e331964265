"""The verb `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, Offline, Pickle, Threads, Trust, app, use_threads
from secateur.cli.stages import carry_out_stages, tell_stages

__all__ = ["run"]


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="YAML file: the model, the data, the stages")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    if_exists: Annotated[str, typer.Option("--if-exists", help="resume, fail or overwrite")] = "resume",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="run the file.py:function that the experiment names")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the file, say the stages and stop")] = False,
    threads: Threads = None,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Carry out an experiment: stages that follow each other, measured after each; an interrupted one goes on."""
    from secateur.pipeline.spec import read_experiment

    asked = read_experiment(experiment)
    if dry_run:
        tell_stages(asked, json_)
        return
    use_threads(threads)
    loading = (offline, trust_remote_code, allow_pickle)
    carry_out_stages(asked, out, loading, if_exists=if_exists, allow_code=allow_code, as_json=json_)
