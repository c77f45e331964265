"""The verb `align`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import Device, Json, Model, Offline, Pickle, Threads, Trust, app, listed, use_threads

__all__ = ["align"]


@app.command()
def align(
    pruned: Model,
    original: Annotated[str, typer.Argument(help="the model whose index is to be searched, written likewise")],
    out: Annotated[Path, typer.Option("--out", help="folder to write: the pruned model with its map")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="texts of the kind that is searched; repeatable. Or file.py:function"),
    ] = None,
    fit: Annotated[str, typer.Option(help="ridge, procrustes, procrustes-rigid or cca")] = "ridge",
    texts: Annotated[int, typer.Option(min=2, help="texts to fit the map on")] = 4000,
    held_out: Annotated[int, typer.Option(min=2, help="texts to judge it by; a fifth of all at most")] = 500,
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls or last; default: as the original's folder says, else mean")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens of a text that are read")] = 256,
    neighbours: Annotated[int, typer.Option(min=1, help="neighbours that are compared")] = 10,
    least: Annotated[
        float | None, typer.Option(min=0, max=1, help="overlap to reach; exit code 6 where it is not reached")
    ] = None,
    fold: Annotated[
        bool, typer.Option(help="fold the map into the last linear layer of your own model")
    ] = True,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "fail",
    device: Device = "cpu",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="of the choice of texts")] = 0,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Map a pruned embedding model's vectors to the original's space, so that an index need not be rebuilt."""
    use_threads(threads)
    from secateur import model as models
    from secateur.folder import new_folder
    from secateur.realign import Wanted, fit_and_judge, write_aligned
    from secateur.run import check_apart
    from secateur.terminal import progress, show_measurements

    floor = {} if least is None else {"least": least}
    wanted = Wanted(listed(data), fit, texts, held_out, pooling, context, neighbours, seed=seed, **floor)
    check_apart(pruned, out)
    check_apart(original, out)
    with new_folder(out, if_exists) as folder, progress() as tell:
        settings: dict[str, Any] = {
            "device": device, "offline": offline, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
        }  # fmt: skip
        small, dense = models.load(pruned, **settings), models.load(original, **settings)
        found = fit_and_judge(small, dense, wanted, tell)
        where = write_aligned(small, dense, found, wanted, folder, fold=fold)
    measured = found.measurements(wanted)
    if json_:
        plain = {way: [m.to_dict() for m in each] for way, each in measured.items()}
        typer.echo(json.dumps({"out": str(out), "advice": found.advice.verdict, "measurements": plain}))
    else:
        show_measurements(measured)
        typer.echo(f"advice   {found.advice}\nmap      {where}\nwritten  {out}")
    if least is not None and found.advice.mapped < least:
        typer.echo(f"secateur: overlap {found.advice.mapped:.3f} is below --least {least:g}", err=True)
        raise typer.Exit(6)
