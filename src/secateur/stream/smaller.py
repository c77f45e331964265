"""Whole units chosen and taken out of a checkpoint in one run: what is said before, and what is written beside."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur import __version__
from secateur.card import code, plain
from secateur.deploy.shrunk import Shrunk
from secateur.deploy.unseen import plan_cuts
from secateur.folder import write_json, write_text
from secateur.request import spec_name
from secateur.results import SPECS, as_yaml, layer_lines, without_path
from secateur.stream.choosing import Choosing
from secateur.stream.memory import tokens_of, told
from secateur.stream.shrinking import write_small

__all__ = ["Shrinking", "Smaller"]


@dataclass(frozen=True)
class Smaller:
    """What was written.

    Attributes:
        form: "hf" or "compact".
        note: what was cut.
        parameters: before and after; tied ones once.
        keep: axis -> units that stay.
    """

    form: str
    note: Shrunk
    parameters: tuple[int, int]
    keep: Mapping[str, Tensor]


@dataclass(frozen=True)
class Shrinking:
    """Everything that is decided before a weight is read.

    Attributes:
        choosing: which units, and by what.
        notes: sentences that a reader needs.
    """

    choosing: Choosing
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        made, shards = self.choosing, self.choosing.opened.places.shards
        total, files = sum(shards.sizes.values()), len(shards.sizes)
        checkpoint = made.opened.checkpoint
        lines = [f"model    {checkpoint.folder}, {told(total)} in {files} file{'s' * (files != 1)}"]
        lines.append(f"prune    {made.todo}")
        if made.batches is not None:
            lines.append(f"data     {len(made.batches)} batches, {sum(map(tokens_of, made.batches)):,} tokens")
        lines += [f"memory   {made.need}", f"disk     at most {told(total)}"]
        lines += [f"leave    {line}" for line in layer_lines(made.todo)]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])

    def carry_out(
        self, folder: Path, asked: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None
    ) -> Smaller:
        """Choose, cut and write into a folder that is there.

        Args:
            folder: written into.
            asked: the caller's own words, for run/recipe.yaml.
            settings: the same with every default, for run/recipe.resolved.yaml.
        """
        made = self.choosing
        opened, tell = made.opened, made.tell
        with tempfile.TemporaryDirectory(prefix=".chosen-", dir=folder) as state:
            keep = made.kept(Path(state))
        tell("planning the cuts", 0, 1)
        note = plan_cuts(opened.model, keep, made.todo.example, analysis=made.todo.analysis)
        tell("planning the cuts", 1, 1)
        form = write_small(opened, note, folder, to="auto", tell=tell)
        assert made.todo.analysis is not None
        after = made.todo.analysis.parameter_count(keep)
        done = Smaller(form, note, (made.todo.analysis.parameter_count(), after), keep)
        self._summary(folder, done, asked, settings)
        return done

    def _summary(
        self, folder: Path, done: Smaller, asked: Mapping[str, Any] | None, settings: Mapping[str, Any] | None
    ) -> None:
        made, run = self.choosing, folder / "run"
        run.mkdir(exist_ok=True)
        write_json(run / "units.json", {name: kept.tolist() for name, kept in done.keep.items()})
        facts = {
            "secateur": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "streamed": True,
            "recipe": made.todo.recipe.describe(),
            "seed": made.seed,
            "form": done.form,
            "parameters": list(done.parameters),
            "checked": list(done.note.checked),
            "axes": [dict(vars(axis)) for axis in done.note.axes],
            "source": {"sha256": made.opened.checkpoint.fingerprint, "files": made.opened.checkpoint.files},
            "notes": list(self.notes),
        }
        write_json(run / "run.json", facts)
        if asked is not None:
            write_text(run / "recipe.yaml", as_yaml(dict(asked)))
            told_all = {**(settings or {}), **asked}
            shown = {k: without_path(k, v) if k in SPECS and v else v for k, v in told_all.items()}
            write_text(run / "recipe.resolved.yaml", as_yaml({**shown, "resolved": facts["recipe"]}))
        write_text(folder / "README.md", self._card(done))

    def _card(self, done: Smaller) -> str:
        made = self.choosing
        (before, after), checkpoint = done.parameters, made.opened.checkpoint
        how = (
            f"{made.opened.kind.__name__}.from_pretrained(folder)"
            if done.form == "hf"
            else "secateur.load(folder)"
        )
        lines = [
            f"# {code(spec_name(str(checkpoint.folder)))}, smaller",
            "",
            f"{before:,} parameters, {after:,} left, made by secateur {__version__} from file to file: "
            f"{plain(str(made.todo))}.",
            "",
            "It was compared with the pruned computation operator by operator, and not measured: `secateur evaluate` "
            "measures it. The units that stay are in `run/units.json`.",
            *(f"\nNote: {plain(note)}." for note in self.notes),
            "",
            f"Load it with {code(how)}.",
        ]
        return "\n".join(lines) + "\n"
