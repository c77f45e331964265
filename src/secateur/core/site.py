"""Where units compete: a layer whose weights a pattern cuts, or an axis that runs through several tensors.

A score speaks of one layer at a time; a site pools what it says into units, and spreads the units that stay back
over parameters. Everything between, allocating and choosing, sees units and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.where import Layer

__all__ = ["LayerSite", "Look", "Scored", "Site", "look_of", "looking_at", "mean"]

About = Literal["weights", "inputs", "scales"]
Score = TypeVar("Score", bound=Callable[..., Any])
Finish = Callable[[Tensor, int], Tensor]  # (sum over a unit's numbers, how many they are) -> the unit's score


def mean(total: Tensor, count: int) -> Tensor:
    """The mean, which makes units of different sizes comparable: what a unit is worth unless its score says else."""
    return total / count


@dataclass(frozen=True)
class Look:
    """What a score looks at, by its attributes `about` and `finish`; a plain function has neither.

    Attributes:
        about: "weights", one number for each; "inputs", rows of evidence about every input column, that is, about
            the unit that feeds it; "scales", one number for each weight of a batch norm.
        finish: how the numbers of a unit become its score.
        statistics: what the score needs to know of a layer.
    """

    about: About
    finish: Finish
    statistics: tuple[str, ...]

    @property
    def needs_inputs(self) -> bool:
        """Whether only layers with input activations can be asked."""
        return self.about == "inputs" or any(name.startswith("input_") for name in self.statistics)


def looking_at(about: About = "weights", finish: Finish = mean) -> Callable[[Score], Score]:
    """Mark a score: what it looks at, and how the numbers of a unit become its score.

    Example:
        >>> @looking_at("inputs")
        ... def loudness(weight, input_activation):
        ...     return input_activation[None]
        >>> look_of(loudness, ("input_activation",)).about
        'inputs'
    """

    def mark(score: Score) -> Score:
        score.about, score.finish = about, finish  # type: ignore[attr-defined]
        return score

    return mark


def look_of(score: Any, statistics: tuple[str, ...]) -> Look:
    """What a score looks at."""
    return Look(getattr(score, "about", "weights"), getattr(score, "finish", mean), statistics)


@dataclass(frozen=True)
class Scored:
    """What a score says of one layer.

    Attributes:
        values: `(part, out, in)`, or `(part, row, in)` where the score is about inputs.
        look: how to read them.
    """

    values: Float[Tensor, "part row in"]
    look: Look

    def of_weights(self, out: int) -> Float[Tensor, "part out in"]:
        """One number for each weight; evidence about an input is the same for all weights that read it."""
        if self.look.about == "weights" and self.look.finish is mean:
            return self.values
        single = self.look.finish(self.values, 1)
        if self.look.about == "weights":
            return single
        return single.mean(1, keepdim=True).expand(-1, out, -1)


class Site(Protocol):
    """What the pipeline needs to know of a place where units compete.

    Attributes:
        name: a parameter's name, or an axis's.
        shape: `(competition, unit)`.
        cells: weights that a unit holds.
        layers: the matrices that the score looks at.
        least: units that stay in every competition.
        step: counts are multiples of it, or all.
        alike: sites that say the same keep equally many units; "" says nothing.
        noun: what a plan calls one, and several.
        parameters: names of all parameters that its units have weights in.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def cells(self) -> int: ...  # noqa: D102
    @property
    def layers(self) -> tuple[Layer, ...]: ...  # noqa: D102
    @property
    def least(self) -> int: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def alike(self) -> str: ...  # noqa: D102
    @property
    def noun(self) -> tuple[str, str]: ...  # noqa: D102
    @property
    def parameters(self) -> tuple[str, ...]: ...  # noqa: D102

    def pool(self, scored: Callable[[Layer], Scored]) -> Float[Tensor, "competition unit"]: ...  # noqa: D102
    def spread(self, kept: Bool[Tensor, "competition unit"]) -> Mapping[str, Tensor]: ...  # noqa: D102
    def pruned(self, masks: Mapping[str, Tensor]) -> Bool[Tensor, "competition unit"] | None: ...  # noqa: D102


@dataclass(frozen=True)
class LayerSite:
    """One layer, cut in the shape of a pattern."""

    layer: Layer
    pattern: Any
    shape: tuple[int, int]
    least = 0
    step = 1
    alike = ""
    noun = ("layer", "layers")

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.layer.name

    @property
    def layers(self) -> tuple[Layer, ...]:
        """This one."""
        return (self.layer,)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The layer's own."""
        return (self.layer.name,)

    @property
    def cells(self) -> int:
        """Weights in a unit."""
        return self.layer.size // (self.shape[0] * self.shape[1])

    def weights(self) -> Float[Tensor, "competition unit"]:
        """The weights themselves where each is a unit."""
        part, out, columns = self.layer.layout.shape
        matrices = self.layer.layout.to_matrices(self.layer.values)
        return self.pattern.pool(matrices.reshape(part * out, columns))

    def pool(self, scored: Callable[[Layer], Scored]) -> Float[Tensor, "competition unit"]:
        """The pattern's own pooling of one number for each weight; parts lie one below the other."""
        part, out, columns = self.layer.layout.shape
        return self.pattern.pool(scored(self.layer).of_weights(out).reshape(part * out, columns))

    def spread(self, kept: Bool[Tensor, "competition unit"]) -> dict[str, Tensor]:
        """The mask of the layer's parameter."""
        part, out, columns = self.layer.layout.shape
        whole = self.pattern.spread(kept, (part * out, columns))
        return {self.name: self.layer.layout.from_matrices(whole.reshape(part, out, columns)).contiguous()}

    def pruned(self, masks: Mapping[str, Tensor]) -> Bool[Tensor, "competition unit"] | None:
        """Units that earlier masks prune as a whole; None where they say nothing of this layer."""
        if self.name not in masks:
            return None
        part, out, columns = self.layer.layout.shape
        gone = ~self.layer.layout.to_matrices(masks[self.name]).reshape(part * out, columns)
        return gone.reshape(self.shape) if self.cells == 1 else self.pattern.pool(gone.to(torch.float32)) == 1
