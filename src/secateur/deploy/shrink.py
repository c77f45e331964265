"""`shrink`: a smaller model of the same classes that computes what the masked one does, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.core.axes.atoms import Atom
from secateur.core.axes.blocks import analyse_blocks
from secateur.core.example import Example, analysis_of, example_of, main_output, prepared
from secateur.core.masks import Masks
from secateur.core.units import Analysis, Units, pruned_program
from secateur.deploy.attributes import Survey, survey
from secateur.deploy.compare import Output, Progress, fingerprints, progress
from secateur.deploy.cuts import cut, follow_torch_
from secateur.deploy.fitting import NotExactError, fit
from secateur.deploy.parts import Parts, complete
from secateur.deploy.reference import Reference
from secateur.deploy.shrunk import Axis, Shrunk, after, shrunk
from secateur.deploy.slices import Index, copied, refuse_unfit, sliced_copy
from secateur.deploy.slots import ATTRIBUTE, Slot, numbers_of, read, write_
from secateur.deploy.twin import configuration
from secateur.deploy.width import Width
from secateur.deploy.widths import Widths
from secateur.errors import UsageError, nearest

__all__ = ["TOLERANCE", "shrink"]

TOLERANCE = 1e-5  # relative, in float32
TRIES = 40  # choices of ambiguous integers that are tried
FALLBACKS = ("pad", "refuse", "program")


def shrink(
    model: nn.Module,
    masks: Masks | Mapping[str, Any],
    example: Any,
    *,
    output: Output = main_output,
    analysis: Analysis | None = None,
    fallback: str = "pad",
    homogeneous: bool = False,
) -> nn.Module:
    """A smaller model of the same classes that computes what the masked model does.

    Parameters and buffers are sliced; every integer that holds a width follows, in modules and, where layers
    differ, in their own copies of the configuration. Which integer feeds which view is found by running the
    model once with integers that remember their origin. The result is accepted only if it equals the masked
    model, with norms over the surviving units, within 1e-5 relative on fresh inputs and, where the model takes
    them, on other batch sizes and lengths.

    Args:
        model: Untouched. Modes, `requires_grad`, dtypes, devices and ties of the result are the model's.
        masks: Whole units, such as `analysis.masks(keep)`; or axis name -> units that stay, which needs no memory.
        example: Inputs: a tensor, a tuple of positional inputs, a mapping of keywords, or a batch with labels.
        output: The part of the output that has to stay, such as "logits"; by default `main_output` of it.
        analysis: What `analyse` found for this model and example; by default it is made here.
        fallback: What to do where modules cannot follow an axis. "pad": hold more units there, zeroed, until they
            can; "refuse": raise and name the axis; "program": return the pruned exported program.
        homogeneous: Hold equally many units on all axes of one kind and size, as many as the widest keeps, the surplus
            zeroed: what a config can say, and less small. To prune to equal widths is a setting of the pattern.

    Returns:
        The smaller model; `shrunk(model)` tells its axes, exact and approximate, and how it was checked.

    Raises:
        UsageError: masks that are not whole units; a model that cannot be analysed, copied or followed, by name.

    Cost:
        An export unless `analysis` is given, a copy of what is kept, a few forwards of the example; another
        export where a norm runs over a pruned axis.
    """
    if fallback not in FALLBACKS:
        raise UsageError(f"fallback={fallback!r}: {nearest(fallback, FALLBACKS)}.")
    refuse_unfit(model)
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        return _low_precision(model, masks, example, output, fallback, homogeneous)
    parts, given = _analysed(model, example, output, analysis)
    asked = parts.kept(masks) if isinstance(masks, Masks) else parts.named(masks)
    try:
        return _Job(model, parts, asked, given, output, fallback == "pad", homogeneous).run()
    except _CannotFollowError as error:
        if parts.whole is None:
            raise UsageError(
                f"{error} The model cannot be exported as a whole, so no program can stand in."
            ) from None
        if fallback == "program":
            return pruned_program(parts.whole, parts.by_name("", asked))
        raise UsageError(
            f'{error} The pruned exported program computes it: shrink(..., fallback="program").'
            + (' Or hold more units, zeroed: fallback="pad".' if fallback == "refuse" else "")
        ) from None


def _low_precision(
    model: nn.Module,
    masks: Masks | Mapping[str, Any],
    example: Any,
    output: Output,
    fallback: str,
    homogeneous: bool,
) -> nn.Module:
    """Shrink a float32 copy, where a difference is no rounding, and make the same cuts in the model."""
    given = example_of(model, example).map(lambda _, x: x.float() if x.is_floating_point() else x)
    twin = copied(model, {}).float()
    found = shrink(twin, masks, given, output=output, fallback=fallback, homogeneous=homogeneous)
    if not isinstance(vars(found).get(ATTRIBUTE), Shrunk):
        raise UsageError(
            f"{type(model).__name__}: no program of a half-precision model can be checked; shrink its float32 copy."
        )
    note = shrunk(found)
    return cut(model, replace(note, config=configuration(model)))


class _CannotFollowError(Exception):
    """No choice of the modules' integers makes them compute the pruned model; the message names the axis."""


def _analysed(
    model: nn.Module, example: Any, output: Output, analysis: Analysis | None
) -> tuple[Parts, Example]:
    if analysis is not None:
        return Parts({"": analysis}), prepared(model, example)
    try:
        found, given = analysis_of(model, example, output=output)
        return Parts({"": found}), given
    except UsageError as error:
        given = example_of(model, example)
        try:
            parts = Parts(analyse_blocks(model, given.args, given.kwargs).analyses)
        except UsageError:
            raise error from None
        if not parts.axes():
            raise
        return parts, given


@dataclass
class _Job:
    """One shrinking: what is asked, and what was found out so far."""

    model: nn.Module
    parts: Parts
    asked: dict[Atom, Tensor]
    example: Example
    output: Output
    may_pad: bool
    homogeneous: bool = False
    why: dict[Atom, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {units.leaf: name for name, units in self.parts.axes()}
        self.units: dict[Atom, Units] = {units.leaf: units for _, units in self.parts.axes()}

    def run(self) -> nn.Module:
        """Slice, choose integers, check; hold more units where modules cannot follow."""
        self.observed: Survey = survey(self.model, self.example, Widths(self.parts.analyses))
        reference = Reference.of(self.model, self.parts, self.asked, self.example, self.output)
        held = self._levelled() if self.homogeneous else dict(self.asked)
        while True:
            held, domains = self._fitted(held)
            small = self._sliced(held)
            found = self._chosen(small, held, domains, reference)
            if found is not None:
                return self._noted(small, held, reference, found)
            held = self._widened(held)

    def _levelled(self) -> dict[Atom, Tensor]:
        """Of exact axes of one kind and size all as wide as the widest."""
        like: dict[tuple[str, int], list[Atom]] = {}
        for leaf, units in self.units.items():
            if units.exact:
                like.setdefault((units.kind, units.size), []).append(leaf)
        held = dict(self.asked)
        for leaves in like.values():
            widest = max(len(self.asked.get(leaf, range(leaf.size))) for leaf in leaves)
            for leaf in leaves:
                if leaf in held and len(held[leaf]) < widest:
                    self.why[leaf] = "equal widths were asked for"
                    held[leaf] = complete(leaf.size, held[leaf], widest)
                    if widest == leaf.size:
                        del held[leaf]
        return held

    def _fitted(self, held: dict[Atom, Tensor]) -> tuple[dict[Atom, Tensor], dict[Slot, list[int]]]:
        try:
            held, domains, why = fit(self.observed, held, self.units, may_pad=self.may_pad)
        except NotExactError as error:
            name = self.names[error.units.leaf]
            reason = f" ({error.units.reason})" if not error.units.exact else ""
            raise _CannotFollowError(f"{name}: the modules cannot follow this axis{reason}: {error}.") from None
        self.why |= why
        return held, domains

    def _sliced(self, held: dict[Atom, Tensor]) -> nn.Module:
        return sliced_copy(self.model, self.parts.index(held), self._zeros(held))

    def _zeros(self, held: dict[Atom, Tensor]) -> Index:
        """Positions that are not zeroed, of tensors that hold more units than asked for."""
        surplus = {leaf for leaf in self.asked if leaf not in held or len(held[leaf]) > len(self.asked[leaf])}
        return self.parts.index({leaf: self.asked[leaf] for leaf in surplus})

    def _chosen(
        self, small: nn.Module, held: dict[Atom, Tensor], domains: dict[Slot, list[int]], reference: Reference
    ) -> dict[Slot, int] | None:
        """The integers with which the small model is the masked one, None where there are none; they are set."""
        numbers = {slot: values[0] for slot, values in domains.items()} | self.observed.idle(held)
        self.last: Progress | None = None
        if self._equal(small, numbers, reference):
            return numbers
        known = self._known(small, held)
        best = self.last = progress(small, self.example, known)
        clusters = self.observed.clusters(domains)
        for _ in range(2):  # a second round with what the first chose
            for slots in sorted(clusters.values(), key=lambda slots: not _under(slots, best.module)):
                for at in range(1, min(TRIES, max(len(domains[slot]) for slot in slots))):
                    tried = numbers | {s: domains[s][min(at, len(domains[s]) - 1)] for s in slots}
                    if self._equal(small, tried, reference):
                        return tried
                    here = progress(small, self.example, known)
                    if here.steps > best.steps:
                        best, numbers = here, tried
            self.last = best
        return None

    def _equal(self, small: nn.Module, numbers: Mapping[Slot, int], reference: Reference) -> bool:
        scaled = self.observed.scales
        old = self.observed.old
        write_(small, {s: Width(n, old[s]) if s in scaled and n != old[s] else n for s, n in numbers.items()})
        follow_torch_(small, self.model)
        try:
            self.difference = reference.difference(small, self.output, until=TOLERANCE)
        except Exception:  # a forward with wrong sizes may raise anything
            return False
        return self.difference <= TOLERANCE

    def _known(self, small: nn.Module, held: dict[Atom, Tensor]) -> dict[Any, Any]:
        if self.parts.whole is None:
            return {}
        program = pruned_program(self.parts.whole, self.parts.by_name("", held))
        _adopt_(program, small)
        return fingerprints(program, self.example)

    def _widened(self, held: dict[Atom, Tensor]) -> dict[Atom, Tensor]:
        """Without the axes that the failing module cannot follow: they stay whole, their units zeroed."""
        where = self.last.module if self.last else ""
        words = self.last.words if self.last else ""
        suspects = [leaf for leaf in held if self._touches(leaf, where)] or list(held)
        failing = [leaf for leaf in suspects if not self._follows(leaf, held)] or suspects
        names = ", ".join(self.names[leaf] for leaf in failing)
        told = f"{where or type(self.model).__name__} {words or 'computes something else'}"
        stuck = [leaf for leaf in failing if not self.units[leaf].exact]
        if stuck or not self.may_pad or not failing:
            names = names or "the whole model, with nothing cut"
            raise _CannotFollowError(f"{names}: the modules cannot follow this axis: {told}.")
        for leaf in failing:
            self.why[leaf] = told
        return {leaf: index for leaf, index in held.items() if leaf not in failing}

    def _touches(self, leaf: Atom, where: str) -> bool:
        own = self.observed.widths.own.get(where, {})
        labels = [label for sized in own.values() for label in sized.values()]
        axes = next(iter(self.parts.analyses.values())).trace.axes
        return any(leaf in axes.leaves(label) for label in labels)

    def _follows(self, leaf: Atom, held: dict[Atom, Tensor]) -> bool:
        """Whether the modules can follow this axis alone."""
        if len(held) == 1:
            return False
        alone = _Job(self.model, self.parts, {leaf: held[leaf]}, self.example, self.output, False)
        alone.observed = self.observed
        try:
            kept, domains = alone._fitted({leaf: held[leaf]})
        except _CannotFollowError:
            return False
        reference = Reference.of(self.model, self.parts, kept, self.example, self.output)
        return alone._chosen(alone._sliced(kept), kept, domains, reference) is not None

    def _noted(
        self, small: nn.Module, held: dict[Atom, Tensor], reference: Reference, numbers: dict[Slot, int]
    ) -> nn.Module:
        axes = []
        for leaf, kept in self.asked.items():
            units, width = self.units[leaf], len(held.get(leaf, range(leaf.size)))
            why = units.reason if not units.exact else self.why.get(leaf, "") if width > len(kept) else ""
            axes.append(Axis(self.names[leaf], units.kind, leaf.size, len(kept), width, units.exact, why))
        changed = {
            slot: (old, new)
            for slot, old in numbers_of(self.model).items()
            if (new := _read(small, slot)) is not None and new != old
        }
        checked = tuple(words for words, _, _ in reference.cases)
        count = (_count(self.model), _count(small))
        index = self.parts.index(held)
        note = Shrunk(
            tuple(axes),
            index,
            self._zeros(held),
            changed,
            self.difference,
            checked,
            count,
            type(self.model).__name__,
            configuration(self.model),
            _few(self.example),
        )
        before = vars(self.model).get(ATTRIBUTE)
        vars(small)[ATTRIBUTE] = after(before, note) if isinstance(before, Shrunk) else note
        return small


def _under(slots: list[Slot], path: str) -> bool:
    return any(path == slot.module or path.startswith(f"{slot.module}.") for slot in slots)


def _few(example: Example) -> Example:
    """At most two rows of the example, to run the model again where it was saved."""
    rows = example.rows
    return example.map(lambda _, x: x[:2].cpu() if x.dim() and x.shape[0] == rows else x.cpu())


def _read(model: nn.Module, slot: Slot) -> Any:
    try:
        return read(model, slot)
    except (KeyError, IndexError, AttributeError):
        return None


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _adopt_(program: fx.GraphModule, small: nn.Module) -> None:
    """Let a program compute with a model's tensors, where both have one of a name."""
    held = {
        **dict(small.named_parameters(remove_duplicate=False)),
        **dict(small.named_buffers(remove_duplicate=False)),
    }
    for path, module in program.named_modules():
        for table in (module._parameters, module._buffers):
            for name in table:
                full = f"{path}.{name}" if path else name
                if full in held and table[name] is not None and table[name].shape == held[full].shape:
                    table[name] = held[full]
