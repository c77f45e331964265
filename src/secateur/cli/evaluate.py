"""The verb `evaluate`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from secateur.cli.options import Device, Dtype, Json, Model, Offline, Pickle, Threads, Trust, app, use_threads

__all__ = ["evaluate"]


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="text to measure perplexity on; default python-docs")] = None,
    protocol: Annotated[str, typer.Option(help="windows, stride or lm-eval")] = "windows",
    context: Annotated[int | None, typer.Option(min=2, help="tokens in a window")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="for protocol stride; default 512")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="use only the first tokens of the text")] = None,
    reference: Annotated[
        str | None, typer.Option(help="dense model: KL divergence and top-1 agreement with it")
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(help="file.py:function giving (inputs, labels) batches: accuracy, F1")
    ] = None,
    summaries: Annotated[
        str | None,
        typer.Option(help="FILE.jsonl:document:summary or .parquet: ROUGE of summaries that the model writes"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, comma-separated")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="documents for --summaries or --tasks")] = None,
    speed: Annotated[bool, typer.Option(help="also latency and tokens per second")] = True,
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure a model: quality, size, FLOPs, speed and memory, each with its conditions."""
    use_threads(threads)
    from secateur import model as models
    from secateur.judge import Wanted, judge
    from secateur.packed_folder import is_packed, opened, source_of
    from secateur.request import spec_name
    from secateur.terminal import progress, show_measurements

    settings: dict[str, Any] = {
        "dtype": dtype, "device": device, "offline": offline, "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle, "seed": seed,
    }  # fmt: skip
    wanted = Wanted(data, protocol, context, stride, max_tokens, labelled, summaries, tasks, limit, speed, seed)
    with progress() as tell:
        tell("loading the model", 0, 1)

        def read(spec: str, **options: Any) -> models.Loaded:
            if is_packed(source_of(spec, seed)[0]):
                return opened(spec, **options, **settings)
            return models.load(spec, **settings)

        loaded = read(model, speed=speed)
        dense = read(reference, speed=False) if reference else None
        tell("loading the model", 1, 1)
        found = judge(loaded, dense, wanted, tell)
    name = spec_name(model)
    if json_:
        typer.echo(json.dumps({"model": name, "measurements": [m.to_dict() for m in found]}))
    else:
        show_measurements({name: found})
