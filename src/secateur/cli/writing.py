"""What verbs that write a folder share: it is opened first, the plan is said, and without a folder that is all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from secateur.measure import Tell

__all__ = ["opened", "plan_alone"]


@contextmanager
def opened(model: str | None, out: Path | None, if_exists: str) -> Iterator[tuple[Path | None, Tell]]:
    """The folder to write into, None without `out`, and what hears of progress.

    The folder comes first, so that one that is taken, or that is the model's own, is told at once.
    """
    from secateur.folder import new_folder
    from secateur.run import check_apart
    from secateur.terminal import progress

    with ExitStack() as stack:
        folder = None
        if out is not None:
            if model is not None:
                check_apart(model, out)
            folder = stack.enter_context(new_folder(out, if_exists))
        yield folder, stack.enter_context(progress())


def plan_alone(plan: object, folder: Path | None, as_json: bool) -> bool:
    """Print what will be done; whether that is all, because there is no folder to do it in."""
    if folder is None:
        typer.echo(json.dumps({"plan": str(plan).splitlines()}) if as_json else str(plan))
        return True
    typer.echo(str(plan), err=as_json)
    return False
