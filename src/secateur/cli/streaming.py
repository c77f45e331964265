"""What `prune --stream`, `export --stream` and `resume` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli.writing import opened, plan_alone
from secateur.errors import InterruptedRunError, ResourceError, UsageError

if TYPE_CHECKING:
    from secateur.request import PruneRequest

__all__ = ["export_streamed", "prune_streamed", "shrink_streamed"]


def prune_streamed(
    asked: PruneRequest,
    out: Path | None,
    *,
    max_ram: str | None,
    if_exists: str,
    as_json: bool,
    offline: bool,
    trust_remote_code: bool,
) -> None:
    """Say what will be done, and do it from file to file; without `out` only the first."""
    from secateur.folder import interrupted
    from secateur.stream.asked import prepare_as_asked
    from secateur.stream.job import carry_out

    try:
        with opened(asked.model, out, if_exists) as (folder, tell):
            prepared = prepare_as_asked(
                asked, memory=max_ram, offline=offline, trust_remote_code=trust_remote_code, tell=tell
            )
            if plan_alone(prepared, folder, as_json) or folder is None:
                return
            done = carry_out(prepared, folder, *_words(asked))
    except KeyboardInterrupt:
        if out is None or interrupted(out) is None:
            raise
        raise InterruptedRunError(f"interrupted; go on with: secateur resume {out}") from None
    except ResourceError as error:
        if out is None or interrupted(out) is None:
            raise
        raise ResourceError(f"{error} What was done is kept; go on with: secateur resume {out}") from error
    if as_json:
        typer.echo(json.dumps({"out": str(out), "sparsity": done.sparsity, "weights": done.size}))
        return
    typer.echo(
        f"pruned   {done.pruned:,} of {done.size:,} weights, sparsity {done.sparsity:.4f} of these layers\n"
        f"written  {out}\nmeasure  secateur evaluate {out}"
    )


def shrink_streamed(
    asked: PruneRequest,
    out: Path | None,
    *,
    max_ram: str | None,
    if_exists: str,
    as_json: bool,
    offline: bool,
    trust_remote_code: bool,
) -> None:
    """Say which units will go, and take them out of the files; without `out` only the first."""
    from secateur.stream.asked import prepare_units_as_asked

    if if_exists == "resume":
        raise UsageError(
            "--if-exists resume: whole units are taken out in one go, and nothing is kept of a run that was killed; "
            "choose overwrite"
        )
    with opened(asked.model, out, if_exists) as (folder, tell):
        prepared = prepare_units_as_asked(
            asked, memory=max_ram, offline=offline, trust_remote_code=trust_remote_code, tell=tell
        )
        if plan_alone(prepared, folder, as_json) or folder is None:
            return
        done = prepared.carry_out(folder, *_words(asked))
    before, after = done.parameters
    if as_json:
        typer.echo(json.dumps({"out": str(out), "form": done.form, "parameters": [before, after]}))
        return
    typer.echo(
        f"smaller  {before:,} parameters, {after:,} left\n{_written(out, done.form)}\nmeasure  secateur evaluate {out}"
    )


def export_streamed(folder: str, out: Path, *, to: str, if_exists: str, as_json: bool) -> None:
    """Take the units out that a run's masks prune, tensor by tensor."""
    from secateur.core.masks import Masks
    from secateur.manifest import check_run
    from secateur.own import is_own
    from secateur.stream.shrinking import check_streamed_form, shrink_checkpoint
    from secateur.terminal import progress

    path = Path(folder).expanduser() / "run" / "masks.safetensors"
    if is_own(folder):
        raise UsageError(f"{folder}: --stream needs a folder with safetensors files; leave --stream out")
    check_streamed_form(to)
    if not path.is_file():
        raise UsageError(
            f"{folder}: no run/masks.safetensors beside the weights, so nothing says which units go. Give the folder "
            "of a run that cut whole units, such as secateur prune --pattern heads,neurons"
        )
    place = path.parents[1]
    check_run(
        place, [file.name for file in place.glob("*.safetensors")]
    )  # these are compared when they are opened
    with progress() as tell:
        form = shrink_checkpoint(folder, Masks.load(path), out, to=to, if_exists=if_exists, tell=tell)
    typer.echo(json.dumps({"out": str(out), "form": form}) if as_json else _written(out, form))


def _words(asked: PruneRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request as it was typed, and with every default."""
    return asked.model_dump(mode="json", exclude_unset=True), asked.model_dump(mode="json")


def _written(out: Path | None, form: str) -> str:
    return f"written  {out} ({'plain' if form == 'hf' else 'compact: secateur.load reads it'})"
