"""Which weights: `only=` and `skip=` become layers, or an error that says what was meant.

Roles are found in `secateur.core.roles`, shared memory in `secateur.core.tied`; here it is decided what is
chosen, what is left out, and why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from secateur.core.matrix import Layout
from secateur.core.roles import Place, Role, Survey, survey
from secateur.core.sharded import whole
from secateur.core.stacks import Stack, prefixes
from secateur.core.terms import ROLES, Only, Term, shown, terms
from secateur.core.tied import contains, same_tensor, tied_names
from secateur.core.where_errors import no_match, nothing_chosen, spelled, tied_error
from secateur.errors import UsageError

__all__ = ["ROLES", "Layer", "Only", "Selection", "layers", "select", "unprunable"]


@dataclass(frozen=True)
class Layer:
    """One matrix parameter of a model. Two are equal when they say the same of the same name.

    Attributes:
        name: full parameter name, the key of masks everywhere.
        path: path of the module that owns it.
        module: that module.
        layout: how it is seen as matrices.
        role: what it is for, found by structure.
        stack: "encoder" or "decoder"; None outside the repeated blocks. A model with one stack has an
            "encoder", whatever it calls it.
        block: running number of its block within the stack; None outside.
        tied: other parameter names that share its memory.
    """

    name: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    layout: Layout = field(repr=False, compare=False)
    role: Role
    stack: Stack | None = None
    block: int | None = None
    tied: tuple[str, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.module, self.layout.name)

    @property
    def values(self) -> Tensor:
        """The weight without its history, whole where processes share it out."""
        return whole(self.weight.detach())

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.layout.shape)


@dataclass(frozen=True)
class Selection:
    """The layers to prune, and every other layer with the reason why not; all in registration order.

    Attributes:
        chosen: what is pruned.
        left_out: other layers, each with the reason.
        unprunable: names of matrices that are no parameters of floating-point numbers (weight norm, masks of
            `torch.nn.utils.prune`, integers), each with the reason; those that `only` or `skip` leaves out by name,
            class or predicate are not among them.
    """

    chosen: tuple[Layer, ...]
    left_out: tuple[tuple[Layer, str], ...]
    unprunable: tuple[tuple[str, str], ...] = ()


class _Tensor(NamedTuple):
    """A layer and every place where its memory is found, its own first."""

    layer: Layer
    places: tuple[Place, ...]


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """Every matrix parameter of `model`, embeddings included, in registration order.

    A parameter that appears under several names appears once, under its first matrix-layer name.

    Raises:
        UsageError: `model` is no `nn.Module`, or has parameters whose shape is not known yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(layer.name, layer.role, layer.size) for layer in layers(model)]
        [('0.weight', 'other', 32), ('2.weight', 'head', 16)]
    """
    return tuple(tensor.layer for tensor in _tensors(model, survey(model).places))


def select(model: nn.Module, only: Only = None, skip: Only = None) -> Selection:
    """Choose the layers to prune.

    Args:
        model: any `nn.Module`.
        only: what to prune; a string, a module class (of the layer or of a module around it), a predicate
            `(path, module) -> bool`, or a list of these, of which any may match. A string is a role (`all`,
            `attention`, `ffn`, `encoder`, `decoder`, `head`, `embedding`) or a glob tried on the module path
            and on the full parameter name, or several of these with commas between. Default: every layer but
            embeddings, routers of mixtures of experts and output heads of language models, which published
            results leave dense. `all` adds those output heads; embeddings come in by role, glob, class or
            predicate, routers by glob or predicate. `encoder` is all repeated blocks where there is one stack.
            A role is taken as a module path where the model has nothing of that role.
        skip: what to leave out of that, in the same words.

    Returns:
        The chosen layers, and all others with the reason.

    Raises:
        UsageError: a word that matches nothing, a tensor that is shared with a layer not named, nothing left.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [layer.name for layer in select(model, skip="head").chosen]
        ['0.weight']
    """
    found = survey(model)
    tensors = _tensors(model, found.places)
    others = _others(model, found)
    wanted, unwanted = _words(model, found, tensors, others, only, skip)
    verdicts = []
    for tensor in tensors:
        if any(term.match(place) for term in unwanted or () for place in tensor.places):
            why: str | None = f"skipped by {shown('skip', skip)}"
        elif wanted is None:
            why = _reason_by_default(tensor)
        else:
            why = _reason(tensor, wanted, f"not selected by {shown('only', only)}")
        verdicts.append((tensor.layer, why or ""))
    verdicts = _without_parts(verdicts)
    chosen = tuple(layer for layer, why in verdicts if not why)
    left_out = tuple((layer, why) for layer, why in verdicts if why)
    if not chosen:
        raise UsageError(nothing_chosen(model, found, [(layer.name, why) for layer, why in left_out]))
    meant = tuple(
        pair for pair, place in zip(found.unprunable, others, strict=True) if _asked(place, wanted, unwanted)
    )
    return Selection(chosen, left_out, meant)


def unprunable(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Names of matrices that are no parameters of floating-point numbers, each with the reason."""
    return survey(model).unprunable


def _others(model: nn.Module, found: Survey) -> list[Place]:
    """Where the matrices are that cannot be pruned; what each is for is not known."""
    modules = dict(model.named_modules())
    places = (_bare(model, name) for name, _ in found.unprunable)
    return [
        replace(
            place, enclosing=tuple(modules[prefix] for prefix in prefixes(place.path) if prefix != place.path)
        )
        for place in places
    ]


def _asked(place: Place, wanted: Iterable[Term] | None, unwanted: Iterable[Term] | None) -> bool:
    """Whether somebody may expect a matrix that cannot be pruned to be pruned; a role may be its own."""
    if any(term.match(place) for term in unwanted or ()):
        return False
    return wanted is None or any(term.kind == "role" or term.match(place) for term in wanted)


def _words(
    model: nn.Module, found: Survey, tensors: list[_Tensor], others: list[Place], only: Only, skip: Only
) -> list[tuple[Term, ...] | None]:
    """`only` and `skip` read as terms.

    Raises:
        UsageError: one of them means no layer of this model.
    """
    places = [place for tensor in tensors for place in tensor.places]
    known = {word for place in (*places, *others) for word in (place.path, place.name)}
    usual = sum(_reason_by_default(tensor) is None for tensor in tensors)
    read: list[tuple[Term, ...] | None] = []
    for argument, given in (("only", only), ("skip", skip)):
        words = terms(argument, given, known)
        read.append(None if words is None else tuple(_meant(term, places) for term in words))
        for term in read[-1] or ():
            there = places if argument == "only" else [*places, *others]
            if term.value != "all" and not any(term.match(place) for place in there):
                raise UsageError(no_match(model, found, places, term, usual))
    return read


def _tensors(model: nn.Module, places: tuple[Place, ...]) -> list[_Tensor]:
    """One for each distinct tensor that is a matrix of some layer."""
    tied = tied_names(model)
    by_name = {place.name: place for place in places}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: list[_Tensor] = []
    seen: set[str] = set()
    for place in places:
        if place.name in seen or place.layout is None:
            continue
        others = tied.get(place.name, ())
        mine = parameters[place.name]
        seen |= {place.name, *(other for other in others if same_tensor(mine, parameters[other]))}
        shared = tuple(by_name.get(other) or _bare(model, other) for other in others)
        layer = Layer(
            name=place.name,
            path=place.path,
            module=place.module,
            layout=place.layout,
            role=place.role,
            stack=place.stack,
            block=place.block.number if place.block else None,
            tied=others,
        )
        found.append(_Tensor(layer, (place, *shared)))
    return found


def _bare(model: nn.Module, name: str) -> Place:
    """A parameter that is no matrix of a layer but shares memory with one."""
    path = name.rpartition(".")[0]
    return Place(name, path, model.get_submodule(path), None, "other", None, False, ())


def _meant(term: Term, places: list[Place]) -> Term:
    """A role that the model has nothing of may be the path of a module."""
    if term.kind == "role" and not any(term.match(place) for place in places):
        path = replace(term, kind="glob")
        if any(path.match(place) for place in places):
            return path
    return term


def _reason(tensor: _Tensor, wanted: Iterable[Term], not_wanted: str) -> str | None:
    """Why a layer is not pruned when `only` is given; None when it is.

    Raises:
        UsageError: it is named, and shares its memory with one that is not.
    """
    matches = [{term.match(place) for term in wanted} for place in tensor.places]
    named = [place for place, match in zip(tensor.places, matches, strict=True) if "named" in match]
    modules = {id(place.module) for place in named}
    if named:
        forgotten = [place for place in tensor.places if id(place.module) not in modules]
        if forgotten:
            raise UsageError(tied_error(named, _one_each(forgotten)))
        return None
    if any("implied" in match for match in matches):
        return _reason_tied(tensor)
    return _reason_by_role(tensor) or not_wanted


def _reason_by_default(tensor: _Tensor) -> str | None:
    if reason := _reason_tied(tensor) or _reason_by_role(tensor):
        return reason
    if tensor.places[0].vocabulary:
        return 'output head of a language model, left dense in published results; include it with only="all"'
    return None


def _reason_by_role(tensor: _Tensor) -> str | None:
    place = tensor.places[0]
    kinds = {"embedding": "embedding", "router": "router of a mixture of experts"}
    if place.role not in kinds:
        return None
    return f"{kinds[place.role]}, left dense unless named; include it with {spelled('only', 'all', place)}"


def _reason_tied(tensor: _Tensor) -> str | None:
    """Why a layer that nobody named is left out: it shares its memory with another module's."""
    place = tensor.places[0]
    others = _one_each([other for other in tensor.places if other.module is not place.module])
    return tied_error([place], others, implied=True) if others else None


def _one_each(places: list[Place]) -> list[Place]:
    """The first place of every module."""
    return list({id(place.module): place for place in reversed(places)}.values())[::-1]


def _without_parts(verdicts: list[tuple[Layer, str]]) -> list[tuple[Layer, str]]:
    """Of chosen layers whose memory overlaps keep the one that holds the others: one mask for each weight.

    Raises:
        UsageError: they overlap and neither holds the other.
    """
    chosen = {layer.name: layer for layer, why in verdicts if not why}
    parts: dict[str, str] = {}
    for name, layer in chosen.items():
        for other in (chosen[other] for other in layer.tied if other in chosen):
            if name in parts or other.name in parts:
                continue
            if contains(layer.weight, other.weight):
                parts[other.name] = f"part of {name}, which is pruned as a whole"
            elif contains(other.weight, layer.weight):
                parts[name] = f"part of {other.name}, which is pruned as a whole"
            else:
                raise UsageError(
                    f"{name} and {other.name} overlap in memory and neither holds the other, so no mask can "
                    f"be exact for both. Give one of them memory of its own (parameter.data = "
                    f"parameter.data.clone()), or leave both out"
                )
    return [(layer, why or parts.get(layer.name, "")) for layer, why in verdicts]
