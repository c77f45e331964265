"""The command line: parses words, calls the library, prints; heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from secateur import __version__
from secateur.errors import SecateurError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="secateur",
    help="Prune a neural network and keep the gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(help="Hugging Face folder or name, or file.py:function[@weights.safetensors]")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="layers: all, attention, ffn, encoder, decoder, head, or globs; repeatable"),
]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="layers to leave as they are; like --only")]
Offline = Annotated[bool, typer.Option("--offline", help="use no network")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run Python files that a checkpoint brings")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="accept weights in pickle (opened weights-only)")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16, float16 or auto (as stored); default: float32, own code as built"
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Prune a neural network and keep the gain."""


@app.command()
def prune(
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write")] = None,
    method: Annotated[
        str,
        typer.Option(help="magnitude, wanda, sparsegpt, alps, ... (see docs/methods.md)"),
    ] = "magnitude",
    sparsity: Annotated[
        float | None, typer.Option(help="zeros to reach, as a fraction of the chosen weights")
    ] = None,
    nonzero: Annotated[
        str | None, typer.Option(help="instead: non-zero parameters of the whole model, e.g. 104.69M")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="for threshold: cut weights of magnitude at most tau")
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="for percentile: percent of each layer to cut")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="weights, rows, columns, 2:4 (n kept of m), blocks:4x1")
    ] = "weights",
    allocate: Annotated[
        str | None, typer.Option(help="per-row, per-layer or global; default: the method's own")
    ] = None,
    only: Only = None,
    skip: Skip = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="calibration: .txt, .jsonl:field, .parquet:column, folder, python-docs, file.py:function"
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
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "fail",
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
        "nonzero": nonzero, "pattern": pattern, "allocate": allocate, "only": _listed(only), "skip": _listed(skip),
        "data": data, "samples": samples, "context": context, "evaluate": evaluate, "labelled": labelled,
        "evaluate_tokens": evaluate_tokens, "seed": seed, "dtype": dtype, "device": device,
    }  # fmt: skip
    asked = request({key: value for key, value in given.items() if value is not None and value != ()})
    if out is None and not dry_run:
        raise UsageError("--out FOLDER is missing; say where the result goes, or ask for --dry-run")
    if if_exists not in ("fail", "overwrite"):
        raise UsageError(f"--if-exists {if_exists!r} is not known; expected fail or overwrite")
    _use_threads(threads)
    from secateur.folder import new_folder
    from secateur.run import carry_out, check_apart, prepare
    from secateur.terminal import progress, show_measurements

    with ExitStack() as stack:
        if out is not None and not dry_run:  # first, so that a folder that is taken is told at once
            check_apart(model, out)
            folder = stack.enter_context(new_folder(out, if_exists))
        tell = stack.enter_context(progress())
        run = prepare(
            asked, offline=offline, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, tell=tell
        )
        if dry_run:
            typer.echo(json.dumps({"plan": str(run).splitlines()}) if json_ else str(run))
            return
        typer.echo(str(run), err=json_)
        result = carry_out(run, folder, tell)
    if json_:
        plain = {name: [m.to_dict() for m in found] for name, found in result.measurements.items()}
        typer.echo(json.dumps({"out": str(out), "sparsity": result.masks.sparsity, "measurements": plain}))
        return
    show_measurements(result.measurements)
    typer.echo(f"written  {out}\nreport   {out}/run/report.html")


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
    _use_threads(threads)
    from secateur import model as models
    from secateur.judge import Wanted, judge
    from secateur.request import spec_name
    from secateur.terminal import progress, show_measurements

    settings: dict[str, Any] = {
        "dtype": dtype, "device": device, "offline": offline, "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle, "seed": seed,
    }  # fmt: skip
    wanted = Wanted(data, protocol, context, stride, max_tokens, labelled, summaries, tasks, limit, speed, seed)
    with progress() as tell:
        tell("loading the model", 0, 1)
        loaded = models.load(model, **settings)
        dense = models.load(reference, **settings) if reference else None
        tell("loading the model", 1, 1)
        found = judge(loaded, dense, wanted, tell)
    name = spec_name(model)
    if json_:
        typer.echo(json.dumps({"model": name, "measurements": [m.to_dict() for m in found]}))
    else:
        show_measurements({name: found})


@app.command()
def inspect(
    model: Model,
    only: Only = None,
    skip: Skip = None,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """List every prunable layer: role, shape, zeros, ties, and whether --only/--skip choose it."""
    from secateur import model as models
    from secateur.terminal import show_layers

    loaded = models.load(
        model,
        dtype="auto",
        offline=offline,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    show_layers(loaded.model, _listed(only), _listed(skip), as_json=json_)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="a run's folder")], json_: Json = False) -> None:
    """Check a run's folder: every file as it was written, masks readable, zeros really zero."""
    from secateur.verification import problems

    found = problems(folder)
    if json_:
        typer.echo(json.dumps({"folder": str(folder), "problems": found}))
    else:
        typer.echo(
            "\n".join(found)
            if found
            else f"{folder}: every file is as it was written, and every pruned weight is zero"
        )
    if found:
        raise typer.Exit(3)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("secateur-demo"),
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "overwrite",
    texts: Annotated[
        list[str] | None, typer.Option("--text", help="more text to measure on; repeatable")
    ] = None,
    threads: Threads = None,
) -> None:
    """Prune a small real language model and a digit classifier, and show what it cost."""
    _use_threads(threads)
    from secateur.demo import run_demo
    from secateur.terminal import progress

    with progress() as tell:
        written = run_demo(out, texts=texts or [], if_exists=if_exists, tell=tell, say=typer.echo)
    typer.echo(f"report   {written}")


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this machine and this installation can do."""
    from secateur.doctor import findings

    found = findings()
    if json_:
        typer.echo(json.dumps(found))
    else:
        width = max(len(name) for name in found)
        typer.echo("\n".join(f"{name:{width}}  {value}" for name, value in found.items()))


def _listed(words: list[str] | None) -> tuple[str, ...]:
    return tuple(word for text in words or () for word in (part.strip() for part in text.split(",")) if word)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback."""
    try:
        app()
    except SecateurError as error:
        _leave(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and "allocate memory" not in str(error)
            and "out of memory" not in str(error)
        ):
            raise
        _leave("out of memory; use a smaller model, --dtype bfloat16 or fewer --samples", 4)
    except SystemExit as end:
        if end.code == 130:
            _leave("interrupted; nothing half-finished was left behind", 130)
        raise


def _leave(message: str, code: int) -> NoReturn:
    typer.echo(f"secateur: {message}", err=True)
    sys.exit(code)
