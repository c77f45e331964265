"""What to say when a selection matches nothing, leaves nothing, or names half of a shared tensor."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from secateur.core.roles import Place, Survey
from secateur.core.stacks import below
from secateur.core.terms import ROLES, Term, shown
from secateur.core.tied import same_tensor
from secateur.errors import nearest

__all__ = ["no_match", "nothing_chosen", "spelled", "tied_error"]

SHOWN = 4


def no_match(model: nn.Module, found: Survey, places: Sequence[Place], term: Term, usual: int) -> str:
    """The message for a word that means none of `places`; `usual` counts what is pruned by default."""
    name = type(model).__name__
    if term.value == "decoder" and not found.encoder_decoder:
        instead = shown(term.argument, "encoder")
        stack = f"has one stack, which {instead} selects" if _has_blocks(places) else "has no repeated blocks"
        return f"{term} needs an encoder-decoder model; {name} {stack}"
    head = f"{term} matches none of the {usual} prunable layer{'' if usual == 1 else 's'}"
    if term.kind == "role":
        if term.value == "encoder":
            return f"{head}: {name} has no repeated blocks"
        return f"{head}; their roles: {', '.join(dict.fromkeys(place.role for place in places))}"
    if term.kind == "type":
        classes = dict.fromkeys(type(place.module).__name__ for place in places)
        return f"{head}; their classes: {', '.join(classes)}"
    if term.kind == "predicate":
        return f"{head}; {nearest('', [place.path for place in places])}"
    return f"{head}; {_hint(model, found, places, term)}."


def _has_blocks(places: Sequence[Place]) -> bool:
    return any(place.stack for place in places)


def _hint(model: nn.Module, found: Survey, places: Sequence[Place], term: Term) -> str:
    """What a glob that matches no layer may have meant."""
    for name, why in found.unprunable:
        if any(text == term.value or fnmatchcase(text, term.value) for text in (name, name.rpartition(".")[0])):
            return f"{name} {why}"
    for path, module in model.named_modules():
        if path and (path == term.value or fnmatchcase(path, term.value)):
            inside = sum(bool(below(path, place.path)) for place in places)
            if inside:
                return f"{path} is a module that holds {inside} of them: {shown(term.argument, path + '.*')}"
            return f"{path} ({type(module).__name__}) holds no matrix"
    return _near(term.value, places)


def _near(word: str, places: Sequence[Place]) -> str:
    """The names that end most like `word`, whose wildcards do not count.

    A pattern is mostly written for the last parts of a path, so as many of them are compared as it has.
    """
    bare = word.strip("*?.").lower()
    size = bare.count(".") + 1
    tails = {role: role for role in ROLES if size == 1 and bare == word.lower()}
    for place in places:
        for text in (place.path, place.name):
            tails.setdefault(".".join(text.split(".")[-size:]).lower(), text)
    close = get_close_matches(bare, tails, n=3, cutoff=0.6)
    if not close:
        return nearest(word, [place.path for place in places])
    likeness = [SequenceMatcher(None, tail, bare).ratio() for tail in close]
    best = [tail for tail, ratio in zip(close, likeness, strict=True) if ratio >= likeness[0] - 0.1]
    return "nearest: " + ", ".join(tails[tail] for tail in best)


def nothing_chosen(model: nn.Module, found: Survey, left_out: Sequence[tuple[str, str]]) -> str:
    """The message for a selection that leaves nothing to prune."""
    if not left_out:
        known = "Linear, Conv1d/2d/3d, Conv1D, Embedding, MultiheadAttention, stacked experts"
        why = "; ".join(f"{name} {reason}" for name, reason in found.unprunable[:SHOWN])
        return f"nothing to prune in {type(model).__name__}: " + (why or f"it holds no matrix ({known})")
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out:
        reasons.setdefault(reason, []).append(name)
    lines = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in list(reasons.items())[:SHOWN]
    ]
    more = sum(map(len, list(reasons.values())[SHOWN:]))
    return (
        f"nothing to prune in {type(model).__name__}, all {len(left_out)} layers are left out. "
        + "; ".join(lines)
        + (f"; and {more} more" if more else "")
    )


def tied_error(named: Sequence[Place], forgotten: Sequence[Place], implied: bool = False) -> str:
    """What pruning a shared tensor would also change, and how to say yes or no to that.

    Args:
        named: places of the tensor that were asked for.
        forgotten: places of the same memory that were not.
        implied: nobody asked for the tensor by name; it is left out.
    """
    others = [f"{place.name} ({place.role})" for place in forgotten]
    listed = ", ".join(others[:-1]) + " and " + others[-1] if len(others) > 1 else others[0]
    same = all(same_tensor(named[0].parameter, place.parameter) for place in forgotten)
    relation = "is the same tensor as" if same else "shares memory with"
    both, both_named = ("both", "Name both") if len(others) == 1 else ("all of them", "Name all of them")
    every = spelled("only", *(["all"] if implied else []), *named, *forgotten)
    told = (
        f"{named[0].name} {relation} {listed}: pruning it changes {both}. {both_named} to prune them, {every}"
    )
    return told if implied else f"{told}, or leave it out with {spelled('skip', named[0])}."


def spelled(argument: str, *words: str | Place) -> str:
    """The argument that names these places, as one would type it."""
    texts = list(dict.fromkeys(word if isinstance(word, str) else _spelling(word) for word in words))
    return shown(argument, texts if any("," in text for text in texts) else ",".join(texts))


def _spelling(place: Place) -> str:
    """The module path, or the parameter name where the path is empty or a role."""
    return place.name if place.path in ("", *ROLES) or place.layout is None else place.path
