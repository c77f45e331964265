"""The verb `study`, one command a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, Threads, app, listed, use_threads
from secateur.errors import UsageError

__all__ = ["studies", "threshold"]

studies = typer.Typer(
    no_args_is_help=True, help="Studies that end in a table and a report.", rich_markup_mode=None
)
app.add_typer(studies, name="study")


@studies.callback()
def common() -> None:
    """Studies that end in a table and a report."""


@studies.command()
def threshold(
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    data: Annotated[Path | None, typer.Option(help="mnist.npz; default: scikit-learn's digits")] = None,
    samples: Annotated[
        int | None, typer.Option(min=100, help="pictures to train on; default: at most 20000")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: 2 for MNIST, 15 for the digits")] = None,
    tau: Annotated[float, typer.Option(min=0, help="threshold after training")] = 0.4,
    sweep: Annotated[
        str, typer.Option(help="more thresholds, comma-separated")
    ] = "0.01,0.02,0.05,0.1,0.15,0.2,0.3,0.4",
    loop_tau: Annotated[float, typer.Option(min=0, help="threshold in the training loop")] = 0.001,
    loop_percentile: Annotated[
        float, typer.Option(min=0, max=100, help="percentile in the training loop")
    ] = 20.0,
    pictures: Annotated[bool, typer.Option(help="also write PNG files, with matplotlib")] = True,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "fail",
    seed: Annotated[int, typer.Option(min=0, help="of the initial weights and the order of the pictures")] = 0,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """A small network's weights: initial, trained, thresholded in the training loop, and pruned at a sweep of tau."""
    use_threads(threads)
    from secateur.folder import new_folder
    from secateur.study.threshold import Plan, images, study, write_study
    from secateur.terminal import progress

    try:
        taus = tuple(float(word) for word in listed([sweep]))
    except ValueError:
        raise UsageError(f"--sweep {sweep!r}: expected numbers with commas between, as 0.1,0.2") from None
    given = images(data, samples=20_000 if samples is None else samples, seed=seed)
    rounds = epochs if epochs is not None else (15 if data is None else 2)
    plan = Plan(rounds, loop_tau, loop_percentile, tau, taus, seed)
    with new_folder(out, if_exists) as folder, progress() as tell:
        stages = study(given, plan, tell)
        write_study(folder, given, plan, stages, pictures=pictures)
    if json_:
        rows = [
            {"stage": s.name, "zeros": s.zeros, "weights": s.size, "accuracy": s.accuracy.value} for s in stages
        ]
        typer.echo(json.dumps({"out": str(out), "stages": rows}))
        return
    width = max(len(stage.name) for stage in stages)
    typer.echo(f"{given.name}: {len(given.train[1]):,} pictures to train on, {len(given.test[1]):,} to test on")
    typer.echo(f"{'':{width}}{'zeros':>10}{'of':>10}{'accuracy':>10}")
    for stage in stages:
        typer.echo(f"{stage.name:{width}}{stage.zeros:10,}{stage.size:10,}{stage.accuracy.value:10.2%}")
    typer.echo(f"written  {out}\nreport   {out}/report.html")
