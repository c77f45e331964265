"""The verb `prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import (
    Device,
    Dtype,
    Json,
    MaxRam,
    Model,
    Offline,
    Only,
    Pickle,
    Skip,
    Threads,
    Trust,
    app,
    fraction,
    listed,
    use_threads,
)
from secateur.cli.stages import FineTuneEpochs, LearningRate, Quantize, Schedule, Train, prune_in_stages
from secateur.cli.writing import opened, plan_alone
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.request import PruneRequest

Loading = tuple[bool, bool, bool]  # offline, code of the checkpoint's own, pickle

__all__ = ["prune"]


@app.command()
def prune(
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="best, magnitude, wanda, sparsegpt, alps, structured, gradual, ... (see docs/methods.md); default: "
            "best for causal language models, magnitude for all others, flap for whole units"
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            parser=fraction, metavar="<float>", help="zeros to reach, as a fraction of the chosen weights"
        ),
    ] = None,
    nonzero: Annotated[
        str | None, typer.Option(help="instead: non-zero parameters of the whole model, e.g. 104.69M")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="instead, for whole units: '2x fewer macs', '0.5 parameters', '20 MB', '2x faster', '12 ms'"
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau",
            "--threshold",
            help="for threshold: cut weights of magnitude at most tau; for activation: neurons whose mean "
            "absolute activation is at most tau",
        ),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="for percentile: percent of each layer to cut")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="weights, rows, columns, 2:4 (n kept of m), blocks:4x1; or whole units, joined by commas: heads, "
            "neurons, kv-groups, query-heads, channels, hidden, experts, axes:NAME (see inspect --axes); default: "
            "weights, or what the method is made for"
        ),
    ] = None,
    multiple: Annotated[int, typer.Option(help="for units: every width is a multiple of this, or whole")] = 1,
    minimum: Annotated[int, typer.Option(help="for units: at least so many stay on every axis")] = 1,
    homogeneous: Annotated[
        bool, typer.Option("--homogeneous", help="for units: axes of one kind and size keep equally many")
    ] = False,
    shrink: Annotated[
        bool,
        typer.Option(
            "--shrink", help="for units: write the model without them, plain or compact (see secateur export)"
        ),
    ] = False,
    decouple: Annotated[
        list[str] | None,
        typer.Option(
            help="for --shrink: first give layers an index of their own into what they share: rope, bias, residual"
        ),
    ] = None,
    mend: Annotated[
        str | None,
        typer.Option(
            help="for units: none, bias or least-squares; what stays takes over; default: the method's"
        ),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="for N:M: first put input channels in the order that keeps most")
    ] = False,
    evolution: Annotated[
        bool, typer.Option("--evolution", help="for best: also search a share for each layer; slower")
    ] = False,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="per-row, per-layer, global, normalised (by each layer's mean score) or, for units, per-cost "
            "(score over what the target counts); default: the method's own"
        ),
    ] = None,
    only: Only = None,
    skip: Skip = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="calibration: .txt, .jsonl:field, .parquet:column, folder, python-docs, file.py:function; several "
            "texts, as A:0.75 and B, are mixed"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="calibration sequences or batches")] = 128,
    context: Annotated[
        int | None, typer.Option(help="tokens in a sequence; default: the model's, at most 2048")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="text to measure perplexity on; default: a held-out fifth of --data")
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(help="file.py:function giving (inputs, labels) batches for accuracy")
    ] = None,
    evaluate_tokens: Annotated[int, typer.Option(help="tokens of that text to use")] = 32_768,
    schedule: Schedule = None,
    fine_tune_epochs: FineTuneEpochs = None,
    lr: LearningRate = None,
    quantize: Quantize = None,
    train: Train = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="from file to file, for models larger than memory; not measured")
    ] = False,
    max_ram: MaxRam = None,
    if_exists: Annotated[
        str, typer.Option("--if-exists", help="fail, overwrite, or with --stream resume")
    ] = "fail",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and stop")] = False,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune a model, measure it before and after, and write a folder that loads anywhere."""
    from secateur.request import request

    given: dict[str, Any] = {
        "model": model, "method": method, "sparsity": sparsity, "tau": tau, "percentile": percentile,
        "nonzero": nonzero, "target": target, "pattern": pattern, "mend": mend,
        "multiple": multiple if multiple != 1 else None, "minimum": minimum if minimum != 1 else None,
        "homogeneous": homogeneous or None, "shrink": shrink or None, "decouple": listed(decouple),
        "allocate": allocate, "only": listed(only), "skip": listed(skip),
        "data": ",".join(data) if data else None, "samples": samples, "context": context, "evaluate": evaluate,
        "labelled": labelled, "evaluate_tokens": evaluate_tokens, "seed": seed, "dtype": dtype, "device": device,
        "stream": stream or None, "max_ram": max_ram, "permute": permute or None,
        "evolution": evolution or None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None and value != ()}
    more = {"schedule": schedule, "epochs": fine_tune_epochs, "lr": lr, "scheme": quantize, "train": train}
    loading = (offline, trust_remote_code, allow_pickle)
    if method == "gradual" or any(value is not None for value in more.values()):
        use_threads(threads)
        prune_in_stages(given, more, out, loading, if_exists=if_exists, dry_run=dry_run, as_json=json_)
        return
    asked = request(given)
    _check_place(out, if_exists, dry_run, stream)
    use_threads(threads)
    place = None if dry_run else out
    if stream:
        _from_file_to_file(asked, place, loading, max_ram=max_ram, if_exists=if_exists, as_json=json_)
    else:
        _in_memory(asked, place, loading, if_exists=if_exists, as_json=json_)


def _check_place(out: Path | None, if_exists: str, dry_run: bool, stream: bool) -> None:
    if out is None and not dry_run:
        raise UsageError("--out FOLDER is missing; say where the result goes, or ask for --dry-run")
    known = ("fail", "overwrite", *(["resume"] if stream else []))
    if if_exists not in known:
        raise UsageError(f"--if-exists {if_exists!r} is not known; expected {' or '.join(known)}")


def _from_file_to_file(
    asked: PruneRequest,
    out: Path | None,
    loading: Loading,
    *,
    max_ram: str | None,
    if_exists: str,
    as_json: bool,
) -> None:
    """With --stream: weights become zero, or whole units are taken out."""
    from secateur.cli.streaming import prune_streamed, shrink_streamed
    from secateur.request import cuts_units

    offline, trust_remote_code, _ = loading
    carry_out = shrink_streamed if cuts_units(asked) else prune_streamed
    carry_out(
        asked, out, max_ram=max_ram, if_exists=if_exists, as_json=as_json, offline=offline,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _in_memory(
    asked: PruneRequest, out: Path | None, loading: Loading, *, if_exists: str, as_json: bool
) -> None:
    """Say what will be done, do it and show what was measured; without `out` only the first."""
    from secateur.run import carry_out, prepare
    from secateur.terminal import show_measurements

    offline, trust_remote_code, allow_pickle = loading
    with opened(asked.model, out, if_exists) as (folder, tell):
        run = prepare(
            asked, offline=offline, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, tell=tell
        )
        if plan_alone(run, folder, as_json) or folder is None:
            return
        result = carry_out(run, folder, tell)
    if as_json:
        plain = {name: [m.to_dict() for m in found] for name, found in result.measurements.items()}
        typer.echo(json.dumps({"out": str(out), "sparsity": result.masks.sparsity, "measurements": plain}))
        return
    show_measurements(result.measurements)
    for note in (*result.notes, *result.applied.notes) if run.plan.analysis is not None else ():
        if note not in run.notes:  # the plan has said those
            typer.echo(f"note     {note}")
    form = {"compact": " (compact: secateur.load reads it)", "hf": " (smaller, plain)"}.get(result.form, "")
    typer.echo(f"written  {out}{form}\nreport   {out}/run/report.html")
