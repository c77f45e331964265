"""The verb `run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, Offline, Pickle, Threads, Trust, app, use_threads
from secateur.errors import InterruptedRunError

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
        stages = [f"{number} {stage.name}" for number, stage in enumerate(asked.stages, 1)]
        typer.echo(json.dumps({"stages": stages}) if json_ else "\n".join([*stages, *asked.notes]))
        return
    use_threads(threads)
    from secateur.folder import interrupted
    from secateur.pipeline import Loading, experiment_to
    from secateur.terminal import progress, show_measurements

    loading = Loading(offline, trust_remote_code, allow_pickle)
    try:
        with progress() as tell:
            outcome = experiment_to(
                asked,
                out,
                if_exists=if_exists,
                allow_code=allow_code,
                loading=loading,
                tell=tell,
                say=lambda line: typer.echo(line, err=json_),
            )
    except KeyboardInterrupt:
        left = interrupted(out)
        if left is None:
            raise
        raise InterruptedRunError(
            f"interrupted; results so far are in {left / 'run' / 'results.csv'}; the same command goes on"
        ) from None
    if json_:
        plain = {name: [m.to_dict() for m in found] for name, found in outcome.measurements.items()}
        typer.echo(json.dumps({"out": str(out), "measurements": plain}))
        return
    show_measurements(outcome.measurements)
    typer.echo(f"written  {out}\nresults  {out}/run/results.csv")
