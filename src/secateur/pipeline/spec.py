"""What an experiment asks for, as a strict schema: what holds for all of it, and its stages.

    model: gpt2
    data: train.txt
    stages:
      - prune: {method: wanda, sparsity: 0.5}
      - fine-tune: {epochs: 1}

A list of stages is carried out as it stands; a mapping, which has no order, in the recommended one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from secateur.errors import UsageError, nearest
from secateur.pipeline.document import Document, Place, read
from secateur.pipeline.order import checked_order, recommended
from secateur.request import PruneRequest, check_target, fault

__all__ = [
    "STAGES",
    "Common",
    "Distillation",
    "Experiment",
    "Export",
    "Pruning",
    "Quantization",
    "Shrinking",
    "Stage",
    "Training",
    "experiment",
    "read_experiment",
]

Scheme = Literal["int8", "int4", "int8-dynamic"]
Loss = Literal["language-model", "single-label", "multi-label", "regression"]


def _words(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Positive = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Common(_Settings):
    """What holds for the whole experiment: the model, and the data that it learns from and is judged by.

    Those of `secateur prune` mean what they mean there. `train` is what stages that train learn from, where
    that is not `data`: a text for a causal language model, else file.py:function giving (inputs, labels); `windows` and
    `batch` cut a text. A tenth of it is held out and chooses the epoch.
    """

    model: Annotated[str, Field(min_length=1)]
    train: str | None = None
    windows: Annotated[int, Field(ge=2)] = 256
    batch: Annotated[int, Field(ge=1)] = 8
    data: str | None = None
    samples: Annotated[int, Field(ge=1)] = 128
    context: Annotated[int | None, Field(ge=2)] = None
    evaluate: str | None = None
    labelled: str | None = None
    evaluate_tokens: Annotated[int, Field(ge=2)] = 32_768
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: str | None = None
    device: str = "cpu"

    @property
    def method(self) -> str:
        """What messages about data call the reader of them."""
        return "of this experiment"


class Training(_Settings):
    """Stages `train` and `fine-tune`; see `finetune_`."""

    epochs: Annotated[int, Field(ge=1)] = 3
    lr: Positive = None
    original_lr: Positive = None
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Weight = 0.01
    clip: Positive = 1.0
    accumulate: Annotated[int, Field(ge=1)] = 1
    autocast: Literal["bfloat16"] | None = None
    patience: Annotated[int | None, Field(ge=0)] = None
    loss: Loss | None = None


class Distillation(Training):
    """Stage `distil`; see `distill_`. Without a teacher, the model as it was loaded is one."""

    teacher: str | None = None
    soft: Weight = 1.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    hard: Weight = 0.0
    hidden: Weight = 0.0
    attention: Weight = 0.0


class Gradually(Training):
    """What stage `prune` takes beside the settings of `secateur prune`: pruning while the model trains.

    `begin` and `end` are fractions of the steps between which `updates` prunings lie.
    """

    schedule: Literal["linear", "cubic", "exponential", "constant"] | None = None
    begin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    end: Annotated[float, Field(gt=0, le=1)] = 0.7
    updates: Annotated[int, Field(ge=1)] = 20


class Shrinking(_Settings):
    """Stage `shrink`: units that are wholly pruned are taken out, as `prune: {shrink: true}` does at once."""

    homogeneous: bool = False


class Quantization(_Settings):
    """Stage `quantize`; see `quantize_`."""

    scheme: Scheme = "int8"
    group: Annotated[int | None, Field(ge=1)] = None
    outer: Scheme | None = "int8"
    only: Words = ()
    skip: Words = ()


class Export(_Settings):
    """Stage `export`: what is written. A checkpoint loads anywhere; integers take the least room."""

    to: Literal["checkpoint", "integers"] | None = None  # integers where the model is quantized


@dataclass(frozen=True)
class Pruning:
    """Stage `prune`.

    Attributes:
        asked: as `secateur prune` would be asked.
        gradually: with its schedule, where the model is pruned while it trains.
    """

    asked: PruneRequest
    gradually: Gradually | None = None


Settings = Training | Distillation | Pruning | Shrinking | Quantization | Export
STAGES: dict[str, type[Any]] = {
    "train": Training,
    "distil": Distillation,
    "prune": Pruning,
    "shrink": Shrinking,
    "quantize": Quantization,
    "fine-tune": Training,
    "export": Export,
}


@dataclass(frozen=True)
class Stage:
    """One stage: what kind, with which settings, and what was written of it."""

    name: str
    settings: Any
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A validated experiment.

    Attributes:
        common: what holds for all of it.
        stages: in the order in which they are carried out.
        notes: what a reader should know about the order.
    """

    common: Common
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def trains(self) -> bool:
        """Whether a stage learns from data."""
        return any(isinstance(s.settings, Training) or _gradual(s) for s in self.stages)

    def plain(self) -> dict[str, Any]:
        """What was asked, without defaults, as JSON and YAML values; `experiment` takes it again."""
        said = self.common.model_dump(mode="json", exclude_unset=True)
        stages = [{stage.name: dict(stage.given)} for stage in self.stages]
        return json.loads(json.dumps({**said, "stages": stages}))


def _gradual(stage: Stage) -> bool:
    return isinstance(stage.settings, Pruning) and stage.settings.gradually is not None


def read_experiment(path: str | Path) -> Experiment:
    """An experiment from a YAML file; every error names the line.

    Raises:
        UsageError: no plain YAML, an unknown or missing setting, a value of the wrong kind or out of range, an order of
            stages that makes no sense.
        InputError: no text.
    """
    document = read(path)
    return experiment(document.value, document)


def experiment(given: Any, document: Document | None = None) -> Experiment:
    """Check an experiment given as plain values; see `read_experiment`.

    Args:
        given: a mapping as the file would hold it.
        document: where it was read from, for line numbers.
    """
    at = document or Document(given, "experiment", {})
    if not isinstance(given, Mapping) or "stages" not in given:
        raise UsageError(
            f"{at.where(())}: an experiment is a mapping with model and stages, the stages a list such as "
            "[prune: {sparsity: 0.5}, fine-tune: {epochs: 3}]"
        )
    rest = {key: value for key, value in given.items() if key != "stages"}
    common: Common = _validated(Common, rest, (), at, known=[*Common.model_fields, "stages"])
    listed, named = _listed(given["stages"], at)
    stages = [_stage(name, settings, place, common, at) for name, settings, place in listed]
    places = [place for _, _, place in listed]
    if named:
        order = recommended([(stage.name, stage.settings) for stage in stages])
        stages, places = [stages[i] for i in order], [places[i] for i in order]
    notes = checked_order(
        [(stage.name, stage.settings) for stage in stages], [at.where(place) for place in places]
    )
    return Experiment(common, tuple(stages), notes)


def _listed(stages: Any, at: Document) -> tuple[list[tuple[str, Any, Place]], bool]:
    """Name, settings and place of every stage; whether they come without an order."""
    if isinstance(stages, Mapping) and stages:
        return [(name, settings, ("stages", name)) for name, settings in stages.items()], True
    if not isinstance(stages, list) or not stages:
        raise UsageError(
            f"{at.where(('stages',))}: stages is {stages!r}; expected a list, or a mapping for the recommended order; "
            f"stages are {', '.join(STAGES)}"
        )
    found: list[tuple[str, Any, Place]] = []
    for number, entry in enumerate(stages):
        if isinstance(entry, str):
            found.append((entry, {}, ("stages", number)))
        elif isinstance(entry, Mapping) and len(entry) == 1:
            ((name, settings),) = entry.items()
            found.append((name, settings, ("stages", number, name)))
        else:
            raise UsageError(
                f"{at.where(('stages', number))}: a stage is one name with its settings, as prune: {{sparsity: 0.5}}; "
                f"got {entry!r}"
            )
    return found, False


def _stage(name: str, given: Any, place: Place, common: Common, at: Document) -> Stage:
    if name not in STAGES:
        raise UsageError(f"{at.where(place)}: {name} is no stage; {nearest(str(name), STAGES)}")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise UsageError(f"{at.where(place)}: {name} is {given!r}; expected its settings, as a mapping")
    if name == "prune":
        return Stage(name, _pruning(dict(given), place, common, at), given)
    return Stage(name, _validated(STAGES[name], given, place, at), given)


def _pruning(given: dict[str, Any], place: Place, common: Common, at: Document) -> Pruning:
    """Settings of `secateur prune` and, where a schedule says so, of training."""
    if given.get("method") == "gradual":
        given |= {"method": "magnitude", "schedule": given.get("schedule") or "cubic"}
    shared = set(Common.model_fields)
    own = {key: value for key, value in given.items() if key not in Gradually.model_fields}
    rest = {key: value for key, value in given.items() if key in Gradually.model_fields}
    known = [key for key in (*PruneRequest.model_fields, *Gradually.model_fields) if key not in shared]
    for key in own:
        if key in shared or key in ("stream", "max_ram", "permute", "decouple"):
            raise UsageError(
                f"{at.where((*place, key))}: {key} "
                + (
                    "holds for the whole experiment; move it to the top"
                    if key in shared
                    else "is no setting here"
                )
            )
    passed = {key: value for key, value in _set(common).items() if key in PruneRequest.model_fields}
    asked: PruneRequest = _validated(PruneRequest, passed | own, place, at, known=known)
    gradually: Gradually = _validated(Gradually, rest, place, at, known=known)
    if rest and gradually.schedule is None:
        first = next(iter(rest))
        raise UsageError(
            f"{at.where((*place, first))}: {first} belongs to pruning while the model trains; give schedule: cubic as "
            "well, or put it into a stage fine-tune"
        )
    if gradually.schedule is not None and asked.method is None:
        asked = asked.model_copy(update={"method": "magnitude"})
    try:
        check_target(asked)
    except UsageError as error:
        raise UsageError(f"{at.where(place)}: {str(error).replace('--', '')}") from None
    return Pruning(asked, gradually if gradually.schedule is not None else None)


def _set(common: Common) -> dict[str, Any]:
    return {key: getattr(common, key) for key in common.model_fields_set}


def _validated(kind: type[Any], given: Mapping[str, Any], place: Place, at: Document, known: Any = None) -> Any:
    try:
        return kind(**{str(key): value for key, value in given.items()})
    except ValidationError as error:
        said = [
            f"{at.where((*place, *problem['loc']))}: {fault(problem, known or kind.model_fields)}"
            for problem in error.errors()
        ]
        raise UsageError("; ".join(said)) from None
