"""`secateur depth`: blocks of a model dropped or merged, measured before and after, in a folder that loads anywhere."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import nn

from secateur import measure as measuring
from secateur import model as models
from secateur import report
from secateur.card import depth_card
from secateur.core.depth import series
from secateur.deploy import drop_blocks_, merge_blocks_
from secateur.depth import choose_blocks, needs_data
from secateur.errors import UsageError, nearest
from secateur.evaluate import Measurement
from secateur.folder import new_folder, write_json, write_text
from secateur.measure import Tell
from secateur.recipes import DEPTH_METHODS
from secateur.request import checked, spec_name
from secateur.results import as_csv, as_yaml, circumstances
from secateur.run import check_apart
from secateur.sources import Sources, digest, sources

__all__ = ["DepthRequest", "depth_request", "shorten_to"]


def _method(value: Any) -> Any:
    name = str(value).replace("_", "-")
    if name not in DEPTH_METHODS:
        raise ValueError(f"{value!r} is no score of blocks; {nearest(name, DEPTH_METHODS)}")
    return name


def _merge(value: Any) -> Any:
    if value is not None and not re.fullmatch(r"(merged|compressed):\d+", str(value)):
        raise ValueError(
            f"{str(value)!r} is no way to merge; expected compressed:2 or merged:2, blocks in a group"
        )
    return value


def _words(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class DepthRequest(BaseModel):
    """Everything that decides the result of `secateur depth`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Field(min_length=1)]
    drop: Annotated[int | None, Field(ge=1)] = None
    merge: Annotated[str | None, BeforeValidator(_merge)] = None
    method: Annotated[str, BeforeValidator(_method)] = "block-influence"
    align: Literal["weights", "activations"] | None = None
    stack: Literal["encoder", "decoder"] | None = None
    skip: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    data: str | None = None
    samples: Annotated[int, Field(ge=1)] = 128
    context: Annotated[int | None, Field(ge=2)] = None
    evaluate: str | None = None
    labelled: str | None = None
    evaluate_tokens: Annotated[int, Field(ge=2)] = 32_768
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: str | None = None
    device: str = "cpu"


def depth_request(given: dict[str, Any]) -> DepthRequest:
    """Check what was asked for.

    Raises:
        UsageError: an unknown key, a value out of range, or not exactly one of `drop` and `merge`.
    """
    asked = checked(DepthRequest, given)
    if (asked.drop is None) == (asked.merge is None):
        raise UsageError(
            "give one of --drop 2 (blocks to take out) and --merge compressed:2 (blocks in a group)"
        )
    if asked.align and not asked.merge:
        raise UsageError("--align belongs to --merge")
    return asked


def shorten_to(
    asked: DepthRequest, out: str | Path, *, if_exists: str = "fail", tell: Tell, **loading: Any
) -> dict[str, list[Measurement]]:
    """Load, measure, drop or merge blocks, measure again, and write the folder.

    Args:
        asked: the request.
        out: the run's folder.
        if_exists: "fail" or "overwrite".
        tell: progress.
        loading: `offline`, `trust_remote_code`, `allow_pickle`.

    Returns:
        Measurements of `dense` and `short`.

    Raises:
        UsageError, InputError: whatever is wrong with the request, the model or the data.
    """
    check_apart(asked.model, out)
    with new_folder(out, if_exists) as folder:
        tell("loading the model", 0, 1)
        loaded = models.load(asked.model, dtype=asked.dtype, device=asked.device, seed=asked.seed, **loading)
        tell("loading the model", 1, 1)
        wanted = needs_data(DEPTH_METHODS[asked.method]) if asked.drop else asked.align == "activations"
        given = sources(asked, loaded, needs_data=wanted, tell=tell)
        batches = None if given.calibration is None else list(given.calibration.batches())
        inputs = {} if batches is None else {"calibration data": digest(batches)}
        dense, started = copy.deepcopy(loaded.model), time.perf_counter()
        said = _shortened(loaded.model, asked, batches)
        seconds = {"shorten": round(time.perf_counter() - started, 3)}
        found = _measured(dense, loaded.model, given)
        models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder, dtype=loaded.stored_dtype)
        found["short"] += measuring.weight_files(folder)
        if loaded.weights is not None:
            found["dense"] += measuring.weight_files(loaded.weights)
        _write(asked, loaded, said, found, given, inputs, seconds, folder)
    return found


def _shortened(model: nn.Module, asked: DepthRequest, batches: Sequence[Any] | None) -> str:
    """Drop or merge in place; what was done, in words."""
    before = sum(len(each.blocks) for each in series(model))
    example = None if not batches else batches[0]
    if asked.drop is not None:
        recipe = DEPTH_METHODS[asked.method]
        which = choose_blocks(
            model, asked.drop, recipe, batches, stack=asked.stack, skip=asked.skip, seed=asked.seed
        )
        drop_blocks_(model, which, example=example)
        return f"{asked.drop} of {before} blocks dropped by {asked.method}: {', '.join(which)}"
    how, _, size = str(asked.merge).partition(":")
    options: dict[str, Any] = {"align": asked.align, "data": batches, "stack": asked.stack}
    merge_blocks_(model, int(size), compress=how == "compressed", **options)
    aligned = f", neurons aligned by {asked.align}" if asked.align else ""
    left = sum(len(each.blocks) for each in series(model))
    return f"feed-forwards of every {size} blocks merged ({how}{aligned}), {left} of {before} blocks left"


def _measured(dense: nn.Module, short: nn.Module, given: Sources) -> dict[str, list[Measurement]]:
    found, by = {}, given.by
    said = {name: measuring.answers(model, by) for name, model in (("dense", dense), ("short", short))}
    for name, model in (("dense", dense), ("short", short)):
        found[name] = measuring.measure(model, by, said[name])
    compared = measuring.same_predictions(short, dense, by)
    found["short"] += compared or measuring.same_answers(said["short"], said["dense"])
    for name, speed in measuring.compare_speed({"dense": dense, "short": short}, by).items():
        found[name] += speed
    return found


def _write(
    asked: DepthRequest,
    loaded: models.Loaded,
    said: str,
    found: dict[str, list[Measurement]],
    given: Sources,
    inputs: dict[str, str],
    seconds: dict[str, float],
    folder: Path,
) -> None:
    plain = {variant: [m.to_dict() for m in each] for variant, each in found.items()}
    run = folder / "run"
    run.mkdir(exist_ok=True)
    write_json(run / "metrics.json", plain)
    write_text(run / "results.csv", as_csv(plain))
    write_text(run / "recipe.yaml", as_yaml(asked.model_dump(mode="json", exclude_unset=True)))
    write_json(run / "run.json", circumstances(asked, loaded, inputs, seconds) | {"done": said})
    write_text(folder / "README.md", depth_card(loaded, said, found))
    html = report.page(
        spec_name(asked.model), summary=f"{said[0].upper()}{said[1:]}.", measurements=plain, notes=given.notes
    )
    report.write(run / "report.html", html)
