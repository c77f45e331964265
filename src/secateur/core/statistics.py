"""What calibration data says about the inputs of each layer: running sums, gathered by name in one pass.

The parameter names of a score say which statistics it needs. Every statistic is a sum over real tokens
(padding left out) in float64, so it does not depend on how the data are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.forward import call
from secateur.core.matrix import Layout
from secateur.core.met import Met
from secateur.core.padding import Padding
from secateur.errors import NumericError, UsageError

__all__ = [
    "STATISTICS",
    "LayerLike",
    "Met",
    "Padding",
    "Placed",
    "Sums",
    "evaluating",
    "forward",
    "gather",
    "observe",
]


@runtime_checkable
class Placed(Protocol):
    """A module under a name: what telling padding needs to know."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def module(self) -> nn.Module: ...  # noqa: D102


@runtime_checkable
class LayerLike(Placed, Protocol):
    """What `gather` needs to know of a layer."""

    @property
    def layout(self) -> Layout: ...  # noqa: D102


PIECE = 256  # rows that are turned into float64 at a time: they stay in the cache
PANEL = 512  # columns of a second moment that are computed at a time


def _summed(rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of a function of the rows in float64, without a copy of all of them in float64."""
    total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    for piece in rows.split(PIECE):
        total += of(piece).sum(0, dtype=torch.float64)
    return total


def _squares(rows: Tensor) -> Tensor:
    return _summed(rows, torch.square)


def _magnitudes(rows: Tensor) -> Tensor:
    return _summed(rows, torch.abs)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(rows.shape[0], dtype=torch.float64, device=rows.device)


def _products(rows: Tensor) -> Tensor:
    """`X^T X` by panels of columns, each only from its diagonal on: half the work."""
    columns = rows.shape[1]
    if columns < 2 * PANEL:
        return rows.t() @ rows
    total = rows.new_empty(columns, columns)
    for start in range(0, columns, PANEL):
        panel = slice(start, start + PANEL)
        torch.mm(rows[:, panel].t(), rows[:, start:], out=total[panel, start:])
        total[start + PANEL :, panel] = total[panel, start + PANEL :].t()
    return total


def _zeros(rows: Tensor) -> Tensor:
    return (rows == 0).sum(0, dtype=torch.float64)


def _moments(rows: Tensor) -> Tensor:
    return torch.stack([_summed(rows, torch.Tensor.detach), _squares(rows)])


def _variance(total: Tensor, tokens: int) -> Tensor:
    return (total[1] / tokens - (total[0] / tokens).square()).clamp(min=0)


# inputs of a layer, and a function that gives the rows of each part
Receive = Callable[[Tensor, Callable[[], "list[Tensor]"]], None]

# name -> (what a batch of rows (token, in) adds to the sum, how the sum and the number of tokens become the value)
STATISTICS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    # l2 norm of each input column over all tokens: Wanda's ||X_j||_2
    "input_norm": (_squares, lambda total, tokens: total.sqrt()),
    # l1 norm of each input column over all tokens
    "input_norm_l1": (_magnitudes, lambda total, tokens: total),
    # mean |x_j|: how strongly the neuron that feeds this column is active
    "input_activation": (_magnitudes, lambda total, tokens: total / tokens),
    # mean x_j over all tokens
    "input_mean": (lambda rows: _summed(rows, torch.Tensor.detach), lambda total, tokens: total / tokens),
    # mean (x_j - mean x_j)^2: how much the neuron that feeds this column fluctuates
    "input_variance": (_moments, _variance),
    # fraction of tokens at which x_j is exactly zero
    "input_zeros": (_zeros, lambda total, tokens: total / tokens),
    # how many tokens were counted, one number a part
    "tokens": (_count, lambda total, tokens: total),
    # X^T X over all tokens, (in, in): what weight updates need
    "second_moment": (_products, lambda total, tokens: total),
}


# what rows add to the sums of each part: how many they are, and each statistic
Added = list[tuple[int, dict[str, Tensor]]]


def _finite(values: Tensor) -> bool:
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


class Sums:
    """The running sums of one layer, one row of sums a part."""

    def __init__(self, names: Sequence[str], layer: LayerLike):
        layout = layer.layout
        self.name, self.names, self.columns = layer.name, names, layout.shape[2]
        self.totals: dict[str, list[Tensor | None]] = {name: [None] * layout.shape[0] for name in names}
        self.tokens = [0] * layout.shape[0]

    def add(self, rows_of_parts: list[Tensor]) -> Added:
        """Count the rows `(token, in)` that meet each part; returns what they add, for layers that meet the same."""
        added = [
            (rows.shape[0], {name: STATISTICS[name][0](rows.float()) for name in self.names})
            for rows in rows_of_parts
        ]
        self.take(added)
        return added

    def take(self, added: Added) -> None:
        """Count what rows add."""
        for part, (tokens, values) in enumerate(added):
            self.tokens[part] += tokens
            for name, value in values.items():
                if not _finite(value):
                    raise NumericError(
                        f"{self.name}: NaN or Inf among its input activations; look at the data and at the layers "
                        "before it"
                    )
                before = self.totals[name][part]
                self.totals[name][part] = value if before is None else before + value

    def values(self) -> dict[str, Float[Tensor, "part ..."]]:
        """Each statistic, float32, stacked over parts; a part that met no token has sums of nothing."""
        return {name: self._values(name) for name in self.names}

    def _values(self, name: str) -> Tensor:
        found = [self._value(name, part) for part in range(len(self.tokens))]
        return found[0][None] if len(found) == 1 else torch.stack(found)  # a second moment is not copied

    def _value(self, name: str, part: int) -> Tensor:
        add, finish = STATISTICS[name]
        total = self.totals[name][part]
        if total is None:
            total = add(torch.zeros(0, self.columns))
        return finish(total, max(1, self.tokens[part])).float()


def gather(
    model: nn.Module, layers: Sequence[LayerLike], names: Sequence[str], data: Iterable[Any]
) -> dict[str, dict[str, Float[Tensor, "part ..."]]]:
    """Run `data` through the model once and return the named statistics of every layer's input.

    Args:
        layers: layers to watch.
        names: keys of `STATISTICS`.
        data: batches: a tensor of inputs, a mapping of keyword arguments (labels are left out), or a
            sequence whose first element is the input. `attention_mask` and `decoder_attention_mask`
            say which tokens are padding; padding is not counted.

    Returns:
        Layer name -> statistic name -> `(part, in)`, float32.

    Raises:
        UsageError: no data; a layer that the data never reach; padding that cannot be told apart.
        NumericError: NaN or Inf in a layer's input.

    Cost: one forward pass of the whole model; memory for one row of sums a layer. The model's mode,
        gradients and random state stay as they are.
    """
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    sums = {layer.name: Sums(names, layer) for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        padding = Padding(model, stack)
        for layer, receive in _adding(layers, sums):
            observe(layer, padding, receive, stack)
        batches = 0
        for batch in data:
            batches += 1
            padding.look_at(batch)
            forward(model, batch)
    if batches == 0:
        raise UsageError("data holds no batch; calibration needs at least one")
    for layer in layers:
        if not any(sums[layer.name].tokens):
            raise UsageError(
                f"{layer.name}: no calibration token reached this layer. Skip it with "
                f'skip="{layer.name}", or give data that use it'
            )
    return {name: total.values() for name, total in sums.items()}


def _adding(layers: Sequence[LayerLike], sums: Mapping[str, Sums]) -> Iterator[tuple[LayerLike, Receive]]:
    """For each layer a function that adds what it meets to its sums; one input is looked at once."""
    met = Met()

    def receive(layer: LayerLike, inputs: Tensor, rows: Callable[[], list[Tensor]]) -> None:
        if met.again(layer, inputs):
            sums[layer.name].take(met.found)
            return
        met.forget()
        met.remember(layer, inputs, sums[layer.name].add(rows()))

    for layer in layers:
        yield layer, partial(receive, layer)


def observe(layer: LayerLike, padding: Padding, receive: Receive, stack: ExitStack) -> None:
    """Call `receive(inputs, rows)` right before the layer computes, until the stack closes.

    `rows()` gives the `(token, in)` inputs of each part, padding left out.
    """
    rows = layer.layout.rows
    if rows is None:
        raise UsageError(
            f"{layer.name}: an embedding has no input activations; use a score without data or skip it"
        )

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        receive(inputs, lambda: _of_width(layer, inputs, rows(args, kwargs, padding.real(layer, inputs))))

    if type(layer.module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        stack.enter_context(_seen_as_function(layer, padding, receive))
        return
    handle = layer.module.register_forward_pre_hook(see, with_kwargs=True)
    stack.callback(handle.remove)


def _of_width(layer: LayerLike, inputs: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """The rows, if they are as wide as the layer; other ones would be counted before the layer itself refuses them."""
    width = layer.layout.shape[2]
    for part in rows:
        if part.shape[-1] != width:
            raise UsageError(
                f"{layer.name}: takes inputs of width {width}, and calibration data bring it {part.shape[-1]} (input "
                f"of shape {tuple(inputs.shape)}); give batches that the model takes"
            )
    return rows


@contextmanager
def _seen_as_function(layer: LayerLike, padding: Padding, receive: Receive) -> Iterator[None]:
    """Observe `out_proj` of `nn.MultiheadAttention`: never called, its weight is handed to `F.linear`.

    Its input there is `(time * batch, feature)`, time-major whatever `batch_first` says.
    """
    plain = F.linear

    def rows(inputs: Tensor) -> list[Tensor]:
        real = padding.real(layer, inputs)
        return [inputs if real is None else inputs[real.t().reshape(-1)]]

    def linear(inputs: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        if weight is layer.module.weight:
            receive(inputs, lambda: rows(inputs))
        return plain(inputs, weight, *rest, **named)

    F.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = plain


def forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on one batch: a tensor, a mapping of keywords, or `(inputs, ...)`; on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        return call(model, inputs)
    first = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(first, Tensor):
        raise UsageError(
            f"a batch is a tensor, a mapping of keyword arguments or (inputs, ...); got {type(batch).__name__}"
        )
    return call(model, first.to(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; every module's own mode and the random state are put back afterwards.

    The fused attention path of `nn.TransformerEncoderLayer` is switched off, because it hides the inputs of
    its layers.
    """
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    # some models draw random numbers in evaluation mode, too
    accelerators = {p.get_device() for p in model.parameters() if p.is_cuda}
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(accelerators):
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
