"""The verb `resume`."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, MaxRam, Offline, Threads, Trust, app, use_threads
from secateur.errors import UsageError

__all__ = ["resume"]


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="the folder that the interrupted run was to write")],
    max_ram: MaxRam = None,
    threads: Threads = None,
    json_: Json = False,
    offline: Offline = False,
    trust_remote_code: Trust = False,
) -> None:
    """Go on with an interrupted `prune --stream`, to the same result as if nothing had happened."""
    from secateur.cli.streaming import prune_streamed
    from secateur.own import is_own
    from secateur.request import request
    from secateur.stream.journal import asked_before

    before = asked_before(folder)
    if before is None:
        raise UsageError(
            f"{folder}: no run of `secateur prune --stream` was interrupted here. A run in memory starts anew; "
            'prune_checkpoint goes on with if_exists="resume"'
        )
    asked = request(before.asked)
    if asked.data is not None and is_own(asked.data):
        raise UsageError(
            f"{folder}: the interrupted run took its data from {asked.data}, and no code is run because a file says "
            "so; repeat the command of before with --if-exists resume"
        )
    use_threads(threads or before.threads)
    out = folder.absolute()
    with chdir(before.directory):
        prune_streamed(
            asked, out, max_ram=max_ram or asked.max_ram, if_exists="resume", as_json=json_, offline=offline,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
