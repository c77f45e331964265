"""The verb `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import Device, Json, Offline, Pickle, Threads, Trust, app, read_block, use_threads
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
            "compact: for secateur.load; auto: hf, else compact; sparse: single zeros left out, for secateur.load"
        ),
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(help="file.py:function giving batches, where inputs cannot be made up")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="for sparse: float32, bfloat16, float16, int8 or int4; default as stored")
    ] = None,
    outer: Annotated[
        str | None, typer.Option(help="for sparse: int8 or int4 holds embeddings and heads in integers")
    ] = None,
    block: Annotated[
        str, typer.Option(help="for sparse: what was pruned together, 1, 4 or 16 rows, or 4x4")
    ] = "1",
    speed: Annotated[bool, typer.Option(help="also latency, beside the masked model")] = True,
    stream: Annotated[
        bool, typer.Option("--stream", help="from file to file, for models larger than memory; not measured")
    ] = False,
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
    from secateur.export import is_compressed

    loading = {
        "offline": offline, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
        "if_exists": if_exists,
    }  # fmt: skip
    if stream:
        _check_streamed(to, data, device)
        from secateur.cli.streaming import export_streamed

        export_streamed(folder, out, to=to, if_exists=if_exists, as_json=json_)
    elif to == "sparse":
        how = {"kind": kind, "outer": outer, "block": read_block(block), "seed": seed}
        _pack(folder, out, json_, {**how, **loading})
    elif kind is not None or outer is not None or block != "1":
        raise UsageError("--kind, --outer and --block belong to --to sparse")
    elif to in ("auto", "hf") and is_compressed(folder):
        _plain(folder, out, json_, loading)
    else:
        how = {"to": to, "data": data, "device": device, "seed": seed, "speed": speed}
        _shrink(folder, out, json_, {**how, **loading})


def _check_streamed(to: str, data: str | None, device: str) -> None:
    if to == "sparse" or data is not None or device != "cpu":
        given = "--to sparse" if to == "sparse" else "--data" if data is not None else f"--device {device}"
        raise UsageError(f"{given} does not go with --stream; leave one of them out")


def _plain(folder: str, out: Path, json_: bool, how: dict[str, Any]) -> None:
    """Zeros that were left out, as ordinary numbers again."""
    from secateur.export import export_plain
    from secateur.terminal import progress

    with progress() as tell:
        export_plain(folder, out, tell=tell, **how)
    said = json.dumps({"out": str(out), "form": "hf"})
    typer.echo(said if json_ else f"written  {out} (plain: zeros as ordinary numbers)")


def _shrink(folder: str, out: Path, json_: bool, how: dict[str, Any]) -> None:
    """Whole units taken out."""
    from secateur.export import export_to
    from secateur.terminal import progress, show_measurements

    with progress() as tell:
        found = export_to(folder, out, tell=tell, **how)
    if json_:
        plain = {name: [m.to_dict() for m in each] for name, each in found.measurements.items()}
        typer.echo(json.dumps({"out": str(out), "form": found.form, "measurements": plain}))
        return
    typer.echo(str(found.note))
    show_measurements(found.measurements)
    forms = {
        "hf": "plain",
        "padded": "padded: a plain checkpoint with zeros up to sizes that its config can say",
    }
    typer.echo(f"written  {out} ({forms.get(found.form, 'compact: secateur.load reads it')})")


def _pack(folder: str, out: Path, json_: bool, how: dict[str, Any]) -> None:
    """The form sparse."""
    from secateur.packed_folder import export_packed
    from secateur.terminal import progress

    with progress() as tell:
        done, before, after = export_packed(folder, out, tell=tell, **how)
    if json_:
        layers = [vars(layer) for layer in done.layers]
        typer.echo(json.dumps({"out": str(out), "form": "sparse", "bytes": [before, after], "layers": layers}))
        return
    typer.echo(
        f"{done}\nthe weights are {after / before:.1%} of {before:,} bytes\nwritten  {out} (secateur.load reads it)"
    )
