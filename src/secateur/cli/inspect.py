"""The verb `inspect`."""

from __future__ import annotations

from secateur.cli.options import Json, Model, Offline, Only, Pickle, Skip, Trust, app, listed

__all__ = ["inspect"]


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
    show_layers(loaded.model, listed(only), listed(skip), as_json=json_)
