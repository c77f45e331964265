"""torch's multi-head attention with fewer heads or narrower ones than its embedding asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NarrowAttention", "narrow_attention_"]


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together need not be as wide as its embedding.

    The original computes the heads' width from the embedding's, so that neither heads nor their dimensions can
    go alone. Parameters and their names are the same.

    Attributes:
        scale: What scores are multiplied by; that of the heads before shrinking.
    """

    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        single = query.dim() == 2
        inputs = [
            x.unsqueeze(0) if single else x if self.batch_first else x.transpose(0, 1)
            for x in (query, key, value)
        ]
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in self._projected(inputs)
        )
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropped) if dropped else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropped, scale=self.scale)
        out = F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        out = out[0] if single else out if self.batch_first else out.transpose(0, 1)
        return out, weights[0] if single and weights is not None else weights

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        packed = self.in_proj_weight
        matrices = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True))
        for extra in ("bias_k", "bias_v"):
            if getattr(self, extra) is not None:
                more = getattr(self, extra).expand(k.shape[0], 1, -1)
                k, v = (torch.cat([k, more], 1), v) if extra == "bias_k" else (k, torch.cat([v, more], 1))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1) for x in (k, v))
        return [q, k, v]

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if is_causal")
        more = int(self.bias_k is not None) + int(self.add_zero_attn)
        out = None
        if attn_mask is not None:
            out = F.pad(_added(attn_mask, q.dtype), (0, more))
            out = out.view(-1, self.num_heads, *out.shape[-2:]) if out.dim() == 3 else out
        if padding is not None:
            padding = padding.unsqueeze(0) if padding.dim() == 1 else padding
            rows = F.pad(_added(padding, q.dtype), (0, more))[:, None, None, :]
            out = rows if out is None else out + rows
        return out if out is None else out.expand(q.shape[0], self.num_heads, q.shape[2], k.shape[2])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def narrow_attention_(module: nn.MultiheadAttention, width: int) -> None:
    """Turn a sliced attention into one that needs no agreement with its embedding; nothing where it agrees.

    Args:
        module: Its tensors sliced, `num_heads` and `head_dim` set.
        width: Of a head before shrinking.
    """
    packed = module.in_proj_weight
    rows = module.q_proj_weight.shape[0] if packed is None else packed.shape[0] // 3
    inner, outer = module.out_proj.weight.shape[1], module.out_proj.weight.shape[0]
    module.embed_dim = outer
    module.out_proj.in_features, module.out_proj.out_features = inner, outer
    module.kdim = outer if packed is not None else module.k_proj_weight.shape[1]
    module.vdim = outer if packed is not None else module.v_proj_weight.shape[1]
    if rows == inner == outer and module.head_dim == width:
        return
    if rows == inner == module.num_heads * module.head_dim:
        module.__class__ = NarrowAttention
        module.scale = width**-0.5
        module._qkv_same_embed_dim = False  # keeps the fused encoder kernel, which re-cuts heads, away
