"""The threshold study: a small network's weights at initialisation, trained, thresholded in the loop, and pruned."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import evaluate, report
from secateur.core.where import select
from secateur.demo.digits import digits
from secateur.errors import InputError, NumericError, UsageError
from secateur.evaluate import Measurement
from secateur.folder import write_json
from secateur.measure import Tell
from secateur.prune import prune_
from secateur.recipes import threshold
from secateur.training import Thresholding

__all__ = ["Images", "Plan", "Stage", "images", "network", "study", "write_study"]

# the arrays of a file, as Keras spells them and as the original files do
_SPELLINGS = (
    {name: name for name in ("x_train", "y_train", "x_test", "y_test")},
    {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"},
)
NAMES = ("convolution 1", "convolution 2", "feed-forward", "classification head")


@dataclass(frozen=True)
class Images:
    """Pictures `(count, 1, side, side)` between 0 and 1 with their classes, to train on and to test on."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """How the study is carried out.

    Attributes:
        epochs: of each of the three trainings.
        loop_tau: the threshold that every step of training applies.
        loop_percentile: instead of it, the percentage of each layer's weights that every step sets to zero.
        tau: the threshold after training.
        sweep: more thresholds after training.
        seed: of the initial weights and of the order of the pictures.
    """

    epochs: int
    loop_tau: float = 0.001
    loop_percentile: float = 20.0
    tau: float = 0.4
    sweep: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """The network at one moment.

    Attributes:
        name: what the moment is called.
        accuracy: on the test pictures.
        histograms: layer -> its weights.
        tau: the threshold that pruned it after training; None at the other stages.
    """

    name: str
    accuracy: Measurement
    histograms: dict[str, report.Histogram]
    tau: float | None = None

    @property
    def size(self) -> int:
        """Weights in all layers."""
        return sum(held.n for held in self.histograms.values())

    @property
    def zeros(self) -> int:
        """Weights that are exactly zero."""
        return sum(held.zeros for held in self.histograms.values())


def images(path: Path | None, *, samples: int | None = None, seed: int = 0) -> Images:
    """MNIST from `mnist.npz`, or scikit-learn's digits where no file is given.

    Args:
        path: an .npz file with `x_train`, `y_train`, `x_test`, `y_test` (or `train_images`, `train_labels` ...): bytes
            "count side side", and classes 0 to 9.
        samples: use so many pictures to train on, and at most so many to test on, chosen at random; all by default.
        seed: of the choice.

    Raises:
        UsageError: no such file, or fewer pictures than asked for.
        InputError: the file does not hold such arrays; pickled ones are not opened.
    """
    if path is None:
        train, test = digits()
        return Images("scikit-learn's digits", *(_chosen(part, samples, seed) for part in (train, test)))
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give mnist.npz, or leave --data out for scikit-learn's digits")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = next((names for names in _SPELLINGS if names["x_train"] in file.files), _SPELLINGS[0])
            arrays = {name: file[spelled] for name, spelled in names.items()}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{path}: is no .npz file of pictures ({' '.join(str(error).split())[:200]})"
        ) from None
    parts = [_read(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise InputError(f"{path}: pictures to train on and to test on are of different sizes")
    return Images(path.stem, *(_chosen(part, samples, seed) for part in parts))


def _read(path: Path, part: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    square = x.ndim == 3 and x.shape[1] == x.shape[2] and 4 <= x.shape[1] <= 64
    if not square or x.dtype != np.uint8 or y.shape != x.shape[:1] or y.dtype.kind not in "ui" or not len(y):
        raise InputError(
            f"{path}: x_{part} is {x.dtype} {x.shape} and y_{part} {y.dtype} {y.shape}; expected uint8 "
            "(count, side, side) with a side of 4 to 64, and one class for each picture"
        )
    if int(y.min()) < 0 or int(y.max()) > 9:
        raise InputError(f"{path}: y_{part} has the class {int(y.max())}; expected 0 to 9")
    return torch.from_numpy(x.astype(np.float32) / 255)[:, None], torch.from_numpy(y.astype(np.int64))


def _chosen(part: tuple[Tensor, Tensor], samples: int | None, seed: int) -> tuple[Tensor, Tensor]:
    x, y = part
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:samples]
    return x[rows], y[rows]


def network(side: int) -> nn.Module:
    """Two convolutions, a feed-forward layer and a classification head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (side // 2) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def study(given: Images, plan: Plan, tell: Tell) -> list[Stage]:
    """Initial, trained, trained with thresholding in the loop (two ways), and the trained one pruned at every tau.

    All trainings start from the same weights and see the same pictures in the same order.

    Raises:
        UsageError: a number out of range.
        NumericError: the training diverged.
    """
    _check(plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        initial = network(given.train[0].shape[-1])
    trained, thresholded, shared = (copy.deepcopy(initial) for _ in range(3))
    stages = [_stage("initial", initial, given)]
    jobs: list[tuple[str, nn.Module, dict[str, float]]] = [
        ("trained", trained, {}),
        (f"trained, τ = {plan.loop_tau:g} in the loop", thresholded, {"tau": plan.loop_tau}),
        (f"trained, {plan.loop_percentile:g} % in the loop", shared, {"percentile": plan.loop_percentile}),
    ]
    for done, (name, model, rule) in enumerate(jobs):
        tell("training", done, len(jobs))
        _train(model, given, plan, rule)
        stages.append(_stage(name, model, given))
    tell("training", len(jobs), len(jobs))
    for tau in sorted({*plan.sweep, plan.tau}):
        pruned = copy.deepcopy(trained)
        if any(bool((layer.weight.abs() <= tau).any()) for layer in select(pruned).chosen):
            prune_(pruned, recipe=threshold(tau))
        stages.append(_stage(f"pruned at τ = {tau:g}", pruned, given, tau))
    return stages


def _check(plan: Plan) -> None:
    taus = (plan.loop_tau, plan.tau, *plan.sweep)
    if (
        plan.epochs < 1
        or not all(0 <= tau < float("inf") for tau in taus)
        or not 0 <= plan.loop_percentile <= 100
    ):
        raise UsageError(
            f"epochs {plan.epochs}, thresholds {taus} and percentile {plan.loop_percentile}: expected at least 1 "
            "epoch, magnitudes of at least 0, and a percentage"
        )


def _train(model: nn.Module, given: Images, plan: Plan, rule: Mapping[str, Any]) -> None:
    """Adam; with a rule, every step ends by setting small weights to zero, which may grow again."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(plan.seed)
    x, y = given.train
    with Thresholding(model, regrow=True, **rule) if rule else nullcontext() as pruner:
        for _ in range(plan.epochs):
            for rows in torch.randperm(len(y), generator=generator).split(64):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if pruner is not None:
                    pruner.step()
            if not bool(loss.detach().isfinite()):
                raise NumericError("the training of the study diverged: its loss is NaN or Inf")


def _stage(name: str, model: nn.Module, given: Images, tau: float | None = None) -> Stage:
    chosen = select(model).chosen
    held = {
        label: report.histogram(layer.weight, name=label) for label, layer in zip(NAMES, chosen, strict=True)
    }
    x, y = given.test
    batches = list(zip(x.split(500), y.split(500), strict=True))
    return Stage(name, evaluate.accuracy(model, batches, dataset=f"{given.name}, test"), held, tau)


def write_study(folder: Path, given: Images, plan: Plan, stages: Sequence[Stage], *, pictures: bool) -> None:
    """Write study.json, report.html and, with `pictures`, life-cycle.png and sweep.png.

    Raises:
        UsageError: pictures without matplotlib.
    """
    rows = [
        {
            "stage": stage.name,
            "tau": stage.tau,
            "weights": stage.size,
            "zeros": stage.zeros,
            "accuracy": stage.accuracy.to_dict(),
            "layers": {name: {"weights": h.n, "zeros": h.zeros} for name, h in stage.histograms.items()},
        }
        for stage in stages
    ]
    write_json(
        folder / "study.json", {"data": given.name, "epochs": plan.epochs, "seed": plan.seed, "stages": rows}
    )
    life, sweep = _shown(plan, stages), _sweep(stages)
    if pictures:
        report.figures.histograms(life).savefig(folder / "life-cycle.png", dpi=120)
        report.figures.tradeoff(sweep).savefig(folder / "sweep.png", dpi=120)
    html = report.page(
        "The threshold study",
        summary=f"A network of {stages[0].size:,} weights on {given.name}: its weights through training and pruning.",
        stages=life,
        tau=plan.tau,
        tau_stage="trained",
        tradeoffs=[sweep],
        tables=[_table(stages), _by_layer(stages)],
        highlights=[_tile(stage) for stage in stages if stage.tau is None or stage.tau == plan.tau],
        notes=[
            f"Every training: Adam, {plan.epochs} epochs of {len(given.train[1]):,} pictures, same start and order.",
            "Thresholding in the loop sets weights to zero after every step; they may grow again.",
            "One seed: differences of a few tenths of a point between stages are noise.",
        ],
    )
    report.write(folder / "report.html", html)


def _shown(plan: Plan, stages: Sequence[Stage]) -> list[report.Stage]:
    return [report.Stage(s.name, s.histograms) for s in stages if s.tau is None or s.tau == plan.tau]


def _sweep(stages: Sequence[Stage]) -> report.Tradeoff:
    trained = next(stage for stage in stages if stage.name == "trained")
    pruned = [
        report.Point(s.zeros / s.size, s.accuracy.value, name=s.name) for s in stages if s.tau is not None
    ]
    loop = [
        report.Point(s.zeros / s.size, s.accuracy.value, name=s.name)
        for s in stages
        if s.name.endswith("in the loop")
    ]
    return report.Tradeoff(
        "Accuracy against sparsity",
        "zeros of all weights",
        "test accuracy (higher is better)",
        {"pruned after training, a sweep of τ": pruned, "in the training loop": loop},
        reference=trained.accuracy.value,
        reference_name="trained",
        better=("higher", "higher"),
    )


def _table(stages: Sequence[Stage]) -> report.Table:
    return report.Table(
        "Every stage",
        ["stage", "weights", "zeros", "sparsity", "test accuracy"],
        [[s.name, s.size, s.zeros, round(s.zeros / s.size, 4), round(s.accuracy.value, 4)] for s in stages],
    )


def _by_layer(stages: Sequence[Stage]) -> report.Table:
    rows: list[list[Any]] = []
    for stage in stages:
        for name, held in stage.histograms.items():
            share = round(held.zeros / held.n, 4)
            rows.append([stage.name, name, held.n, held.zeros, share, held.std, round(stage.accuracy.value, 4)])
    columns = ["stage", "layer", "weights", "zeros", "sparsity", "std of weights", "test accuracy of the stage"]
    return report.Table("Every layer at every stage", columns, rows)


def _tile(stage: Stage) -> report.Highlight:
    return report.Highlight(
        stage.name, f"{stage.accuracy.value:.1%}".replace("%", " %"), f"{stage.zeros:,} zeros"
    )
