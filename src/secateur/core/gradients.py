"""What the gradient of the loss says about each layer's weights, gathered by name as other statistics are.

With `core.statistics` this is everything that a score may ask for by its parameter names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.loss import Loss, loss_of
from secateur.core.statistics import STATISTICS, LayerLike, evaluating, gather
from secateur.errors import NumericError, UsageError

__all__ = ["GRADIENTS", "KNOWN", "gather_all", "gather_gradients"]

# name -> whether it looks at every row of a batch for itself, which costs a backward pass a row
GRADIENTS: Mapping[str, bool] = {
    # gradient of the mean loss over all predictions, (out, in)
    "grad": False,
    # mean over calibration rows of the squared gradient of the row's loss, (out, in): the empirical Fisher information
    "grad_squared": True,
    # for every calibration row the derivative of its loss by a gate on each input column, (row, in): sum_i w_ij g_ij
    "input_gate": True,
}

KNOWN = (*STATISTICS, *GRADIENTS)


def gather_all(
    model: nn.Module,
    layers: Sequence[LayerLike],
    names: Sequence[str],
    data: Iterable[Any],
    loss: Loss | None = None,
) -> dict[str, dict[str, Float[Tensor, "part ..."]]]:
    """The named statistics of activations and of gradients: `gather` and `gather_gradients` in one.

    Args:
        names: of `KNOWN`.
        model, layers, data, loss: as in these two.
    """
    forward = [name for name in names if name in STATISTICS]
    backward = [name for name in names if name in GRADIENTS]
    if not backward:
        return gather(model, layers, forward, data)
    batches = data if isinstance(data, Mapping) else list(data)
    found = gather_gradients(model, layers, backward, batches, loss)
    if forward:
        for name, values in gather(model, layers, forward, batches).items():
            found[name] |= values
    return found


def gather_gradients(
    model: nn.Module,
    layers: Sequence[LayerLike],
    names: Sequence[str],
    data: Iterable[Any],
    loss: Loss | None = None,
) -> dict[str, dict[str, Float[Tensor, "part ..."]]]:
    """Run `data` forwards and backwards once and return the named statistics of every layer's weights.

    Args:
        model: as it is in evaluation mode, without dropout.
        layers: layers to watch.
        names: keys of `GRADIENTS`.
        data: batches; see `core.loss.loss_of`.
        loss: `loss(output, target)`; None takes what the batches imply.

    Returns:
        Layer name -> statistic name -> `(part, ...)`, float32.

    Raises:
        UsageError: no data; a batch without a loss; rows that cannot be told apart; a layer that the loss does not
            depend on.
        NumericError: NaN or Inf in the loss or in a gradient, naming the layer.

    Cost: a forward and a backward pass of a batch, or of every row of it for `grad_squared` and `input_gate`; memory
        for one gradient of all watched layers, and for the sums. `.grad`, the model's mode, what it learns and the
        random state stay as they are.
    """
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    by_row = any(GRADIENTS[name] for name in names)
    sums: dict[str, dict[str, Any]] = {layer.name: {} for layer in layers}
    weight_of = {layer.name: getattr(layer.module, layer.layout.name) for layer in layers}
    predictions = rows = 0
    reached: set[str] = set()
    with evaluating(model), _differentiable(model, list(weight_of.values())), torch.enable_grad():
        for batch in data:
            for piece in _rows_of(batch) if by_row else [batch]:
                value, count = loss_of(model, piece, loss)
                gradients = torch.autograd.grad(value, list(weight_of.values()), allow_unused=True)
                predictions, rows = predictions + count, rows + 1
                for layer, gradient in zip(layers, gradients, strict=True):
                    if gradient is not None:
                        reached.add(layer.name)
                    _add(sums[layer.name], names, layer, gradient, count)
    if rows == 0:
        raise UsageError("data holds no batch; calibration needs at least one")
    if predictions == 0:
        raise UsageError(
            "the calibration data hold nothing to predict, such as two tokens in a row; give longer rows"
        )
    for layer in layers:
        if layer.name not in reached:
            raise UsageError(
                f"{layer.name}: the loss of the calibration data does not depend on this layer. Skip it with "
                f'skip="{layer.name}", or give data that use it'
            )
    return {
        layer: {name: _value(name, known[name], predictions, rows) for name in names}
        for layer, known in sums.items()
    }


@contextmanager
def _differentiable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for these weights alone, whatever is frozen; every parameter's own flag is put back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _add(
    sums: dict[str, Any], names: Sequence[str], layer: LayerLike, gradient: Tensor | None, count: int
) -> None:
    """Count the gradient of one batch or row."""
    weight = getattr(layer.module, layer.layout.name)
    gradient = torch.zeros_like(weight) if gradient is None else gradient
    matrices = layer.layout.to_matrices(gradient).float()
    if not all(bool(end.isfinite()) for end in matrices.aminmax()):
        raise NumericError(f"{layer.name}: NaN or Inf among its gradients; look at the data and at the loss")
    for name in names:
        if name == "grad":
            added = matrices * count
            sums[name] = sums[name].add_(added) if name in sums else added
        elif name == "grad_squared":
            added = matrices.square()
            sums[name] = sums[name].add_(added) if name in sums else added
        else:
            gates = (layer.layout.to_matrices(weight.detach()).float() * matrices).sum(1)
            sums.setdefault(name, []).append(gates)


def _value(name: str, total: Any, predictions: int, rows: int) -> Float[Tensor, "part ..."]:
    if name == "input_gate":
        return torch.stack(total, dim=1)
    return total / max(1, predictions if name == "grad" else rows)


def _rows_of(batch: Any) -> Iterator[Any]:
    """A batch of one row for every row of the batch."""
    sizes = {value.shape[0] for value in _tensors(batch) if value.dim()}
    count = max(sizes, default=0)
    if count == 0 or sizes - {count, 1}:
        raise UsageError(
            f"the rows of a calibration batch cannot be told apart, its tensors have leading sizes {sorted(sizes)}; "
            "give batches of one row"
        )
    for row in range(count):
        yield _cut(batch, row, count)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _cut(batch: Any, row: int, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[row : row + 1] if batch.dim() and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, row, count) for key, value in batch.items()}
    return [_cut(value, row, count) for value in batch] if isinstance(batch, tuple | list) else batch
