"""Layers that compute with a packed weight: linear, convolution and embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core import native
from secateur.deploy.sparse.gpu import rows_of
from secateur.deploy.sparse.ops import DENSE, Ready, bucket, by_torch, sparse_linear
from secateur.deploy.sparse.packed import Packed

__all__ = ["SparseConv2d", "SparseEmbedding", "SparseLayer", "SparseLinear"]

_PARTS = ("values", "mask", "negative", "counts", "index", "scale", "codebook")
_OTHERS = ("offsets", "mask", "counts", "index", "scale", "codebook")  # than the values, that a product reads


class SparseLayer(nn.Module):
    """A layer without a dense weight; what is packed are its buffers. For inference.

    Attributes:
        packed: the weight as a matrix `(rows, columns)`.
        dtype: the type the weight had.
        dense: the weight as it was, where batches at which packed ways are slower use it; not stored.
    """

    bias: nn.Parameter | None
    ways: tuple[int, ...] | None
    values: Tensor
    scale: Tensor
    offsets: Tensor
    dense: Tensor | None

    def __init__(
        self, packed: Packed, dtype: torch.dtype, ways: Sequence[int] | None = None, dense: Tensor | None = None
    ):
        super().__init__()
        self._shape = (packed.form, packed.kind, packed.block, packed.rows, packed.columns)
        self.dtype = dtype
        self.ways = None if ways is None else tuple(ways)
        held = {name: getattr(packed, name) for name in _PARTS}
        held |= {"offsets": packed.offsets, "dense": None if dense is None else dense.detach()}
        for name in sorted(
            held, key=lambda name: held[name] is None
        ):  # torch.export counts wrongly behind one that is None
            self.register_buffer(name, held[name], persistent=name in _PARTS)

    @property
    def packed(self) -> Packed:
        """The weight, packed."""
        found = Packed(*self._shape, **{name: self._buffers[name] for name in _PARTS})  # type: ignore[arg-type]
        found.__dict__["offsets"] = self._buffers["offsets"]
        return found

    @property
    def weight(self) -> Tensor:
        """The weight as the layer had it, made anew at every call: for code that looks at it."""
        return self.packed.dense().to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLayer:
        """A model's `to(dtype)` and `half()` leave the stream as it is."""
        bits = {name: getattr(self, name) for name in (*_PARTS, "offsets")}
        for name in bits:
            setattr(self, name, None)
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0))
        for name, tensor in bits.items():
            setattr(self, name, tensor if tensor is None else tensor.to(probe.device))
        self.__dict__.pop("_ready", None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and stored modules look their pointers up again."""
        return {name: value for name, value in self.__dict__.items() if name != "_ready"}

    def multiply(self, x: Tensor) -> Tensor:
        """`x w^T + bias`: the operator where something traces, else what it does without the way through torch."""
        if (
            type(x) is not Tensor
            or not x.is_cpu
            or torch.compiler.is_compiling()
            or x.is_neg()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or native.library() is None
        ):
            return sparse_linear(self.packed, x, self.bias, ways=self.ways)
        held: Ready | None = self.__dict__.get("_ready")
        bias, others = self._parameters.get("bias"), tuple(map(self._buffers.get, _OTHERS))
        same = held is not None and held.ways is self.ways and held.serves(self.values, bias, others)
        if held is None or not same:
            held = self.__dict__["_ready"] = Ready(self.packed, bias, self.ways)
        y = held(x)
        return by_torch(self.packed, x, bias) if y is None else y

    def prefers_dense(self, batch: int) -> bool:
        """Whether so many tokens are multiplied with the dense weight."""
        return self.dense is not None and self.ways is not None and self.ways[bucket(batch)] == DENSE

    def extra_repr(self) -> str:
        """For printing."""
        form, kind, block, rows, columns = self._shape
        return f"{columns} -> {rows}, {kind} {form}" + (
            f", blocks of {block}" if form == "bitmask" and block > 1 else ""
        )


class SparseLinear(SparseLayer):
    """`nn.Linear`, or transformers' `Conv1D`, with a packed weight."""

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        dtype: torch.dtype,
        ways: Sequence[int] | None = None,
        dense: Tensor | None = None,
    ):
        super().__init__(packed, dtype, ways, dense)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.nf, self.nx = packed.rows, packed.columns
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's product."""
        asked = self.ways is not None and DENSE in self.ways  # before what costs more to look up
        if asked and self.dense is not None and self.prefers_dense(x.numel() // self.in_features):
            return F.linear(x, self.dense, self.bias)
        return self.multiply(x)


class SparseConv2d(SparseLayer):
    """A convolution of one group as a product with patches of the input."""

    def __init__(
        self,
        packed: Packed,
        like: nn.Conv2d,
        ways: Sequence[int] | None = None,
        dense: Tensor | None = None,
    ):
        super().__init__(packed, like.weight.dtype, ways, dense)
        self.kernel_size, self.stride, self.dilation = like.kernel_size, like.stride, like.dilation
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.padding, self.padding_mode, self.groups = like.padding, like.padding_mode, 1
        self._around, self.stored = list(like._reversed_padding_repeated_twice), tuple(like.weight.shape)
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight as the layer had it."""
        return super().weight.view(self.stored)

    def forward(self, x: Tensor) -> Tensor:
        """Patches, product, and channels in front again."""
        single = x.dim() == 3
        x = F.pad(x[None] if single else x, self._around)
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        height, width = (
            (size - span - 1) // step + 1
            for size, span, step in zip(x.shape[2:], spans, self.stride, strict=True)
        )
        if self.dense is not None and self.prefers_dense(len(x) * height * width):
            y = F.conv2d(x, self.dense, self.bias, self.stride, 0, self.dilation)
            return y[0] if single else y
        if self.kernel_size == (1, 1):
            patches = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            patches = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)
        y = self.multiply(patches.transpose(1, 2))
        y = y.transpose(1, 2).reshape(x.shape[0], self.out_channels, height, width)
        return y[0] if single else y


class SparseEmbedding(SparseLayer):
    """An embedding of integers: 8 bits with nothing left out, or 4 bits whose rows are found by their offsets."""

    def __init__(self, packed: Packed, like: nn.Embedding):
        super().__init__(packed, like.weight.dtype)
        self.num_embeddings, self.embedding_dim = packed.rows, packed.columns
        self.padding_idx = like.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of the ids."""
        return rows_of(self.packed, ids.flatten()).to(self.dtype).view(*ids.shape, self.embedding_dim)
