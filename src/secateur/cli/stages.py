"""Experiments on the command line: from a file, or from the flags of `prune` that make one of several stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import InterruptedRunError, SecateurError, UsageError

if TYPE_CHECKING:
    from secateur.pipeline.spec import Experiment

__all__ = [
    "FineTuneEpochs",
    "LearningRate",
    "Quantize",
    "Schedule",
    "Train",
    "as_experiment",
    "carry_out_stages",
    "prune_in_stages",
]

Schedule = Annotated[
    str | None, typer.Option(help="prune while training: linear, cubic, exponential or constant")
]
FineTuneEpochs = Annotated[
    int | None, typer.Option("--fine-tune-epochs", min=1, help="train after pruning, or along a --schedule")
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="of that training; default: 1e-4")]
Quantize = Annotated[str | None, typer.Option(help="then: int8, int4 or int8-dynamic (needs torchao)")]
Train = Annotated[
    str | None, typer.Option(help="what it learns from: text, or file.py:function; default: --data")
]
_SHARED = (
    "model",
    "data",
    "samples",
    "context",
    "evaluate",
    "labelled",
    "evaluate_tokens",
    "seed",
    "dtype",
    "device",
)


def as_experiment(given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment that flags of `prune` mean, as the plain values that a YAML file would hold.

    Args:
        given: settings of `secateur prune`.
        more: schedule, epochs, lr, scheme, train; None where not given.
    """
    prune = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if key not in _SHARED and (key, value) != ("pattern", "weights")
    }
    learning = {key: more[key] for key in ("epochs", "lr") if more[key] is not None}
    gradual = more["schedule"] is not None or prune.get("method") == "gradual"
    if not gradual and "lr" in learning and "epochs" not in learning:
        raise UsageError("--lr belongs to training; give --fine-tune-epochs or --schedule as well")
    if more["train"] is not None and not gradual and not learning:
        raise UsageError("--train belongs to training; give --fine-tune-epochs or --schedule as well")
    if gradual:
        prune |= learning | ({} if more["schedule"] is None else {"schedule": more["schedule"]})
    stages: dict[str, Any] = {"prune": prune}
    if more["scheme"] is not None:
        stages["quantize"] = {"scheme": more["scheme"]}
    if learning and not gradual:
        stages["fine-tune"] = learning
    common = {key: given[key] for key in _SHARED if key in given}
    return common | ({} if more["train"] is None else {"train": more["train"]}) | {"stages": stages}


def prune_in_stages(
    given: Mapping[str, Any],
    more: Mapping[str, Any],
    out: Path | None,
    loading: tuple[bool, bool, bool],
    *,
    if_exists: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`prune` with flags that need more than one stage; what it names on the command line may be code."""
    from secateur.pipeline.spec import experiment

    try:
        asked = experiment(as_experiment(given, more))
    except UsageError as error:
        raise UsageError(str(error).removeprefix("experiment: ")) from None
    if dry_run:
        tell_stages(asked, as_json)
        return
    if out is None:
        raise UsageError("--out FOLDER is missing; say where the result goes, or ask for --dry-run")
    from secateur.folder import interrupted

    if if_exists == "fail" and interrupted(out) is not None:
        if_exists = "resume"  # the same command goes on where it was interrupted
    carry_out_stages(asked, out, loading, if_exists=if_exists, allow_code=True, as_json=as_json)


def tell_stages(asked: Experiment, as_json: bool) -> None:
    """What would be done."""
    stages = [f"{number} {stage.name}" for number, stage in enumerate(asked.stages, 1)]
    typer.echo(json.dumps({"stages": stages}) if as_json else "\n".join([*stages, *asked.notes]))


def carry_out_stages(
    asked: Experiment,
    out: Path,
    loading: tuple[bool, bool, bool],
    *,
    if_exists: str,
    allow_code: bool,
    as_json: bool,
) -> None:
    """Run an experiment and show what was measured; an interruption says how to go on."""
    from secateur.folder import interrupted
    from secateur.pipeline import Loading, experiment_to
    from secateur.pipeline.output import TIMES
    from secateur.terminal import progress, show_measurements

    def where() -> str | None:
        left = interrupted(out)
        return None if left is None else f"results so far are in {left / 'run' / 'results.csv'}"

    try:
        with progress() as tell:
            outcome = experiment_to(
                asked,
                out,
                if_exists=if_exists,
                allow_code=allow_code,
                loading=Loading(*loading),
                tell=tell,
                say=lambda line: typer.echo(line, err=as_json),
            )
    except KeyboardInterrupt:
        if (left := where()) is None:
            raise
        raise InterruptedRunError(f"interrupted; {left}; the same command goes on") from None
    except SecateurError as error:
        if error.exit_code in (4, 5) and (left := where()) is not None:
            raise type(error)(f"{error}. What was done is kept: {left}") from error
        raise
    if as_json:
        plain = {name: [m.to_dict() for m in found] for name, found in outcome.measurements.items()}
        typer.echo(json.dumps({"out": str(out), "measurements": plain}))
        return
    show_measurements(outcome.measurements)
    if any(m.name == "speedup" for found in outcome.measurements.values() for m in found):
        typer.echo(f"  {TIMES}")
    typer.echo(f"written  {out}\nresults  {out}/run/results.csv")
