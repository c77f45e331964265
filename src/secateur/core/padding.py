"""Which tokens of a batch are real."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.core.statistics import Placed

if TYPE_CHECKING:
    pass

__all__ = ["Padding"]


class Padding:
    """Which tokens of the current batch are real, for inputs of any leading shape.

    In an encoder-decoder two masks exist. A layer inside the encoder reads the source; a layer of the
    decoder reads the target unless its input is the encoder's very output (keys and values of
    cross-attention).
    """

    def __init__(self, model: nn.Module, stack: ExitStack):
        self.source: Tensor | None = None
        self.target: Tensor | None = None
        self.encoder: set[int] = set()
        self.encoded = -1  # address of the encoder's output in this batch
        # nn.Transformer's default order is (time, batch, feature)
        self.time_first = any(
            isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules()
        )
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(
            model, "get_encoder"
        ):
            encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
            self.encoder = {id(module) for module in encoder.modules()}
            stack.callback(encoder.register_forward_hook(self._remember).remove)

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.encoded = (output if isinstance(output, Tensor) else output[0]).data_ptr()

    def look_at(self, batch: Any) -> None:
        """Take the masks out of a new batch; a mask without padding needs no care."""
        given = batch if isinstance(batch, Mapping) else {}
        hidden = given.get("src_key_padding_mask")  # nn.Transformer marks padding, not tokens
        self.source = _padded(~hidden.bool() if hidden is not None else given.get("attention_mask"))
        self.target = _padded(given.get("decoder_attention_mask")) if self.encoder else self.source

    def real(self, layer: Placed, inputs: Tensor) -> Tensor | None:
        """The boolean mask over the leading positions of `inputs`; None when all of them are real."""
        reads_source = id(layer.module) in self.encoder or inputs.data_ptr() == self.encoded
        mask = self.source if reads_source else self.target
        if mask is None:
            return None
        if isinstance(layer.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            inputs = inputs.movedim(1, -1)
        lead = inputs.shape[:-1]
        if self.time_first and lead == mask.shape[::-1]:
            return mask.t().to(inputs.device)
        if lead == mask.shape or (len(lead) == 1 and lead[0] == mask.numel()):
            return mask.to(inputs.device)
        if len(lead) == 1 and lead[0] == mask.shape[0]:  # one pooled vector a sequence
            return None
        raise UsageError(
            f"{layer.name}: its input has shape {tuple(inputs.shape)}, the attention mask {tuple(mask.shape)}; which "
            "positions are padding cannot be told. Give calibration batches without padding, or skip this layer"
        )


def _padded(mask: Tensor | None) -> Tensor | None:
    """The mask as booleans, or None where nothing is padding."""
    if mask is None or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    return mask.bool()
