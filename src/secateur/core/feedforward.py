"""The feed-forward of each block: its parameters, and the order of its neurons.

The neurons of a feed-forward can be permuted without any change to what it computes: rows of the matrices that
open it, their biases, and columns of the matrix that closes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.stacks import Block, below
from secateur.core.where import Layer, layers
from secateur.core.widths import Matrix, parts_of
from secateur.errors import UsageError

__all__ = ["FeedForward", "feed_forwards"]


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of one block.

    Attributes:
        block: the block it stands in.
        layers: its matrices; experts and their router where it is a mixture.
    """

    block: Block
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its matrices and their biases, by their names inside the block."""
        found: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            path = below(self.block.path, layer.path)
            for name, parameter in layer.module.named_parameters(recurse=False):
                found[f"{path}.{name}" if path else name] = parameter
        return found

    @property
    def closing(self) -> Layer:
        """The matrix that reads the neurons.

        Raises:
            UsageError: experts, or matrices whose widths do not tell.
        """
        plain = [layer for layer in self.layers if layer.layout.shape[0] == 1 and layer.role == "ffn"]
        groups = parts_of([Matrix(each.name, *each.layout.shape[1:]) for each in plain])
        width = next((group.width for group in groups if group.part == "ffn"), None)
        if width is None or len(plain) != len(self.layers):
            raise UsageError(
                f"{self.block.path}: the neurons of its feed-forward cannot be put in order (only plain and gated "
                "feed-forwards, no experts); leave align out"
            )
        return [layer for layer in plain if layer.layout.shape[1] == width][-1]

    @property
    def opening(self) -> tuple[Layer, ...]:
        """The matrices that compute the neurons: one, or gate and up, or both in one."""
        closing = self.closing
        return tuple(layer for layer in self.layers if layer is not closing)

    def features(self) -> Float[Tensor, "neuron feature"]:
        """All weights of each neuron, in and out, as one row."""
        closing = self.closing
        neurons = closing.layout.shape[2]
        rows = [closing.layout.to_matrices(closing.weight.detach())[0].t()]
        for layer in self.opening:
            matrix = layer.layout.to_matrices(layer.weight.detach())[0]
            rows += list(matrix.reshape(-1, neurons, matrix.shape[1]))
            bias = getattr(layer.module, "bias", None)
            if bias is not None:
                rows += list(bias.detach().reshape(-1, neurons, 1))
        return torch.cat([part.float() for part in rows], dim=1)

    def ordered(self, order: Int[Tensor, " neuron"]) -> dict[str, Tensor]:
        """The parameters with neuron `order[i]` at place `i`; what it computes stays the same."""
        closing, found = self.closing, {name: p.detach() for name, p in self.parameters.items()}
        for layer in self.layers:
            path = below(self.block.path, layer.path)
            prefix = f"{path}." if path else ""
            matrices = layer.layout.to_matrices(layer.weight.detach())
            if layer is closing:
                found[prefix + layer.layout.name] = layer.layout.from_matrices(matrices[..., order])
                continue
            halves = matrices.reshape(-1, len(order), matrices.shape[2])[:, order]  # gate and up may be one
            found[prefix + layer.layout.name] = layer.layout.from_matrices(halves.reshape(matrices.shape))
            bias = getattr(layer.module, "bias", None)
            if bias is not None:
                found[prefix + "bias"] = bias.detach().reshape(-1, len(order))[:, order].reshape(-1)
        return found


def feed_forwards(model: nn.Module, blocks: Sequence[Block]) -> list[FeedForward]:
    """The feed-forward of each of these blocks.

    Raises:
        UsageError: a block that has none.
    """
    known = [layer for layer in layers(model) if layer.role in ("ffn", "router")]
    found = []
    for block in blocks:
        inside = tuple(layer for layer in known if below(block.path, layer.path) is not None)
        if not any(layer.role == "ffn" for layer in inside):
            raise UsageError(f"{block.path} has no feed-forward that could be merged; drop blocks instead")
        found.append(FeedForward(block, inside))
    return found
