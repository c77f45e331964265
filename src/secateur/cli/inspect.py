"""The verb `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.options import (
    Json,
    Model,
    Offline,
    Only,
    Pickle,
    Skip,
    Threads,
    Trust,
    app,
    listed,
    use_threads,
)
from secateur.errors import UsageError

__all__ = ["inspect"]


@app.command()
def inspect(
    model: Model,
    only: Only = None,
    skip: Skip = None,
    axes: Annotated[
        bool, typer.Option("--axes", help="every axis along which the model can shrink, and why others cannot")
    ] = False,
    decouple: Annotated[
        list[str] | None,
        typer.Option(
            help="for --axes: first give layers an index of their own into what they share: rope, bias, residual"
        ),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="what each layer's sparsity alone costs")
    ] = False,
    measure: Annotated[str, typer.Option(help="kl, loss, or error (of each layer's output, one pass)")] = "kl",
    sparsities: Annotated[str, typer.Option(help="for --sensitivity, comma-separated")] = "0.3,0.5,0.7,0.9",
    method: Annotated[str, typer.Option(help="for --sensitivity: magnitude, wanda, ...")] = "magnitude",
    data: Annotated[str | None, typer.Option(help="text, or file.py:function for other models")] = None,
    samples: Annotated[int, typer.Option(min=1, help="windows of text, or batches")] = 16,
    context: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 128,
    out: Annotated[Path | None, typer.Option("--out", help="folder for the analysis and its report")] = None,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail, resume or overwrite")] = "resume",
    seed: Annotated[int, typer.Option(min=0, help="of the choice of text")] = 0,
    threads: Threads = None,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """List every prunable layer: role, shape, zeros, ties, and whether --only/--skip choose it; --axes: units."""
    use_threads(threads)
    from secateur import model as models
    from secateur.terminal import progress, show_layers

    settings: dict[str, Any] = {
        "offline": offline, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
    }  # fmt: skip
    if axes:
        if sensitivity:
            raise UsageError("--axes and --sensitivity are two analyses; ask for one at a time")
        from secateur.axes import axes_of

        with progress() as tell:
            loaded = models.load(model, dtype="auto", **settings)
            found_axes = axes_of(loaded, data, tell, listed(decouple) or ())
        typer.echo(json.dumps(found_axes.to_dict()) if json_ else str(found_axes))
        return
    if decouple:
        raise UsageError("--decouple belongs to --axes; give both or neither")
    if not sensitivity:
        loaded = models.load(model, dtype="auto", **settings)
        show_layers(loaded.model, listed(only), listed(skip), as_json=json_)
        return
    from secateur.analysis import Wanted, analyse
    from secateur.cli.writing import opened

    try:
        shares = tuple(float(word) for word in listed([sparsities]))
    except ValueError:
        raise UsageError(
            f"--sparsities {sparsities!r}: expected numbers with commas between, as 0.3,0.5,0.7"
        ) from None
    wanted = Wanted(measure, shares, method, data, samples, context, listed(only), listed(skip), seed)
    with opened(None, out, if_exists) as (folder, tell):
        found = analyse(models.load(model, **settings), wanted, folder, tell)
    if json_:
        typer.echo(
            json.dumps(
                {"quantity": found.quantity, "sparsities": list(found.sparsities), "layers": dict(found.layers)}
            )
        )
        return
    width = max(map(len, found.layers))
    typer.echo(f"{found.quantity}, the most sensitive layer first")
    typer.echo(" " * width + "".join(f"{share:>11.0%}" for share in found.sparsities))
    for name in found.ranked():
        typer.echo(f"{name:{width}}" + "".join(f"{value:11.4g}" for value in found.layers[name]))
    if out is not None:
        typer.echo(f"written  {out}\nreport   {out}/report.html")
