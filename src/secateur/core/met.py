"""What was found of the newest input, for the layers that read the same one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from secateur.core.statistics import LayerLike

__all__ = ["Met"]


class Met:
    """The newest input, which is not kept alive, and what was found of it: q, k and v read the very same tensor."""

    def __init__(self) -> None:
        self._inputs: weakref.ref[Tensor] | None = None
        self._version = 0
        self.found: Any = None

    def again(self, layer: LayerLike, inputs: Tensor) -> bool:
        """Whether this layer reads the very tensor of before, unchanged."""
        same = self._inputs is not None and self._inputs() is inputs and self._version == _version(inputs)
        return same and _shareable(layer)

    def remember(self, layer: LayerLike, inputs: Tensor, found: Any) -> None:
        """Keep what was found of an input."""
        self._inputs = weakref.ref(inputs) if _shareable(layer) else None
        self._version, self.found = _version(inputs), found

    def forget(self) -> None:
        """Let go of what was found."""
        self._inputs, self.found = None, None


def _version(inputs: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if inputs.is_inference() else inputs._version


def _shareable(layer: LayerLike) -> bool:
    """A convolution's statistics depend on its kernel, those of experts on the router."""
    return layer.layout.shape[0] == 1 and not isinstance(layer.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
