"""The verb `sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import Json, Offline, Pickle, Trust, app, listed
from secateur.errors import SweepError, UsageError

__all__ = ["sweep"]

Axis = Annotated[list[str] | None, typer.Option(help="values, comma-separated; in place of the file's")]


@app.command()
def sweep(
    out: Annotated[Path, typer.Option("--out", help="folder of the sweep; goes on with what is there")],
    file: Annotated[Path | None, typer.Argument(help="YAML file: an experiment and its axes")] = None,
    model: Annotated[str | None, typer.Option(help="model, in place of the file's")] = None,
    data: Annotated[str | None, typer.Option(help="data, likewise")] = None,
    train: Annotated[str | None, typer.Option(help="what stages that train learn from, likewise")] = None,
    evaluate: Annotated[str | None, typer.Option(help="text to judge by, likewise")] = None,
    labelled: Annotated[str | None, typer.Option(help="file.py:function to judge by, likewise")] = None,
    method: Axis = None,
    sparsity: Axis = None,
    pattern: Axis = None,
    only: Axis = None,
    schedule: Axis = None,
    epochs: Axis = None,
    seed: Axis = None,
    workers: Annotated[int | None, typer.Option(min=1, help="points at once; default: one")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of each point")] = None,
    ray: Annotated[str | None, typer.Option(help="address of a Ray cluster, or local")] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="also write results.parquet")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="run the user's own files it names")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, say the points and stop")] = False,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Run every combination of the given settings, each in a folder of its own; what is finished is not run again."""
    from secateur.sweep.points import read_sweep
    from secateur.sweep.points import sweep as checked

    axes = {"method": method, "sparsity": sparsity, "pattern": pattern, "only": only, "schedule": schedule}
    axes |= {"epochs": epochs, "seed": seed}
    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "train": train,
        "evaluate": evaluate,
        "labelled": labelled,
    }
    given = {key: value for key, value in given.items() if value is not None}
    lists = {key: [_value(word) for word in listed(words)] for key, words in axes.items() if words is not None}
    if lists:
        given["sweep"] = lists
    if file is None and not {"model", "sweep"} <= set(given):
        raise UsageError("give a sweep.yaml, or --model and at least one list such as --sparsity 0.3,0.5")
    asked = read_sweep(file, given) if file is not None else checked(given)
    if dry_run:
        names = [point.name for point in asked.points]
        typer.echo(json.dumps({"points": names}) if json_ else "\n".join(names))
        return
    from secateur.sweep.pages import write_report
    from secateur.sweep.table import lines, need_parquet, write_table
    from secateur.sweep.work import Allowed, carry_out
    from secateur.terminal import progress

    if parquet:
        need_parquet()
    title = file.stem if file is not None else "A sweep"

    def show() -> None:
        found = lines(asked, out)
        write_table(asked, found, out, parquet=parquet)
        write_report(title, asked, found, out)

    allowed = Allowed(allow_code, offline, trust_remote_code, allow_pickle)
    with progress() as tell:
        carry_out(
            asked.points,
            out,
            workers=workers or 1,
            threads=threads,
            ray=ray,
            allowed=allowed,
            tell=tell,
            done=show,
        )
    show()
    found = lines(asked, out)
    failed = [line for line in found if line.status == "failed"]
    if json_:
        rows = [
            {"at": dict(line.at), "status": line.status, "error": line.error, "folder": line.folder}
            for line in found
        ]
        typer.echo(json.dumps({"out": str(out), "points": rows}))
    else:
        typer.echo(f"{len(found) - len(failed)} of {len(found)} points done")
        for line in failed:
            typer.echo(f"failed   {line.folder}: {line.error}")
        typer.echo(f"table    {out}/results.csv\nreport   {out}/report.html")
    if failed:
        raise SweepError(f"{len(failed)} of {len(found)} points failed; the same command tries them again")


def _value(word: str) -> Any:
    """A number where it is one, as in YAML."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
