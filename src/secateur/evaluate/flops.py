"""How much arithmetic one forward pass needs, counted from the operations that really ran."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from secateur.core.forward import call, device_of, input_of, move, undisturbed
from secateur.errors import UsageError
from secateur.measurement import Condition, Measurement

__all__ = ["flops"]

aten = torch.ops.aten


def flops(model: nn.Module, example: Any, *, effective: bool = False) -> dict[str, Measurement]:
    """Multiply-accumulates (MACs) and floating-point operations of one forward pass, by torch's counter.

    Matrix products, convolutions and attention are counted, over the full square even where attention is
    causal; element-wise work, norms and look-ups are not. One MAC is two FLOPs. What torch's counter
    misses by itself is covered: attention by the CPU's fused kernel, recurrent layers in oneDNN, the fused
    fast path of `nn.TransformerEncoderLayer`, the grouped products of stacked experts, and matrix-vector
    products. An operation that looks like a matrix product but has no formula is named in the conditions
    under `uncounted`.

    Args:
        model: any model; on the meta device nothing is computed and no weights are needed.
        example: one input: a tensor, a tuple of arguments, or a mapping of named arguments.
        effective: also count MACs without those whose weight is zero. That is theory: no kernel skips single
            zeros for free.

    Returns:
        `macs` and `flops`, and with `effective` `effective_macs`. In the last, weights that the model copies,
        casts or gathers before use count as dense.

    Raises:
        UsageError: nothing countable ran, or `effective` on the meta device.

    Cost: one forward pass; `effective` also reads every weight once per use.

    Example:
        >>> count = flops(nn.Linear(3, 2), torch.ones(5, 3))
        >>> print(count["macs"])
        macs 30 (batch 5, input 5 x 3)
        >>> count["flops"].value
        60
    """
    device = device_of(model)
    if effective and device.type == "meta":
        raise UsageError("effective MACs need the weights' values; a model on the meta device has none")
    watch = _Watch(model if effective else None)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # The watch is entered first, so that it sees the operations the counter ends up running.
    with undisturbed(model), _decomposed(model), watch, counter:
        call(model, move(example, device))
    total = counter.get_total_flops()
    if not total:
        raise UsageError("the model ran no matrix product, convolution or attention on this example")
    conditions: dict[str, Condition] = input_of(example)
    if watch.uncounted:
        conditions["uncounted"] = " ".join(sorted(watch.uncounted))
    found = {
        "macs": Measurement("macs", total // 2, "1", conditions),
        "flops": Measurement("flops", total, "1", conditions),
    }
    if effective:
        note = {"note": "theoretical: every zero weight skipped"}
        value = (total - watch.skipped) // 2
        found["effective_macs"] = Measurement("effective_macs", value, "1", {**conditions, **note})
    return found


@contextmanager
def _decomposed(model: nn.Module) -> Iterator[None]:
    """Fused layers run as the products they are made of, which have formulas."""
    fast = torch.backends.mha.get_fastpath_enabled()
    fused_rnn = torch.backends.mkldnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:
            torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if recurrent:
            torch._C._set_mkldnn_enabled(bool(fused_rnn))


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _grouped(rows: Any, stack: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """Rows (tokens, in) times a stack (group, in, out): each row meets one group."""
    *groups, tokens, inputs = rows
    size = 2 * tokens * inputs * stack[-1]
    return size * groups[0] if groups and len(stack) == 3 else size


def _matrix_vector(matrix: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _added_matrix_vector(start: Any, matrix: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(left: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * left[0]


_FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._grouped_mm: _grouped,
    aten.mv: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.dot: _dot,
}
"""What torch's own registry lacks; each takes shapes and gives FLOPs."""

_WEIGHTS: dict[Any, tuple[int, ...]] = {
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten.convolution: (1,),
    aten._grouped_mm: (1,),
    aten.mv: (0,),
    aten.addmv: (1,),
}
"""At which argument a weight may sit."""

_HEAVY = re.compile(
    r"(^|_)(b?mm|(b?add)b?mm|mv|matmul|linear|trilinear|attention|rnn|lstm|gru|cdist"
    r"|conv(olution)?(\dd)?|transformer)(_|$)"
)
"""Names of operations that multiply matrices."""


class _Watch(TorchDispatchMode):
    """Sees every operation: names those without a formula, and adds up the FLOPs that meet a zero weight."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        parameters = [] if model is None else list(model.parameters())
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.known = FlopCounterMode(display=False, custom_mapping=_FORMULAS).flop_registry
        self.skipped = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        formula = self.known.get(packet)
        if formula is None:
            name = str(packet or func)
            if _HEAVY.search(name.rpartition(".")[2]):
                self.uncounted.add(name)
        elif self.storages and packet in _WEIGHTS:
            weights = [args[at] for at in _WEIGHTS[packet] if self._is_weight(args[at])]
            if weights:
                cost = formula(*args, **(kwargs or {}), out_val=out)
                self.skipped += max(_saved(packet, cost, weight, args, kwargs or {}) for weight in weights)
        return out

    def _is_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.storages


def _saved(packet: Any, cost: int, weight: Tensor, args: Any, kwargs: dict[str, Any]) -> int:
    """FLOPs of one operation whose factor from `weight` is zero."""
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None) if packet is aten._grouped_mm else None
    if offsets is None or weight.dim() != 3:
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        return cost * zeros // weight.numel()
    # Experts see different numbers of tokens: rows up to each offset belong to one expert.
    tokens = torch.diff(offsets.long(), prepend=offsets.new_zeros(1).long())
    zeros_each = (weight == 0).flatten(1).sum(dim=1)
    return 2 * int((tokens * zeros_each).sum())
