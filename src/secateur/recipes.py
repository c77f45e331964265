"""Recipes: named points in the space of scores, patterns and allocators.

>>> from dataclasses import replace
>>> from secateur.pattern import NM
>>> print(replace(wanda, pattern=NM(2, 4)))
wanda on NM(n=2, m=4), per_row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur import score as scores
from secateur.allocate import Normalised, Percentile, Threshold, globally, per_layer, per_row
from secateur.errors import UsageError
from secateur.pattern import Channels, Heads, Layers, Neurons, Weights
from secateur.recover import ADMM, ALPS, LeastSquares, SparseGPT, TakeOver

__all__ = [
    "DEPTH_METHODS",
    "METHODS",
    "Recipe",
    "activation",
    "active",
    "admm",
    "alps",
    "angular_distance",
    "block_influence",
    "fisher",
    "flap",
    "gate",
    "global_magnitude",
    "inactive",
    "l2",
    "last_blocks",
    "loss_without",
    "magnitude",
    "movement",
    "percentile",
    "random",
    "random_blocks",
    "ria",
    "slimming",
    "snip",
    "sparsegpt",
    "taylor",
    "threshold",
    "wanda",
    "wanda_l1",
    "wanda_mended",
]


@dataclass(frozen=True)
class Recipe:
    """What a weight is worth, what shape is cut, and who pays how much.

    Attributes:
        score: `(weight "out in", <statistics by parameter name>) -> "out in"`, higher = keep.
        pattern: `pool(scores)` into units and `spread(kept, shape)` back.
        allocate: `(units by layer, weights to keep) -> units kept in each competition`.
        update: `(weight, choose, <statistics by parameter name>) -> (weight, mask)`, what the kept weights
            become; None leaves them as they are. For whole units `TakeOver`, which mends when all are chosen.
    """

    score: Callable[..., Any]
    pattern: Any = Weights()  # noqa: RUF009 - frozen, so it may be shared
    allocate: Callable[..., Any] = per_layer
    update: Any = None  # a callable, or TakeOver

    def __post_init__(self):
        if self.fixed_by_pattern and self.allocate not in (per_row, per_layer):
            raise UsageError(
                f"{self.pattern} fixes the sparsity of every group; {_name(self.allocate)} has nothing to decide. "
                "Leave allocate at per_row"
            )

    @property
    def fixed_by_pattern(self) -> bool:
        """Whether the pattern itself says how many units are kept (N:M)."""
        return hasattr(self.pattern, "allocate")

    @property
    def allocation(self) -> Callable[..., Any]:
        """The allocator in force: the pattern's own where it has one."""
        return self.pattern.allocate if self.fixed_by_pattern else self.allocate

    def describe(self) -> dict[str, str]:
        """Names of the parts, for a checkpoint's metadata."""
        return {
            "score": _name(self.score),
            "pattern": repr(self.pattern),
            "allocate": _name(self.allocate),
            "update": "none" if self.update is None else _name(self.update),
        }

    def __str__(self) -> str:
        parts = self.describe()
        shares = "per_row" if self.fixed_by_pattern else parts["allocate"]
        mended = "" if self.update is None else f", updated by {parts['update']}"
        return f"{parts['score']} on {parts['pattern']}, {shares}{mended}"


def _name(part: Any) -> str:
    return getattr(part, "__name__", None) or repr(part)


magnitude = Recipe(scores.magnitude)
global_magnitude = Recipe(scores.magnitude, allocate=globally)
wanda = Recipe(scores.wanda, allocate=per_row)
wanda_l1 = Recipe(scores.wanda_l1, allocate=per_row)
ria = Recipe(scores.RIA())
activation = Recipe(scores.activation)
wanda_mended = Recipe(scores.wanda, allocate=per_row, update=LeastSquares())
sparsegpt = Recipe(scores.wanda, update=SparseGPT())
admm = Recipe(scores.wanda, update=ADMM())
alps = Recipe(scores.wanda, update=ALPS())
random = Recipe(scores.random)
taylor = Recipe(scores.taylor)
fisher = Recipe(scores.fisher)
# Lee, Ajanthan, Torr 2019, equation 5, before training; dividing by the sum of all scores does not change their order
snip = Recipe(scores.taylor, allocate=globally)
movement = Recipe(scores.movement)

# for whole units, see secateur.pattern
l2 = Recipe(scores.l2, pattern=Heads() | Neurons())
gate = Recipe(scores.gate, pattern=Heads() | Neurons())
# An et al. 2024: heads and neurons compared by standard scores over all layers, means folded into biases
flap = Recipe(scores.flap, Heads() | Neurons(), Normalised("standard"), TakeOver("bias"))
active = Recipe(scores.active, pattern=Neurons())
slimming = Recipe(scores.slimming, pattern=Channels(), allocate=globally)

# whole blocks, for `depth.choose_blocks`
block_influence = Recipe(scores.block_influence, pattern=Layers())
angular_distance = Recipe(scores.angular_distance, pattern=Layers(together=True))
loss_without = Recipe(scores.loss_without, pattern=Layers(again=True))
last_blocks = Recipe(scores.last_blocks, pattern=Layers())
random_blocks = Recipe(scores.random_blocks, pattern=Layers())


def threshold(tau: float, *, relative: bool = False) -> Recipe:
    """Cut every weight of magnitude at most tau; with `relative`, tau counts in standard deviations of the layer."""
    return Recipe(scores.magnitude, allocate=Threshold(tau, relative))


def inactive(tau: float, pattern: Any = Neurons()) -> Recipe:  # noqa: B008 - frozen, so it may be shared
    """Take out every unit whose mean absolute activation over the data is at most tau; one stays on every axis.

    Args:
        tau: at least 0, in the units of the activations themselves.
        pattern: which units; `Neurons()`, `Channels()`, or several.

    Example:
        >>> print(inactive(0.05))
        activation on Neurons(), Threshold(tau=0.05, relative=False)
    """
    return Recipe(scores.activation, pattern, Threshold(tau))


def percentile(q: float) -> Recipe:
    """Cut the q percent of weights that are smallest in magnitude, in every layer."""
    return Recipe(scores.magnitude, allocate=Percentile(q))


# What a method is called on the command line and in recipe files; a name never becomes code by any other way.
METHODS: dict[str, Recipe] = {
    "magnitude": magnitude,
    "global-magnitude": global_magnitude,
    "wanda": wanda,
    "wanda-l1": wanda_l1,
    "ria": ria,
    "activation": activation,
    "random": random,
    "taylor": taylor,
    "fisher": fisher,
    "snip": snip,
    "wanda-mended": wanda_mended,
    "sparsegpt": sparsegpt,
    "admm": admm,
    "alps": alps,
    "l2": l2,
    "gate": gate,
    "flap": flap,
    "active": active,
    "slimming": slimming,
}

# the same for whole blocks
DEPTH_METHODS: dict[str, Recipe] = {
    "block-influence": block_influence,
    "angular-distance": angular_distance,
    "loss": loss_without,
    "last": last_blocks,
    "random": random_blocks,
}
