"""The verb `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import Device, Json, Offline, Pickle, Threads, Trust, app, use_threads
from secateur.errors import UsageError

__all__ = ["export"]


@app.command()
def export(
    folder: Annotated[
        str,
        typer.Argument(
            help="a run's folder, or file.py:function@FOLDER/model.safetensors for a model of yours"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: plain and smaller, where a config can say the widths; padded: zeros up to what a config can say; "
            "compact: for secateur.load; auto: hf, else compact"
        ),
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(help="file.py:function giving batches, where inputs cannot be made up")
    ] = None,
    speed: Annotated[bool, typer.Option(help="also latency, beside the masked model")] = True,
    seed: Annotated[int, typer.Option(min=0, help="of made-up inputs")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "fail",
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Take pruned units out for good: smaller tensors, the same function, checked, in a folder that loads."""
    if if_exists not in ("fail", "overwrite"):
        raise UsageError(f"--if-exists {if_exists!r} is not known; expected fail or overwrite")
    use_threads(threads)
    from secateur.export import export_to
    from secateur.terminal import progress, show_measurements

    options: dict[str, Any] = {"to": to, "data": data, "if_exists": if_exists, "device": device, "seed": seed}
    options["speed"] = speed
    loading: dict[str, Any] = {
        "offline": offline,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
    }
    with progress() as tell:
        found = export_to(folder, out, tell=tell, **options, **loading)
    if json_:
        plain = {name: [m.to_dict() for m in each] for name, each in found.measurements.items()}
        typer.echo(json.dumps({"out": str(out), "form": found.form, "measurements": plain}))
        return
    typer.echo(str(found.note))
    show_measurements(found.measurements)
    how = {"hf": "plain", "padded": "padded: a plain checkpoint with zeros up to sizes that its config can say"}
    typer.echo(f"written  {out} ({how.get(found.form, 'compact: secateur.load reads it')})")
