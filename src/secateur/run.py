"""The whole job: load, say what will be done, measure, prune, measure again, save, report.

A run's folder holds a checkpoint that plain `from_pretrained` loads, and under `run/` everything that says
how it came to be: masks, measurements, the request with every default, versions, the report. It is written
beside its place and renamed at the end, so a folder that is there is finished.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur import measure as measuring
from secateur import mixes, report
from secateur import model as models
from secateur.apply import Applied, apply_, intention, needs_calibration, planned
from secateur.checkpoint import headers
from secateur.checks import check_weights
from secateur.core.gradients import GRADIENTS
from secateur.deploy import decouple_, decoupling
from secateur.errors import NumericError, UsageError
from secateur.folder import new_folder
from secateur.measure import Tell, Yardstick
from secateur.prune import Plan
from secateur.request import PruneRequest, build_recipe, check_target, cuts_units, spec_name, with_method
from secateur.results import Result, layer_lines, write_results
from secateur.scoring import statistics_of
from secateur.smaller import smaller
from secateur.sources import Calibration, Sources, digest, sources, writes_text

__all__ = ["Run", "carry_out", "check_apart", "prepare", "prune_to", "stored_dtype"]


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Run:
    """Everything that is decided before a weight is touched.

    Attributes:
        asked: the request.
        loaded: the model and where it came from.
        plan: what would be pruned.
        calibration: data for the statistics, None where the score needs none.
        by: what the model is judged by.
        notes: sentences that a reader of the results needs.
    """

    asked: PruneRequest
    loaded: models.Loaded
    plan: Plan
    calibration: Calibration | None
    by: Yardstick
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"model    {self.loaded.spec}", f"prune    {self.plan}"]
        if self.calibration is not None:
            lines.append(f"data     {self.calibration.name}")
        judged = [name for name in (self.by.text_name, self.by.labelled_name) if name]
        if judged:
            lines.append(f"judge    {', '.join(judged)}")
        lines += [f"leave    {line}" for line in layer_lines(self.plan)]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def prepare(
    asked: PruneRequest,
    *,
    offline: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tell: Tell = _silent,
) -> Run:
    """Load the model and the data, and decide what will be done; nothing is changed or written.

    Raises:
        UsageError, InputError: whatever is wrong with the request, the model or the data.
    """
    check_target(asked)
    build_recipe(asked)  # what does not fit together, or is not there, is told before the model is loaded
    for text in (asked.data, asked.evaluate):
        if text:
            mixes.check_there(text)
    tell("loading the model", 0, 1)
    loaded = models.load(
        asked.model,
        dtype=asked.dtype,
        device=asked.device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        seed=asked.seed,
    )
    tell("loading the model", 1, 1)
    typed = asked
    asked = with_method(typed, language=loaded.tokenizer is not None and writes_text(loaded.model))
    recipe = build_recipe(asked)
    todo = None if cuts_units(asked) else planned(asked, loaded.model)
    labels = any(name in GRADIENTS for name in statistics_of(recipe.score))
    given = sources(asked, loaded, needs_data=needs_calibration(recipe), labels=labels, tell=tell)
    said: list[str] = []
    if todo is None:
        tell("axes of the model", 0, 1)
        said = _decoupled(asked, loaded, given)
        todo = planned(asked, loaded.model, given.by.example)
        tell("axes of the model", 1, 1)
    check_weights(todo.touched)
    notes = [
        *said,
        *intention(asked, typed, todo),
        *_long(asked, loaded, todo, given, tell),
        *given.notes,
        *_rounding(loaded),
    ]
    return Run(asked, loaded, todo, given.calibration, given.by, tuple(notes))


def _decoupled(asked: PruneRequest, loaded: models.Loaded, given: Sources) -> list[str]:
    """Decouple what was asked for; what that costs."""
    if not asked.decouple:
        return []
    made = decoupling(loaded.model, given.by.example, asked.decouple)
    decouple_(loaded.model, made, given.by.example)
    return [
        f"Decoupled {', '.join(asked.decouple)}: {sum(map(len, made.taps.values()))} indices of "
        f"{made.bytes_kept:,} bytes in all, {made.bytes_moved:,} bytes moved a token before anything goes."
    ]


def _long(asked: PruneRequest, loaded: models.Loaded, todo: Plan, given: Sources, tell: Tell) -> list[str]:
    """A warning where method best takes minutes or more."""
    known = given.calibration
    if asked.method != "best" or known is None or known.tokens is None or known.piece is None:
        return []
    from secateur.estimate import estimate, warning

    tell("timing one block", 0, 1)
    try:
        said = warning(estimate(loaded.model, known.piece, known.tokens, todo))
    except NumericError:
        said = None  # pruning itself says where it comes from
    tell("timing one block", 1, 1)
    return [said] if said else []


def prune_to(run: Run, out: str | Path, *, if_exists: str = "fail", tell: Tell = _silent) -> Result:
    """Carry a prepared run out and write its folder.

    Args:
        run: what `prepare` returned; its model is pruned in place.
        out: the run's folder.
        if_exists: "fail" or "overwrite", see `folder.new_folder`.
        tell: progress.

    Cost: three evaluations, one calibration pass, and a second copy of the model to compare with.
    """
    check_apart(run.asked.model, out)
    with new_folder(out, if_exists) as folder:
        return carry_out(run, folder, tell)


def carry_out(run: Run, folder: Path, tell: Tell = _silent) -> Result:
    """Prune, measure and write into `folder`, which is there and empty."""
    result = _prune(run, tell)
    tell("writing", 0, 1)
    loaded = run.loaded
    if run.asked.shrink:
        result = _save_small(run, result, folder)
    else:
        models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder, dtype=stored_dtype(loaded))
        result.measurements["pruned"] += measuring.weight_files(folder)
    if loaded.weights is not None:
        result.measurements["dense"] += measuring.weight_files(loaded.weights)
    write_results(run.asked, loaded, run.plan, result, folder)
    tell("writing", 1, 1)
    return result


def _save_small(run: Run, result: Result, folder: Path) -> Result:
    """Write the model without the units that went, plain where a config can say it, else compact."""
    loaded = run.loaded
    if result.small is None:
        raise UsageError(f"--shrink: {result.notes[-1]} Leave --shrink out to write the zeros")
    made_from = {"name": spec_name(loaded.spec), "sha256": loaded.fingerprint}
    options: dict[str, Any] = {"source": loaded.folder, "dtype": stored_dtype(loaded), "made_from": made_from}
    form = models.save(result.small, loaded.tokenizer, folder, **options)
    result.measurements["shrunk"] += measuring.weight_files(folder)
    return replace(result, form=form)


def check_apart(model: str, out: str | Path) -> None:
    """Refuse to write into the model's own folder, or over it.

    Raises:
        UsageError: one of the two folders holds the other.
    """
    source, target = Path(model).expanduser(), Path(out).resolve()
    if not source.is_dir():
        return
    source = source.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(f"--out {out} and the model's folder {model} lie in each other; choose another folder")


def _prune(run: Run, tell: Tell) -> Result:
    """Measure, prune, measure again."""
    model, by = run.loaded.model, run.by
    seconds: dict[str, float] = {}
    dense = _copied(model, run.loaded.spec)
    stages = [_stage("before", model, run.plan)]
    with _timed(seconds, "measure dense"):
        said = measuring.answers(model, by)
        found = {"dense": measuring.measure(model, by, said)}
    with _timed(seconds, "prune"):
        applied, inputs = _applied(run, tell)
    stages.append(_stage("after", model, run.plan))
    with _timed(seconds, "measure pruned"):
        says = measuring.answers(model, by)
        found["pruned"] = measuring.measure(model, by, says)
        compared = measuring.same_predictions(model, dense, by)
        found["pruned"] += compared or measuring.same_answers(says, said)
    variants, notes, small = {"dense": dense, "pruned": model}, run.notes, None
    if run.plan.analysis is not None:
        with _timed(seconds, "shrink"):
            small, said_of_it = smaller(model, applied.masks, run.plan)
        notes = (*notes, *said_of_it)
        if small is not None:
            variants["shrunk"] = small
            found["shrunk"] = measuring.measure(small, replace(by, text=None, labelled=None))
    with _timed(seconds, "latency"):
        for name, speed in measuring.compare_speed(variants, by).items():
            found[name] += speed
    for name, data in (("text judged by", by.text), ("batches judged by", by.labelled)):
        if data is not None:
            inputs[name] = digest(data)
    return Result(found, applied, tuple(stages), notes, inputs, seconds, small)


def _applied(run: Run, tell: Tell) -> tuple[Applied, dict[str, str]]:
    """Prune the run's model in place; what was done, and the digest of what it was calibrated on."""
    data, inputs = None, {}
    if run.calibration is not None:
        tell("calibration data", 0, 1)
        batches = run.calibration.batches()
        tell("calibration data", 1, 1)
        inputs["calibration data"] = digest(batches)
        data = measuring.counted(batches, "calibration", tell)
    calibrating = nullcontext() if data is None else measuring.running_on("the calibration data")
    with calibrating:
        return apply_(run.asked, run.plan, run.loaded.model, data, tell, example=run.by.example), inputs


def _copied(model: torch.nn.Module, spec: str) -> torch.nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{spec_name(spec)}: this model cannot be copied ({reason}), and a copy is needed to compare with"
        ) from error


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


def _stage(name: str, model: torch.nn.Module, todo: Plan) -> report.Stage:
    return report.Stage(
        name, {layer.name: report.histogram(layer.weight, name=layer.name) for layer in todo.touched}
    )


def stored_dtype(loaded: models.Loaded) -> torch.dtype | None:
    """Weights go back in the type their files had; where those mix types, in the type that lost nothing."""
    if loaded.kind != "transformers" or loaded.stored_dtype is None:
        return None
    return None if len(_types(loaded)) > 1 else loaded.stored_dtype


def _types(loaded: models.Loaded) -> set[str]:
    """Floating-point types in the weight files, in safetensors' spelling."""
    assert loaded.folder is not None
    files = [loaded.folder / name for name in loaded.files if name.endswith(".safetensors")]
    kinds = {kind for path in files for kind, _ in headers(path).values()}
    return {kind for kind in kinds if kind.startswith(("F", "BF"))}


def _rounding(loaded: models.Loaded) -> list[str]:
    """A note where the weights are held in a type that cannot hold what the files say."""
    held: Any = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), None)
    stored = loaded.stored_dtype
    if held is None or stored is None or torch.promote_types(held, stored) == held:
        return []
    return [f"The weights are rounded to {held}; the files hold {stored}. Leave --dtype out to keep them."]
