"""Units: which slices of which tensors live and die together, found in the model's own computation.

`analyse` exports the model on one example, follows every dimension through every operator and returns the
axes that can be pruned, at the granularity the computation itself asks for: heads also inside fused
projections, rotary pairs, key/value groups, feed-forward units, channels, the residual width. Nothing is
declared per architecture. Axes that cannot be pruned come with the operator that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.core.axes.atoms import Atom
from secateur.core.axes.found import Frozen, Member, Units, collect
from secateur.core.axes.layout import extent, positions
from secateur.core.axes.macs import macs
from secateur.core.axes.program import masked_module, narrow_module
from secateur.core.axes.step import Trace
from secateur.core.axes.trace import export, label_graph, tied
from secateur.core.axes.zeros import check_zeros
from secateur.core.masks import Masks
from secateur.errors import UsageError, nearest

__all__ = ["Analysis", "Frozen", "Member", "Units", "analyse", "masked_program", "pruned_program"]

Keep = Mapping[str, Iterable[int] | Tensor]  # axis name -> indices of the units that stay


@dataclass(frozen=True, eq=False)
class Analysis:
    """What `analyse` found.

    Attributes:
        units: The prunable axes.
        frozen: The others that parameters carry, by reason.
        unruled: Operators without a rule -> the module where each was met first.
        unused: Parameters the example never touches.
        program: The exported graph, callable like the model.
        trace: Labels and records of the graph's nodes.
    """

    units: tuple[Units, ...]
    frozen: tuple[Frozen, ...]
    unruled: Mapping[str, str]
    unused: tuple[str, ...]
    program: fx.GraphModule = field(repr=False)
    trace: Trace = field(repr=False)
    _tensors: Mapping[fx.Node, tuple[str, ...]] = field(repr=False)

    def __str__(self) -> str:
        """Every axis in words, and why the frozen ones are frozen."""
        lines = []
        for units in self.units:
            notes = [] if units.exact else [f"approximate: {units.reason}"]
            notes += [f"made in the forward by {text}" for text in units.constants]
            tensors = ", ".join(f"{member.name}[{member.dim}]" for member in units.members[:4])
            more = f" and {len(units.members) - 4} more" if len(units.members) > 4 else ""
            lines.append("; ".join([f"{units.size} {units.name}: {tensors}{more}", *notes]))
        for frozen in self.frozen:
            tensors = ", ".join(f"{name}[{dim}]" for name, dim in frozen.members[:4])
            more = f" and {len(frozen.members) - 4} more" if len(frozen.members) > 4 else ""
            lines.append(f"frozen, {frozen.reason}: {tensors}{more}")
        lines += [f"unused by the example: {name}" for name in self.unused]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Units:
        """The axis of that name."""
        for units in self.units:
            if units.name == name:
                return units
        known = [units.name for units in self.units]
        raise UsageError(f"{name!r} is none of the {len(known)} prunable axes; {nearest(name, known)}.")

    def kept_indices(self, keep: Keep) -> dict[str, tuple[Tensor | None, ...]]:
        """For every tensor that loses something: the kept indices of each dimension, None where all stay."""
        leaves = _leaves(self, keep)
        out: dict[str, tuple[Tensor | None, ...]] = {}
        for node, names in self._tensors.items():
            index = tuple(positions(self.trace.axes, label, leaves) for label in self.trace.dims[node])
            if any(i is not None for i in index):
                out.update(dict.fromkeys(names, index))
        return out

    def masks(self, keep: Keep) -> Masks:
        """Masks of every parameter that carries these axes, the removed units zero; tied tensors by their first name.

        `unit_masks.keep_of` is the inverse.

        Args:
            keep: Axis name -> units that stay; axes left out stay whole and give no mask.

        Raises:
            UsageError: an unknown axis, an index out of range or given twice, or nothing left.

        Cost:
            One boolean for each number of these parameters.
        """
        index = self.kept_indices(keep)
        carried = dict.fromkeys(m.name for name in keep for m in self[name].members if m.is_parameter)
        shapes = self.shapes()
        return Masks({name: outer(shapes[name], index.get(name, ())) for name in carried})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in use, under all of its names."""
        return {name: tuple(node.meta["val"].shape) for node, names in self._tensors.items() for name in names}

    def tensor_nodes(self) -> Mapping[fx.Node, tuple[str, ...]]:
        """The graph's nodes that hold a parameter or buffer, and all names of each."""
        return self._tensors

    def leaves(self, keep: Keep) -> dict[Atom, Tensor]:
        """Kept units by axis atom, ascending, for the axes that lose some.

        Raises:
            UsageError: an unknown axis, an index out of range or given twice, or nothing left.
        """
        return _leaves(self, keep)

    def first_names(self) -> dict[str, str]:
        """Name -> first name of the same tensor, for every tensor in use."""
        return {name: names[0] for names in self._tensors.values() for name in names}

    def unit_size(self, name: str) -> int:
        """Parameters in one unit of an axis; where it crosses another axis a parameter counts on both."""
        shapes = self.shapes()
        total = 0
        for member in self[name].members:
            if member.is_parameter:
                shape = shapes[member.name]
                total += member.indices.shape[1] * prod(shape) // shape[member.dim]
        return total

    def parameter_count(self, keep: Keep | None = None) -> int:
        """Number of parameters in use that are left when only these units are kept; tied ones count once.

        Cost: index arithmetic, no tensor is touched; every axis left out of `keep` stays whole.
        """
        leaves = _leaves(self, keep or {})
        total = 0
        for node in self._tensors:
            if isinstance(node.meta["val"], nn.Parameter):
                total += prod(extent(self.trace.axes, label, leaves) for label in self.trace.dims[node])
        return total

    def byte_count(self, keep: Keep | None = None) -> int:
        """Bytes of the parameters and buffers in use that are left, as they are stored now; tied ones count once."""
        leaves = _leaves(self, keep or {})
        return sum(
            node.meta["val"].element_size()
            * prod(extent(self.trace.axes, label, leaves) for label in self.trace.dims[node])
            for node in self._tensors
        )

    def macs(self, keep: Keep | None = None) -> int:
        """Multiply-accumulates of one forward pass of the example when only these units are kept; see `axes.macs`."""
        return macs(self.trace, self.program.graph, _leaves(self, keep or {}))


def analyse(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: str | Callable[[Any], Any] | None = None,
    fixed: Iterable[str] = (),
    decouple: bool = False,
    dynamic: bool = False,
) -> Analysis:
    """The prunable axes of a model, from one example of its inputs.

    Args:
        model: Any module torch.export can trace; on the meta device it costs no memory.
        args: Positional inputs, as for `model(*args, **kwargs)`. Batch and sequence lengths different from the
            model's widths are not needed, but widths of 1 hide broadcasts: use a batch of at least 2.
        kwargs: Keyword inputs.
        output: Which part of the output has to stay: a key such as "logits", or a function of the output. By
            default all of it, so a model that also returns hidden states cannot lose hidden width.
        fixed: Names of parameters and buffers that must keep their shapes.
        decouple: Read tables that several modules share (rotary angles, a relative bias) through a gather, so
            that every layer may keep its own heads and rotary pairs. The tables stay whole, and a module
            needs the gather too; `Units.gathers` tells where and how much is read.
        dynamic: Trace so that the programs run on other batch sizes and lengths than the example's (slower).

    Returns:
        Units, frozen axes, and the exported graph.

    Raises:
        UsageError: the model cannot be exported, or `output` picks nothing.

    Cost:
        The export (seconds), and milliseconds for each of the graph's nodes; no tensor is computed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(units.name, units.size) for units in analyse(mlp, (torch.zeros(4, 3),)).units]
        [('feed-forward units of 0,2', 8)]
    """
    module = export(model, tuple(args), kwargs or {}, output=output, dynamic=dynamic)
    trace, holders = label_graph(module, model, fixed=fixed, decouple=decouple)
    parameters = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
    check_zeros(trace, {node for name, node in _holding(module, trace) if name in parameters})
    ties = tied(model)
    units, frozen = collect(trace, holders, ties, parameters, module)
    unused = tuple(
        name for name in dict.fromkeys(ties[n][0] for n in parameters if n in ties) if name not in holders
    )
    tensors = {node: ties[name] for name, node in holders.items()}
    return Analysis(units, frozen, trace.unruled, unused, module, trace, tensors)


def outer(shape: tuple[int, ...], index: Sequence[Tensor | None]) -> Tensor:
    """True where every dimension's position is kept."""
    mask = torch.ones(shape, dtype=torch.bool)
    for dim, kept in enumerate(index):
        if kept is not None:
            gone = torch.ones(shape[dim], dtype=torch.bool)
            gone[kept] = False
            mask.index_fill_(dim, gone.nonzero().flatten(), False)
    return mask


def _holding(module: fx.GraphModule, trace: Trace) -> list[tuple[str, fx.Node]]:
    return [(str(n.target), n) for n in module.graph.nodes if n.op == "get_attr" and n in trace.dims]


def _leaves(analysis: Analysis, keep: Keep) -> dict[Atom, Tensor]:
    out: dict[Atom, Tensor] = {}
    for name, kept in keep.items():
        units = analysis[name]
        index = torch.as_tensor(
            list(kept) if not isinstance(kept, Tensor) else kept, dtype=torch.long
        ).flatten()
        index = index.cpu().sort().values
        if index.numel() == 0:
            raise UsageError(f"{name}: no unit is left of {units.size}; keep at least one.")
        if index[0] < 0 or index[-1] >= units.size:
            raise UsageError(
                f"{name}: kept units run from {index[0]} to {index[-1]}, expected 0 to {units.size - 1}."
            )
        if (index[1:] == index[:-1]).any():
            raise UsageError(f"{name}: a unit is kept twice; give every index once.")
        if index.numel() < units.size:
            out[units.leaf] = index
    return out


def pruned_program(analysis: Analysis, keep: Keep) -> fx.GraphModule:
    """The model's computation with only the kept units: smaller tensors, the same operators.

    Args:
        analysis: From `analyse`.
        keep: Axis name -> units that stay; axes left out stay whole.

    Returns:
        A module called like the model, in eval mode, with the model's own parameter names. Batch size and
        length are the example's unless the analysis is dynamic.

    Raises:
        UsageError: an unknown axis, an index out of range or given twice, or nothing left.

    Cost:
        Memory for the narrower tensors; the others are shared with the model.
    """
    return narrow_module(analysis.program, analysis.trace, _leaves(analysis, keep))


def masked_program(analysis: Analysis, keep: Keep, *, lazy: bool = False) -> fx.GraphModule:
    """The whole model with zeros in the parameters of removed units, and norms over the survivors.

    What `pruned_program` has to equal. On axes that are exact it is the eager model with zeroed parameters.

    Args:
        analysis: From `analyse`.
        keep: As for `pruned_program`.
        lazy: Hold the model's own tensors and lay the masks on them while it runs: little memory.

    Returns:
        A module called like the model, in eval mode.

    Raises:
        UsageError: as for `pruned_program`.
    """
    return masked_module(analysis.program, analysis.trace, _leaves(analysis, keep), lazy=lazy)
