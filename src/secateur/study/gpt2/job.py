"""The study row by row: each piece is on the disk before the next begins, and a killed study goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from secateur.errors import InputError, UsageError
from secateur.evaluate import Measurement
from secateur.folder import write_json
from secateur.measure import Tell
from secateur.model import Loaded, fingerprint

from . import tasks
from .given import Given, Plan
from .variants import variants

__all__ = ["Row", "Study", "study"]

PIECES = ("before", "after", "speed")
Found = dict[str, Measurement]


@dataclass(frozen=True)
class Row:
    """One model of the study: what was measured before and after fine-tuning, its size and its times."""

    name: str
    before: Found = field(default_factory=dict)
    after: Found = field(default_factory=dict)
    speed: Found = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What was found so far.

    Attributes:
        model: its name.
        rows: in the order of the table.
        lead: ROUGE of each article's first three sentences.
        notes: remarks for the reader.
        pieces: how many were wanted in all; three a row.
    """

    model: str
    rows: tuple[Row, ...]
    lead: Found
    notes: tuple[str, ...]
    pieces: int

    @property
    def done(self) -> int:
        """How many pieces there are."""
        return sum(bool(getattr(row, piece)) for row in self.rows for piece in PIECES)


def study(
    name: str,
    loaded: Loaded,
    smaller: Loaded | None,
    given: Given,
    plan: Plan,
    state: Path,
    tell: Tell,
    *,
    show: Callable[[Study], Any] = lambda found: None,
) -> Study:
    """Make every model, measure it, fine-tune it, measure it again.

    Args:
        name: of the model, for people.
        loaded: the baseline with its tokenizer.
        smaller: a smaller model with the same tokens; None to distil one.
        given: the data.
        plan: sizes and settings.
        state: folder in which finished pieces lie; what is there already is not done again.
        tell: progress.
        show: called after every piece with what there is so far.

    Raises:
        UsageError: a model without tokenizer or with other tokens, or pieces of another study in `state`.
        InputError: a piece that cannot be read.
    """
    tokenizer: Any = loaded.tokenizer
    _check(loaded, smaller)
    _same_study(state, _identity(loaded, smaller, given, plan))
    makers, notes = variants(loaded.model, None if smaller is None else smaller.model, given, plan, tell)
    lead = tasks.lead_scores(given.articles) if given.articles is not None else {}
    pieces: dict[str, dict[str, Found]] = {key: _read(state, key) for key in makers}

    def so_far() -> Study:
        rows = tuple(Row(key, **held) for key, held in pieces.items())
        return Study(name, rows, lead, notes, len(PIECES) * len(makers))

    for at, (key, make) in enumerate(makers.items()):
        tell("rows of the study", at, len(makers))
        if len(pieces[key]) == len(PIECES):
            continue
        made = make()
        asked = tasks.Tasks(made, given, plan, tokenizer, tell)
        ways: dict[str, Callable[[], Found]] = {
            "before": asked.before,
            "after": asked.after,
            "speed": partial(tasks.speed, loaded.model, made, given, plan, tokenizer),
        }
        for piece in PIECES:
            if piece not in pieces[key]:
                pieces[key][piece] = ways[piece]()
                held = {label: found.to_dict() for label, found in pieces[key][piece].items()}
                write_json(state / f"{key}.{piece}.json", held)
                show(so_far())
    tell("rows of the study", len(makers), len(makers))
    return so_far()


def _check(loaded: Loaded, smaller: Loaded | None) -> None:
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None or not getattr(loaded.model, "can_generate", lambda: False)():
        raise UsageError(f"{loaded.spec}: is no causal language model with a tokenizer")
    if smaller is None:
        return
    theirs: Any = smaller.tokenizer
    if theirs is None or theirs.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"{smaller.spec} reads other tokens than {loaded.spec}, so their perplexities per token do not compare; "
            "give a smaller model with the same tokenizer, or none to distil one"
        )


def _identity(loaded: Loaded, smaller: Loaded | None, given: Given, plan: Plan) -> dict[str, str]:
    return {
        "model": fingerprint(loaded.model),
        "smaller model": "distilled" if smaller is None else fingerprint(smaller.model),
        "plan": repr(plan),
        **given.identity(),
    }


def _same_study(state: Path, identity: Mapping[str, str]) -> None:
    state.mkdir(parents=True, exist_ok=True)
    path = state / "study.json"
    if not path.is_file():
        write_json(path, dict(identity))
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); start anew with --if-exists overwrite") from None
    for key, value in identity.items():
        if before.get(key) != value:
            raise UsageError(
                f"{state.parent.parent}: the study was begun with another {key}; finish it as it was begun, or start "
                "anew with --if-exists overwrite"
            )


def _read(state: Path, key: str) -> dict[str, Found]:
    found = {}
    for piece in PIECES:
        path = state / f"{key}.{piece}.json"
        if not path.is_file():
            continue
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            found[piece] = {label: Measurement.from_dict(entry) for label, entry in held.items()}
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove it") from None
    return found
