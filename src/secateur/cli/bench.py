"""The verb `bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import Json, Offline, Pickle, Trust, app, listed, read_block
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.bench import Bench
    from secateur.measurement import Measurement

__all__ = ["bench"]


@app.command()
def bench(
    folder: Annotated[
        str, typer.Argument(help="a run's folder or one of export --to sparse, or file.py:function@FOLDER")
    ],
    kind: Annotated[
        str | None, typer.Option(help="pack as float32, bfloat16, float16, int8 or int4; default as stored")
    ] = None,
    outer: Annotated[
        str | None, typer.Option(help="int8 or int4 holds embeddings and heads in integers")
    ] = None,
    block: Annotated[str, typer.Option(help="what was pruned together: 1, 4 or 16 rows, or 4x4")] = "1",
    prefer: Annotated[str, typer.Option(help="speed or memory")] = "speed",
    batch: Annotated[int, typer.Option(min=1, help="rows of the larger input")] = 16,
    tokens: Annotated[int, typer.Option(min=0, help="tokens to write, by language models")] = 16,
    threads: Annotated[
        list[str] | None, typer.Option("--threads", help="numbers of threads; repeatable; default 1,2")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="runs of each model, in turns")] = 10,
    data: Annotated[
        str | None, typer.Option(help="file.py:function giving batches, where inputs cannot be made up")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of made-up inputs")] = 0,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure a pruned model without its zeros beside the same model dense: time, tokens a second, bytes."""
    counts = listed(threads) or ("1", "2")
    if not all(count.isdigit() for count in counts):
        raise UsageError(f"--threads {','.join(counts)}: whole numbers are expected, as in --threads 1,2")
    if prefer not in ("speed", "memory"):
        raise UsageError(f"--prefer {prefer!r} is not known; expected speed or memory")
    from secateur import bench as benches
    from secateur.terminal import progress

    numbers = tuple(map(int, counts))
    asked = benches.Asked(kind, outer, read_block(block), prefer, batch, tokens, numbers, rounds, data, seed)
    with progress() as tell:
        found = benches.bench(
            folder,
            asked,
            tell=tell,
            offline=offline,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    if json_:
        plain = {name: [m.to_dict() for m in getattr(found, name)] for name in ("latency", "speedup", "sizes")}
        verdicts = {
            name: [f"{m.conditions['what']} over {m.conditions['over']}" for m in getattr(found, name)]
            for name in ("slower", "alike")
        }
        typer.echo(json.dumps({"folder": folder, **plain, **verdicts, "notes": found.notes}))
    else:
        _show(found)


def _show(found: Bench) -> None:
    """One line a time, then bytes, then where the packed model loses, and where that cannot be told."""
    from secateur.bench import undecided

    ratios = {(m.conditions["what"], m.conditions["threads"], m.conditions["over"]): m for m in found.speedup}
    typer.echo(f"{'':44}{'ms':>10}  {'quartiles':<20}packed is faster by")
    for m in found.latency:
        what, threads, name = (m.conditions[key] for key in ("what", "threads", "model"))
        ratio = ratios.get((what, threads, name))
        spread = f"{m.spread.low:.3g} to {m.spread.high:.3g}" if m.spread else ""
        rate = f"  {1e3 / m.value:,.1f} tokens/s" if "token" in str(what) else ""
        times = "" if ratio is None else "no difference seen" if undecided(ratio) else f"{ratio.value:.2f}"
        typer.echo(
            f"{what}, {threads} thread{'s' * (threads != 1)}, {name:<14}".ljust(44)
            + f"{m.value:>10.4g}  {spread:<20}{times}{rate}"
        )
    for m in found.sizes:
        where = f"{'on disk' if m.name == 'disk_bytes' else 'in memory'}, {m.conditions['model']}"
        typer.echo(f"{where:<44}{int(m.value):>14,} bytes")
    for note in found.notes:
        typer.echo(note)
    for m in found.alike:
        typer.echo(f"no difference seen from {_where(m)}")
    for m in found.slower:
        typer.echo(f"slower than {_where(m)}")
    if not found.slower:
        typer.echo("nowhere seen to be slower than dense")


def _where(m: Measurement) -> str:
    """Over which model, at what, and the ratio of the times with its quartiles."""
    threads = m.conditions["threads"]
    spread = f" ({m.spread.low:.2f} to {m.spread.high:.2f})" if m.spread else ""
    return (
        f"{m.conditions['over']} at {m.conditions['what']} with {threads} thread{'s' * (threads != 1)}: "
        f"{m.value:.2f}{spread}"
    )
