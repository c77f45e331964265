"""What stages work on: the model as it is now, the model as it was, and the data of both."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur import evaluate, mixes, own
from secateur import measure as measuring
from secateur import model as models
from secateur.apply import planned
from secateur.core.gradients import GRADIENTS, KNOWN
from secateur.core.masks import Masks
from secateur.core.trained import GATHERED
from secateur.deploy import Quantized, Shrunk, fake_quantize_, quantize_, save_quantized
from secateur.deploy.integers import import_torchao
from secateur.deploy.quantize import chosen_layers
from secateur.errors import UsageError
from secateur.evaluate import Measurement
from secateur.measure import Tell, Yardstick
from secateur.pipeline.material import Material, material
from secateur.pipeline.spec import Distillation, Experiment, Pruning, Quantization
from secateur.prune import Plan
from secateur.recipes import Recipe
from secateur.request import PruneRequest, build_recipe, cuts_units, with_method
from secateur.scoring import statistics_of
from secateur.sources import Calibration, digest, sources, writes_text

__all__ = ["Loading", "Subject", "check_code", "named_code", "needs_data", "prepare", "settled"]


REPEATS = 7  # timed forward passes after every stage


@dataclass(frozen=True)
class Loading:
    """What the user allows while models are loaded."""

    offline: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass
class Subject:
    """A model on its way through the stages.

    Attributes:
        experiment: what is asked.
        loaded: the model, changed in place, and where it came from.
        dense: a copy of it as it was loaded.
        by: what it is judged by.
        calibration: data for statistics, None where no stage needs any.
        material: what stages that train learn from, None where none trains.
        teachers: models that the experiment names as teachers, by their specs.
        notes: on the data.
        masks: what is pruned so far.
        quantization: settings under which weights are rounded now, None before.
        cuts: what stages took out of the model as it was loaded, None where nothing.
        pristine: whether it is still the model as it was loaded.
        code: digests of the code that is no library's, of the model and its teachers, as it was when they were loaded.
    """

    experiment: Experiment
    loaded: models.Loaded
    dense: nn.Module
    by: Yardstick
    calibration: Calibration | None
    material: Material | None
    teachers: Mapping[str, models.Loaded]
    notes: tuple[str, ...] = ()
    masks: Masks = field(default_factory=lambda: Masks({}))
    quantization: Quantization | None = None
    cuts: Shrunk | None = None
    pristine: bool = False
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model as it is now."""
        return self.loaded.model

    def measured(self, state: Path) -> list[Measurement]:
        """Quality, size, speed and likeness to the dense model, now; of the integers, where weights are rounded.

        Args:
            state: a folder, for the file whose size is measured.
        """
        by = self.by
        model, sizes = (self.model, []) if self.quantization is None else self._integers(state)
        says = measuring.answers(model, by)
        found = measuring.measure(model, by if self.quantization is None else replace(by, example=None), says)
        if self.masks:
            of = {"of": f"{len(self.masks)} pruned layers"}
            found.append(Measurement("sparsity", self.masks.sparsity, "1", of))
        found += sizes + self._speed(model)
        if by.text is not None:
            return found + measuring.same_predictions(model, self.dense, by)
        return found + measuring.same_answers(says, measuring.answers(self.dense, by))

    def _speed(self, model: nn.Module) -> list[Measurement]:
        """Latency, in turns with the model as it was loaded where that is another, and the speed-up over it."""
        if self.by.example is None:
            return []
        if self.pristine:
            return [evaluate.latency(model, self.by.example, repeats=REPEATS, warmup=1)]
        return measuring.compare_speed({"loaded": self.dense, "now": model}, self.by, REPEATS)["now"]

    def _integers(self, state: Path) -> tuple[nn.Module, list[Measurement]]:
        """The model as integers, and the size of their file."""
        model = self.quantized()[0]
        file = state / "quantized.safetensors"
        save_quantized(model, file)
        size = Measurement("disk_bytes", file.stat().st_size, "bytes", {"files": 1, "pattern": file.name})
        file.unlink()
        return model, [size]

    def quantized(self) -> tuple[nn.Module, Quantized]:
        """A copy whose weights are integers, and what was done to it."""
        assert self.quantization is not None
        model = copy.deepcopy(self.model)
        return model, quantize_(model, **rounding(self.quantization))

    @contextmanager
    def rounded(self) -> Iterator[Masks]:
        """While stages train: weights rounded where they will be; the masks under the names of meanwhile."""
        if self.quantization is None:
            yield self.masks
            return
        with fake_quantize_(self.model, **rounding(self.quantization)) as held:
            yield held.masks(self.masks)

    def identity(self) -> dict[str, str]:
        """Digests of everything that decides the result beside the experiment itself."""
        seen = {"model": self.loaded.fingerprint}
        seen |= {f"teacher {name}": loaded.fingerprint for name, loaded in self.teachers.items()}
        seen |= self.code
        if self.material is not None:
            seen["training data"] = self.material.identity
        if self.calibration is not None and not self._own_text():
            seen["calibration data"] = digest(self.calibration.batches())
        if self.by.example is not None:
            seen["example"] = digest([self.by.example])
        for name, data in (("text judged by", self.by.text), ("batches judged by", self.by.labelled)):
            if data is not None:
                seen[name] = digest(data)
        return seen

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, shared ones once."""
        return {name: t.detach() for name, t in (*self.model.named_parameters(), *self.model.named_buffers())}

    def _own_text(self) -> bool:
        """Whether the model itself writes its calibration data, which its fingerprint and the seed decide."""
        common = self.experiment.common
        return common.data is None and common.labelled is None


def prepare(experiment: Experiment, loading: Loading, tell: Tell) -> Subject:
    """Load the model and the data, and check every stage against them; nothing is changed or written.

    Raises:
        UsageError, InputError: whatever is wrong with the model, the data or a stage's layers.
    """
    common = experiment.common
    for text in (common.data, common.evaluate, common.train):
        if text:
            mixes.check_there(text)
    tell("loading the model", 0, 1)
    loaded = _load(common.model, experiment, loading)
    names = [s.settings.teacher for s in experiment.stages if isinstance(s.settings, Distillation)]
    teachers = {name: _load(name, experiment, loading) for name in dict.fromkeys(names) if name is not None}
    tell("loading the model", 1, 1)
    pruning = [stage.settings for stage in experiment.stages if isinstance(stage.settings, Pruning)]
    needed = labels = False
    for each in pruning:
        recipe = build_recipe(_method_of(each.asked, loaded))
        needed = needed or needs_data(recipe, each)
        labels = labels or any(name in GRADIENTS for name in statistics_of(recipe.score))
        if not cuts_units(each.asked):
            settled(each.asked, loaded)
    for stage in experiment.stages:
        if isinstance(stage.settings, Quantization):  # what is missing is told before anything is trained
            import_torchao()
            how = rounding(stage.settings)
            chosen_layers(loaded.model, how["scheme"], how["outer"], how["only"], how["skip"])
    given = sources(common, loaded, needs_data=needed, labels=labels, tell=tell)
    for each in pruning:
        if cuts_units(each.asked):  # found on an example
            settled(each.asked, loaded, given.by.example)
    learned = material(common, loaded, tell) if experiment.trains else None
    dense = copy.deepcopy(loaded.model)
    by = replace(given.by, tell=tell)
    code = _code({"model": loaded, **{f"teacher {name}": each for name, each in teachers.items()}})
    return Subject(experiment, loaded, dense, by, given.calibration, learned, teachers, given.notes, code=code)


def _code(held: Mapping[str, models.Loaded]) -> dict[str, str]:
    """Digests of what these models compute by, of those that bring code of their own."""
    found = {f"code of the {name}": own.code_digest(each.spec, each.model) for name, each in held.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def settled(asked: PruneRequest, loaded: models.Loaded, example: Any = None) -> tuple[PruneRequest, Plan]:
    """A request with its method, and what it would prune of the model as it is."""
    asked = _method_of(asked, loaded)
    return asked, planned(asked, loaded.model, example)


def _method_of(asked: PruneRequest, loaded: models.Loaded) -> PruneRequest:
    return with_method(asked, language=loaded.tokenizer is not None and writes_text(loaded.model))


def rounding(settings: Quantization) -> dict[str, Any]:
    """Keywords of `quantize_` and `fake_quantize_`."""
    where = {"only": list(settings.only) or None, "skip": list(settings.skip) or None}
    return {"scheme": settings.scheme, "group": settings.group, "outer": settings.outer, **where}


def needs_data(recipe: Recipe, settings: Pruning) -> bool:
    """Whether a stage needs calibration data; training itself gives gradients to what prunes along with it."""
    given = GATHERED if settings.gradually is not None else ()
    names = [name for name in statistics_of(recipe.score) if name in KNOWN and name not in given]
    return bool(names) or recipe.update is not None


def named_code(experiment: Experiment) -> list[str]:
    """The user's own files that the experiment would run: file.py:function."""
    common = experiment.common
    named: list[Any] = [common.model, common.train, common.data, common.labelled]
    named += [s.settings.teacher for s in experiment.stages if isinstance(s.settings, Distillation)]
    return list(dict.fromkeys(spec for spec in named if spec is not None and own.is_own(spec)))


def check_code(experiment: Experiment, allow: bool) -> None:
    """Refuse to run code because a file says so.

    Raises:
        UsageError: the experiment names code, and nobody has allowed it.
    """
    named = named_code(experiment)
    if named and not allow:
        raise UsageError(
            f"the experiment names code of your own, {', '.join(named)}, and no code is run because a file says so; "
            "allow it with --allow-code (allow_code=True)"
        )


def _load(spec: str, experiment: Experiment, loading: Loading) -> models.Loaded:
    common = experiment.common
    return models.load(
        spec,
        dtype=common.dtype,
        device=common.device,
        seed=common.seed,
        **vars(loading),
    )
