"""Where every matrix of a model stands and what it is for, found from structure.

The repeated blocks are found in `secateur.core.stacks` and read in `secateur.core.blocks`; a matrix outside of
them is an embedding, part of the head, or other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter

from secateur.core.blocks import Entry, block_roles
from secateur.core.matrix import Layout, layouts
from secateur.core.stacks import Block, Stack, below, called, join, kind, prefixes, stacks
from secateur.errors import UsageError

__all__ = ["Place", "Role", "Survey", "survey"]

Role = Literal["attention", "ffn", "head", "embedding", "router", "other"]


@dataclass(frozen=True, eq=False)
class Place:
    """One name under which a matrix is found in a model.

    Attributes:
        name: full parameter name.
        path: path of the module that owns it.
        module: that module.
        layout: how it is seen as matrices; None for a bare parameter that shares memory with a layer.
        role: what it is for.
        block: the repeated block it stands in; None outside.
        vocabulary: whether it is an output head with one row for each word.
        enclosing: the modules around its own, outermost first.
    """

    name: str
    path: str
    module: nn.Module
    layout: Layout | None
    role: Role
    block: Block | None
    vocabulary: bool
    enclosing: tuple[nn.Module, ...]

    @property
    def stack(self) -> Stack | None:
        """The stack it stands in; None outside the repeated blocks."""
        return self.block.stack if self.block else None

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor that has this name."""
        return getattr(self.module, self.name.rpartition(".")[2])


@dataclass(frozen=True)
class Survey:
    """What is found in a model.

    Attributes:
        places: every name of every matrix, in registration order.
        unprunable: matrices that are no floating-point parameters, each with the reason.
        encoder_decoder: whether there are two stacks.
    """

    places: tuple[Place, ...]
    unprunable: tuple[tuple[str, str], ...]
    encoder_decoder: bool


@dataclass(frozen=True)
class _Matrices:
    """The matrices of a model and the block each stands in, for those that do."""

    model: nn.Module
    entries: list[Entry]
    block: dict[str, Block]

    def outside(self) -> list[Entry]:
        """Those in no block, embeddings left out."""
        return [entry for entry in self.entries if entry.name not in self.block and not _looks_up(entry)]


def survey(model: object) -> Survey:
    """Find every matrix of `model` and tell what it is for.

    A module that is registered several times has a place under each of its names.

    Raises:
        UsageError: `model` is no `nn.Module`, or has parameters whose shape is not known yet.

    Example:
        >>> found = survey(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [(place.name, place.role) for place in found.places]
        [('0.weight', 'other'), ('2.weight', 'head')]
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module to prune, got {type(model).__name__}")
    _check_shapes(model)
    owners = {module: found for module in model.modules() if (found := layouts(module))}
    entries, unprunable = _entries(model, owners)
    blocks, encoder_decoder = stacks(model, owners)
    around = {e.name: blocks[path] for e in entries for path in prefixes(e.path) if path in blocks}
    matrices = _Matrices(model, entries, around)
    roles = _roles_in_blocks(matrices, blocks)
    head, vocabulary = _heads(matrices)
    roles |= dict.fromkeys(head, "head")
    roles |= {entry.name: "embedding" for entry in entries if _looks_up(entry)}
    places = [
        Place(*e, roles.get(e.name, "other"), around.get(e.name), e.name in vocabulary, ()) for e in entries
    ]
    return Survey(_everywhere(model, places), unprunable, encoder_decoder)


def _check_shapes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise UsageError(
                f"{name} has no shape yet ({owner} is lazy): run one batch through the model before pruning it"
            )


def _entries(
    model: nn.Module, owners: dict[nn.Module, tuple[Layout, ...]]
) -> tuple[list[Entry], tuple[tuple[str, str], ...]]:
    """Every matrix that is a floating-point parameter, and why the other matrices are none."""
    entries, unprunable = [], []
    for path, module in model.named_modules():
        for layout in owners.get(module, ()):
            name, parameter = join(path, layout.name), module._parameters.get(layout.name)
            if parameter is None:
                why = "is computed from other parameters; make it plain first (torch.nn.utils.parametrize"
                why += ".remove_parametrizations, torch.nn.utils.prune.remove or remove_weight_norm)"
                unprunable.append((name, why))
            elif not parameter.is_floating_point():
                unprunable.append((name, f"holds {parameter.dtype}, not floating-point weights"))
            else:
                entries.append(Entry(name, path, module, layout))
    return entries, tuple(unprunable)


def _looks_up(entry: Entry) -> bool:
    """An embedding: no input multiplies it."""
    return entry.layout.rows is None


def _roles_in_blocks(matrices: _Matrices, blocks: dict[str, Block]) -> dict[str, Role]:
    """Read each kind of block once: blocks of one class, shapes and names have the same roles."""
    contents: dict[str, list[Entry]] = {path: [] for path in blocks}
    for entry in matrices.entries:
        if entry.name in matrices.block and not _looks_up(entry):
            contents[matrices.block[entry.name].path].append(entry)
    known: dict[tuple, list[Role]] = {}
    roles: dict[str, Role] = {}
    for path, block in blocks.items():
        inside = contents[path]
        shapes = ((below(path, e.name), type(e.module), e.layout.shape) for e in inside)
        key = (kind(block.module), *shapes)
        if key not in known:
            known[key] = list(block_roles(block.module, path, inside).values())
        roles |= dict(zip((entry.name for entry in inside), known[key], strict=True))
    return roles


def _heads(matrices: _Matrices) -> tuple[set[str], set[str]]:
    """Names of the head's matrices, and of those among them that have one row for each word of a vocabulary."""
    model, outside = matrices.model, matrices.outside()
    output = called(model, "get_output_embeddings")
    head = {entry.name for entry in matrices.entries if entry.module is output}
    for part in model.modules():
        # a composite (encoder-decoder of two models, a wrapper) holds models with heads of their own
        base = _base(part)
        if base is not None and base is not part:
            beside = set(part.modules()).difference(base.modules())
            head |= {entry.name for entry in outside if entry.module in beside}
    if _base(model) is None:
        head |= _last(matrices, outside)
    sizes = _vocabularies(matrices)
    words = {e.name for e in outside if e.name in head and (e.module is output or e.layout.shape[1] in sizes)}
    return head, words


def _base(model: nn.Module) -> nn.Module | None:
    """The body of a Hugging Face model, which may be the model itself; None for any other model."""
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or getattr(model, "config", None) is None:
        return None
    base = getattr(model, prefix, model) if prefix else model
    return base if isinstance(base, nn.Module) else model


def _last(matrices: _Matrices, outside: list[Entry]) -> set[str]:
    """The head of a model that does not say which it is: as many rows as words, else the last matrix."""
    sizes = _vocabularies(matrices)
    order = {entry.name: index for index, entry in enumerate(matrices.entries)}
    last_block = max((order[name] for name in matrices.block), default=-1)
    after = [entry for entry in outside if order[entry.name] > last_block]
    words = {entry.name for entry in after or outside if entry.layout.shape[1] in sizes}
    if words or after:
        return words or {after[-1].name}
    # registered before the blocks: it reads what they write
    written = Counter(e.layout.shape[1] for e in matrices.entries if e.name in matrices.block)
    width = written.most_common(1)[0][0] if written else None
    return set([e.name for e in outside if e.layout.shape[2] == width != e.layout.shape[1]][-1:])


def _vocabularies(matrices: _Matrices) -> set[int]:
    """Sizes of the vocabularies a model reads.

    Positions and token types are embeddings too, and a classifier may well have as many rows as there are token
    types; so only the embedding that the model declares counts, else the first one and the largest one.
    """
    declared = called(matrices.model, "get_input_embeddings")
    if isinstance(declared, nn.Embedding):
        return {declared.weight.shape[0]}
    if _base(matrices.model) is not None:
        return set()
    rows = [e.layout.shape[1] for e in matrices.entries if _looks_up(e) and e.name not in matrices.block]
    return {rows[0], max(rows)} if rows else set()


def _everywhere(model: nn.Module, places: list[Place]) -> tuple[Place, ...]:
    """Each place with the modules around it, and again under every further name of its module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owned: dict[nn.Module, list[Place]] = {}
    for place in places:
        owned.setdefault(place.module, []).append(place)
    return tuple(
        replace(
            place,
            name=join(path, place.name.rpartition(".")[2]),
            path=path,
            enclosing=tuple(modules[prefix] for prefix in prefixes(path) if prefix != path),
        )
        for path, module in modules.items()
        for place in owned.get(module, ())
    )
