"""An experiment is run: stage after stage, each measured and recorded before the next begins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import __version__
from secateur.deploy.cuts import to_json
from secateur.errors import UsageError
from secateur.evaluate import Measurement
from secateur.folder import interrupted, is_run_folder, new_folder, write_json, write_text
from secateur.measure import Tell
from secateur.pipeline.output import write_output
from secateur.pipeline.records import Journal, differences, public
from secateur.pipeline.shrinking import cut_again_
from secateur.pipeline.spec import Experiment, Quantization
from secateur.pipeline.stages import Work, carry_out
from secateur.pipeline.subject import Loading, Subject, check_code, prepare
from secateur.results import as_yaml, circumstances
from secateur.run import check_apart

__all__ = ["Outcome", "experiment_to", "run_experiment"]

START = "start"  # of a folder of shared stages: the state after the last of them
Say = Callable[[str], Any]


def _silent(*_: Any) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment came to.

    Attributes:
        measurements: stage, as `1 prune`, -> what was measured after it; `0 load` is the dense model.
        records: one a stage, with settings, details and notes, as in results.json.
    """

    measurements: dict[str, list[Measurement]]
    records: tuple[dict[str, Any], ...]


def experiment_to(
    experiment: Experiment,
    out: str | Path,
    *,
    if_exists: str = "resume",
    allow_code: bool = False,
    loading: Loading | None = None,
    start: Path | None = None,
    shared: bool = False,
    tell: Tell = _silent,
    say: Say = _silent,
) -> Outcome:
    """Run an experiment and write its folder; a run that was interrupted goes on, one that is finished is told again.

    Args:
        experiment: what `read_experiment` or `experiment` returned.
        out: its folder, written beside its place and renamed when all is done.
        if_exists: "resume", "fail" or "overwrite", see `folder.new_folder`.
        allow_code, loading, start, shared, tell, say: see `run_experiment`.

    Raises:
        UsageError: see `run_experiment`; a finished folder of another experiment, naming what changed.
    """
    check_code(experiment, allow_code)
    check_apart(experiment.common.model, out)
    if if_exists == "resume" and is_run_folder(out) and interrupted(out) is None:
        return _finished(experiment, Path(out), loading or Loading(), tell, say)
    with new_folder(out, if_exists) as folder:
        return run_experiment(
            experiment,
            folder,
            allow_code=allow_code,
            loading=loading,
            start=start,
            shared=shared,
            tell=tell,
            say=say,
        )


def run_experiment(
    experiment: Experiment,
    folder: str | Path,
    *,
    allow_code: bool = False,
    loading: Loading | None = None,
    start: Path | None = None,
    shared: bool = False,
    tell: Tell = _silent,
    say: Say = _silent,
) -> Outcome:
    """Run an experiment in a folder that is there; where an earlier run was interrupted in it, that one goes on.

    Args:
        experiment: what `read_experiment` or `experiment` returned.
        folder: `run/results.csv` and `run/results.json` in it are whole after every stage, `run/state` is what a
            resume needs. In the end it holds the model as well.
        allow_code: run the user's own files that the experiment names.
        loading: what is allowed while models are loaded.
        start: a finished folder of `shared` stages; where they are the first of this experiment, on the same model and
            data, they are not done again.
        shared: write what others start from in place of a model.
        tell: progress.
        say: prints a line, after every stage.

    Raises:
        UsageError: the experiment does not fit the model or the data, names code that is not allowed, or what was
            begun in the folder was another one; says what changed.
        NumericError: NaN or Inf, at which step; the state of the stage before is kept.

    Cost: its stages, and a measurement after each.
    """
    check_code(experiment, allow_code)
    folder = Path(folder)
    subject = prepare(experiment, loading or Loading(), tell)
    journal = Journal(folder)
    asked = _asked(experiment, subject)
    about = {**asked, "versions": {"secateur": __version__, "torch": torch.__version__}}
    if start is not None:
        journal.take_over(start / START, about, _first_notes(subject))
    if journal.begin(about):
        if (cuts := journal.cuts()) is not None:
            cut_again_(subject, cuts)
        subject.masks = journal.restore_(subject.tensors())
        subject.quantization = _quantization(experiment, len(journal.records))
        say(f"going on after stage {journal.records[-1]['stage']}")
    write_text(folder / "run" / "recipe.yaml", as_yaml(experiment.plain()))
    work = Work(journal.state, tell)
    for number in range(len(journal.records), len(experiment.stages) + 1):
        _stage(number, subject, journal, work, say)
    if shared:
        journal.hand_over(folder / START)
    else:
        write_output(subject, journal, folder)
    seconds = {f"{r['stage']} {r['name']}": r["seconds"] for r in journal.records}
    said = circumstances(experiment.common, subject.loaded, subject.identity(), seconds)
    write_json(folder / "run" / "run.json", {**said, "experiment": {**asked, "experiment": public(experiment)}})
    return _outcome(journal.records)


def _finished(experiment: Experiment, folder: Path, loading: Loading, tell: Tell, say: Say) -> Outcome:
    """What a finished folder holds, once the experiment, the model and the data are known to be the same."""
    path = folder / "run" / "run.json"
    try:
        before = json.loads(path.read_text("utf-8"))["experiment"]
        records = json.loads((folder / "run" / "results.json").read_text("utf-8"))["stages"]
        outcome = _outcome(records)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder} already holds a finished result of something else; choose another folder, or replace it with "
            "--if-exists overwrite"
        ) from None
    now = _asked(experiment, prepare(experiment, loading, tell))
    changed = differences(before, {**now, "experiment": public(experiment)})
    if changed:
        raise UsageError(
            f"{folder} already holds a finished result, of another experiment: {'; '.join(changed)}. Choose another "
            "folder, or replace it with --if-exists overwrite"
        )
    say(f"everything is done: {len(records) - 1} stages, nothing is repeated")
    return outcome


def _asked(experiment: Experiment, subject: Subject) -> dict[str, Any]:
    """What decides the result: an experiment, and digests of the model and the data."""
    return {"experiment": experiment.plain(), "digests": subject.identity()}


def _first_notes(subject: Subject) -> list[str]:
    return [*subject.notes, *subject.experiment.notes]


def _outcome(records: Sequence[dict[str, Any]]) -> Outcome:
    found = {
        f"{r['stage']} {r['name']}": [Measurement.from_dict(m) for m in r["measurements"]] for r in records
    }
    return Outcome(found, tuple(records))


def _stage(number: int, subject: Subject, journal: Journal, work: Work, say: Say) -> None:
    """One stage, from the state before to its record; number 0 is the model as it was loaded."""
    began = time.perf_counter()
    stages = subject.experiment.stages
    name = stages[number - 1].name if number else "load"
    record: dict[str, Any] = {"stage": number, "name": name}
    if number:
        stage = stages[number - 1]
        done = carry_out(name, subject, stage.settings, work)
        record |= {"settings": dict(stage.given), "details": dict(done.details), "notes": list(done.notes)}
    else:
        record |= {"settings": {}, "details": {}, "notes": _first_notes(subject)}
    subject.pristine = not number
    found = subject.measured(work.state)
    record["measurements"] = [m.to_dict() for m in found]
    record["seconds"] = round(time.perf_counter() - began, 3)
    cuts = None if subject.cuts is None else to_json(subject.cuts)
    journal.add(record, subject.tensors(), subject.masks, cuts)
    say(f"{number} {name}: {'; '.join(map(str, _headline(found)))}")


def _quantization(experiment: Experiment, done: int) -> Quantization | None:
    """Settings of the stage that quantized, where one has."""
    found = [s.settings for s in experiment.stages[: done - 1] if isinstance(s.settings, Quantization)]
    return found[-1] if found else None


def _headline(found: list[Measurement]) -> list[Measurement]:
    """What one line about a stage says: of times the speed-up, which is of one moment, where there is one."""
    time = "speedup" if any(m.name == "speedup" for m in found) else "latency"
    wanted = ("perplexity", "accuracy", "sparsity", "parameters", "disk_bytes", time)
    return [Measurement(m.name, m.value, m.unit) for m in found if m.name in wanted]
