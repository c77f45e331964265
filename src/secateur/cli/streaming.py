"""What `prune --stream` and `resume` share."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from secateur.errors import InterruptedRunError, ResourceError

if TYPE_CHECKING:
    from secateur.request import PruneRequest

__all__ = ["prune_streamed"]


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
    from secateur.folder import interrupted, new_folder
    from secateur.run import check_apart
    from secateur.stream.asked import prepare_as_asked
    from secateur.stream.job import carry_out
    from secateur.terminal import progress

    try:
        with ExitStack() as stack:
            if out is not None:  # first, so that a folder that is taken is told at once
                check_apart(asked.model, out)
                folder = stack.enter_context(new_folder(out, if_exists))
            tell = stack.enter_context(progress())
            prepared = prepare_as_asked(
                asked, memory=max_ram, offline=offline, trust_remote_code=trust_remote_code, tell=tell
            )
            if out is None:
                plan = str(prepared)
                typer.echo(json.dumps({"plan": plan.splitlines()}) if as_json else plan)
                return
            typer.echo(str(prepared), err=as_json)
            done = carry_out(
                prepared,
                folder,
                asked.model_dump(mode="json", exclude_unset=True),
                asked.model_dump(mode="json"),
            )
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
