"""The verb `depth`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Offline,
    Pickle,
    Threads,
    Trust,
    app,
    listed,
    use_threads,
)
from secateur.errors import UsageError

__all__ = ["depth"]


@app.command()
def depth(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    drop: Annotated[int | None, typer.Option(help="whole blocks to take out")] = None,
    merge: Annotated[
        str | None,
        typer.Option(help="instead: compressed:2 or merged:2, feed-forwards of every 2 blocks averaged"),
    ] = None,
    method: Annotated[
        str, typer.Option(help="for --drop: block-influence, angular-distance, loss, last or random")
    ] = "block-influence",
    align: Annotated[
        str | None, typer.Option(help="for --merge: neurons put in order by weights or activations")
    ] = None,
    stack: Annotated[str | None, typer.Option(help="encoder or decoder; default: both")] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="globs of block paths that stay")] = None,
    data: Annotated[str | None, typer.Option(help="calibration, as for prune")] = None,
    samples: Annotated[int, typer.Option(help="calibration sequences or batches")] = 128,
    context: Annotated[int | None, typer.Option(help="tokens in a sequence")] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="text to measure perplexity on; default: a held-out fifth of --data")
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(help="file.py:function giving (inputs, labels) batches for accuracy")
    ] = None,
    evaluate_tokens: Annotated[int, typer.Option(help="tokens of that text to use")] = 32_768,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "fail",
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Take whole blocks out of a model, or merge neighbours; what is written is smaller and loads anywhere."""
    if if_exists not in ("fail", "overwrite"):
        raise UsageError(f"--if-exists {if_exists!r} is not known; expected fail or overwrite")
    use_threads(threads)
    from secateur.shorten import depth_request, shorten_to
    from secateur.terminal import progress, show_measurements

    given: dict[str, Any] = {
        "model": model, "drop": drop, "merge": merge, "method": method, "align": align, "stack": stack,
        "skip": listed(skip), "data": data, "samples": samples, "context": context, "evaluate": evaluate,
        "labelled": labelled, "evaluate_tokens": evaluate_tokens, "seed": seed, "dtype": dtype, "device": device,
    }  # fmt: skip
    asked = depth_request({key: value for key, value in given.items() if value is not None and value != ()})
    loading = {"offline": offline, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    with progress() as tell:
        found = shorten_to(asked, out, if_exists=if_exists, tell=tell, **loading)
    if json_:
        plain = {name: [m.to_dict() for m in each] for name, each in found.items()}
        typer.echo(json.dumps({"out": str(out), "measurements": plain}))
        return
    show_measurements(found)
    typer.echo(f"written  {out}\nreport   {out}/run/report.html")
