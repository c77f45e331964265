"""Where an experiment stands, on disk: what was measured so far, and what the next stage starts from.

`run/results.json` and `run/results.csv` are whole after every stage. `run/state/progress.json` is what a resume goes
by: it is renamed into place once the model and the masks that it names are there, so a kill at any moment leaves the
stage before or the stage after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.stored import save_tensors
from secateur.errors import InputError, UsageError
from secateur.folder import write_json, write_text
from secateur.pipeline.spec import Experiment
from secateur.results import SPECS, as_csv, without_path

__all__ = ["Journal", "public"]

FORMAT = "secateur.experiment.v1"
Record = dict[str, Any]


class Journal:
    """The records of the stages that are done, and the state after the last of them.

    Args:
        folder: of the experiment, under way.
    """

    def __init__(self, folder: Path):
        self.run, self.state = folder / "run", folder / "run" / "state"
        self.records: list[Record] = []
        self.about: dict[str, Any] = {}

    @property
    def progress(self) -> Path:
        """The file that a resume goes by."""
        return self.state / "progress.json"

    def begin(self, about: Mapping[str, Any]) -> bool:
        """Start, or go on where an earlier run of the same experiment was interrupted; True for the latter.

        Raises:
            UsageError: another experiment, model or data, naming what changed.
            InputError: a state that cannot be read.
        """
        self.about = dict(about)
        self.state.mkdir(parents=True, exist_ok=True)
        if not self.progress.exists():
            return False
        found = self._read(self.progress)
        changed = differences(found["about"], self.about)
        if changed:
            raise UsageError(
                f"this experiment was begun otherwise: {'; '.join(changed)}. Give what was given then, or start anew "
                "with --if-exists overwrite"
            )
        self.records = found["records"]
        self.publish()
        return bool(self.records)

    def take_over(self, start: Path, about: Mapping[str, Any], notes: Sequence[str]) -> bool:
        """Begin where another experiment ended, if its stages are the first of this one, on the same model and data.

        Args:
            start: the folder that `hand_over` wrote into.
            about: of this experiment.
            notes: of its first record.

        Returns:
            Whether it was so; nothing is done where not, or where this one is under way already.

        Raises:
            InputError: a state that cannot be read.
        """
        if self.progress.exists():
            return False
        found = self._read(start / self.progress.name)
        before, stages = found["about"], about["experiment"]["stages"]
        first = {**about["experiment"], "stages": stages[: len(before["experiment"]["stages"])]}
        digests = {name: about["digests"].get(name) for name in before["digests"]}
        if differences(before, {**about, "experiment": first, "digests": digests}):
            return False
        self.state.mkdir(parents=True, exist_ok=True)
        for path in start.glob("*-*"):
            shutil.copyfile(path, self.state / path.name)
        found["records"][0]["notes"] = list(notes)
        write_json(self.progress, {**found, "about": dict(about)})  # last: a kill before it leaves no beginning
        return True

    def hand_over(self, start: Path) -> None:
        """Copy the state after the last stage into a folder, for experiments that begin with the same stages."""
        start.mkdir(exist_ok=True)
        for path in (*self.state.glob("*-*"), self.progress):
            shutil.copyfile(path, start / path.name)

    def _read(self, path: Path) -> dict[str, Any]:
        """What a file of progress says."""
        try:
            found = json.loads(path.read_text("utf-8"))
            held = {"about": dict(found["about"]), "records": list(found["records"]), "masks": found["masks"]}
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no readable state of an experiment ({error}); start anew with --if-exists overwrite"
            ) from None
        return {"format": FORMAT, **held}

    def add(self, record: Record, tensors: Mapping[str, Tensor], masks: Masks, cuts: Any = None) -> None:
        """A stage is done: keep the state that the next one starts from, then what was measured.

        Args:
            record: of the stage.
            tensors, masks: after it.
            cuts: as JSON, what was taken out of the model so far; None where nothing.
        """
        number = record["stage"]
        own = {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
        }
        save_tensors(self._model(number), own)
        if masks:
            masks.save(self._masks(number))
        if cuts is not None:
            write_json(self._cuts(number), cuts)
        self.records.append(record)
        write_json(
            self.progress,
            {"format": FORMAT, "about": self.about, "records": self.records, "masks": bool(masks)},
        )
        self.publish()
        (self.state / "training.safetensors").unlink(missing_ok=True)
        for old in (self._model(number - 1), self._masks(number - 1), self._cuts(number - 1)):
            old.unlink(missing_ok=True)

    def cuts(self) -> Any:
        """What was taken out of the model up to the last stage that is done, as JSON; None where nothing.

        Raises:
            InputError: a file that cannot be read.
        """
        path = self._cuts(self.records[-1]["stage"])
        try:
            return json.loads(path.read_text("utf-8")) if path.exists() else None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); start anew with --if-exists overwrite"
            ) from None

    def restore_(self, tensors: Mapping[str, Tensor]) -> Masks:
        """Fill the model's tensors with the state after the last stage that is done; returns the masks.

        Raises:
            InputError: files that are missing, altered or of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        number = self.records[-1]["stage"]
        path = self._model(number)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); start anew with --if-exists overwrite"
            ) from None
        wrong = [name for name, t in tensors.items() if name not in found or found[name].shape != t.shape]
        if wrong or len(found) != len(tensors):
            raise InputError(
                f"{path}: is of another model ({', '.join(wrong[:3])}); start anew with --if-exists overwrite"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(found[name])
        masks = self._masks(number)
        return Masks.load(masks) if masks.exists() else Masks({})

    def publish(self) -> None:
        """Write what was measured so far, each file at once."""
        plain = {f"{r['stage']} {r['name']}": r["measurements"] for r in self.records}
        write_json(self.run / "results.json", {"stages": self.records})
        write_text(self.run / "results.csv", as_csv(plain))

    def _model(self, number: int) -> Path:
        return self.state / f"model-{number}.safetensors"

    def _cuts(self, number: int) -> Path:
        return self.state / f"cuts-{number}.json"

    def _masks(self, number: int) -> Path:
        return self.state / f"masks-{number}.safetensors"


def public(experiment: Experiment) -> dict[str, Any]:
    """What was asked, without paths of this machine."""
    plain = experiment.plain()
    for key in (*SPECS, "train"):
        if plain.get(key):
            plain[key] = without_path(key, plain[key])
    return plain


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """What is not the same in two nested values, each as one phrase."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            said
            for key in dict.fromkeys([*before, *now])
            for said in differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
        ]
    if _list(before) and _list(now) and len(before) == len(now):
        return [
            said
            for number, (a, b) in enumerate(zip(before, now, strict=True), 1)
            for said in differences(a, b, f"{place} {number}")
        ]
    if before == now:
        return []
    if place.startswith("digests."):
        return [f"the {place.removeprefix('digests.')} changed"]
    return [f"{place.removeprefix('experiment.')} was {_shown(before)}, now {_shown(now)}"]


def _list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    return "not there" if value is None else json.dumps(value)
