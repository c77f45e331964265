"""Measurements, histograms and figures to TensorBoard or Weights & Biases, by whichever object the user brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import UsageError
from .histogram import Histogram
from .weights import Stage

__all__ = ["log_to"]


def log_to(
    board: Any,
    *,
    step: int | None = None,
    measurements: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    stage: Stage | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Send what a page shows to a board.

    Args:
        board: a `torch.utils.tensorboard.SummaryWriter`, a run of `wandb.init()`, or anything with the methods of
            either.
        step: the step of training, where there is one.
        measurements: variant -> measurements as plain mappings; each becomes the scalar `variant/name`.
        stage: histograms of the layers, sent with their own bins, as `layer/stage`.
        figures: name -> matplotlib figure.

    Raises:
        UsageError: the board is of neither kind.
    """
    scalars = {
        f"{variant}/{entry['name']}": float(entry["value"])
        for variant, entries in (measurements or {}).items()
        for entry in entries
    }
    held = {f"{name}/{stage.name}": one for name, one in stage.histograms.items()} if stage is not None else {}
    if all(hasattr(board, method) for method in ("add_scalar", "add_histogram_raw", "add_figure")):
        for tag, value in scalars.items():
            board.add_scalar(tag, value, global_step=step)
        for tag, one in held.items():
            board.add_histogram_raw(tag, global_step=step, **_raw(one))
        for tag, figure in (figures or {}).items():
            board.add_figure(tag, figure, global_step=step)
    elif hasattr(board, "log"):
        sent: dict[str, Any] = dict(scalars)
        if held or figures:
            wandb = _wandb()
            sent |= {tag: wandb.Histogram(np_histogram=_binned(one, 512)) for tag, one in held.items()}
            with suppress(ImportError):
                import matplotlib.pyplot  # noqa: F401 - wandb.Image looks at it and does not import it
            sent |= {tag: wandb.Image(figure) for tag, figure in (figures or {}).items()}
        board.log(sent, **({} if step is None else {"step": step}))
    else:
        raise UsageError(
            f"{type(board).__name__} is no board; expected a SummaryWriter of TensorBoard or a run of wandb.init()"
        )


def _raw(held: Histogram) -> dict[str, Any]:
    """The arguments of TensorBoard's histogram of given bins: their upper limits and counts, zeros with the lowest."""
    counts, edges = _binned(held, None)
    return {
        "min": held.min,
        "max": held.max,
        "num": held.n,
        "sum": held.mean * held.n,
        "sum_squares": (held.std**2 + held.mean**2) * held.n,
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


def _binned(held: Histogram, most: int | None) -> tuple[Any, Any]:
    """Counts and edges from the lowest to the highest bin; exact zeros lie in the bin that begins at 0.

    Neighbouring bins are joined until there are at most `most`.
    """
    below, above = len(held.negative), max(len(held.positive), 1)
    edges = np.array(
        [-held.grid.edge(at) for at in range(below, 0, -1)] + [held.grid.edge(at) for at in range(above + 1)]
    )
    counts = np.array([*reversed(held.negative), *(held.positive or (0,))], dtype=np.int64)
    counts[below] += held.zeros
    if most is not None and len(counts) > most:
        starts = np.arange(0, len(counts), -(-len(counts) // most))
        counts, edges = np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])
    return counts, edges


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            "histograms and figures of Weights & Biases need the extra wandb: pip install 'secateur[wandb]'"
        ) from error
    return wandb
