"""What `only=` and `skip=` may say, and which places each word of it means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from secateur.core.roles import Place
from secateur.errors import UsageError

__all__ = ["ROLES", "Only", "Term", "shown", "terms"]

Word = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Only = Word | Sequence[Word] | None

ROLES = ("all", "attention", "ffn", "encoder", "decoder", "head", "embedding")
NEVER_IMPLIED = ("embedding", "router")


@dataclass(frozen=True)
class Term:
    """One word of a selection.

    Attributes:
        argument: "only" or "skip".
        kind: how `value` is to be taken.
        value: a role, a glob, a module class or a predicate.
    """

    argument: str
    kind: Literal["role", "glob", "type", "predicate"]
    value: Any

    def __str__(self) -> str:
        return shown(self.argument, self.value)

    def match(self, place: Place) -> Literal["named", "implied"] | None:
        """Whether this word means `place`: by name, or only along with everything else around it.

        A glob, the module's own class, a predicate and every role but `all` name what they match. `all` and the
        class of an enclosing module imply it, and never imply an embedding or a router of experts.
        """
        if self.kind == "glob":
            spelled = (place.path, place.name)
            return "named" if any(s == self.value or fnmatchcase(s, self.value) for s in spelled) else None
        if self.kind == "predicate":
            return "named" if self.value(place.path, place.module) else None
        if self.kind == "role":
            return self._match_role(place)
        if isinstance(place.module, self.value) and place.role != "router":
            return "named"
        around = place.role not in NEVER_IMPLIED and any(isinstance(m, self.value) for m in place.enclosing)
        return "implied" if around else None

    def _match_role(self, place: Place) -> Literal["named", "implied"] | None:
        implied = place.role not in NEVER_IMPLIED
        if self.value == "all":
            return "implied" if implied else None
        if self.value in ("encoder", "decoder"):
            return "named" if implied and place.stack == self.value else None
        return "named" if place.role == self.value else None


def terms(argument: str, given: object, known: Collection[str]) -> tuple[Term, ...] | None:
    """Read what was given for `only` or `skip`; None when nothing was.

    Args:
        argument: "only" or "skip", for messages.
        given: a string (split at commas unless it is itself in `known`), a module class, a predicate, or a list
            or tuple of these.
        known: module paths and parameter names of the model.

    Raises:
        UsageError: something else, or nothing at all.

    Example:
        >>> [(term.kind, term.value) for term in terms("only", "ffn, *.q_proj", ())]
        [('role', 'ffn'), ('glob', '*.q_proj')]
    """
    if given is None or (argument == "skip" and isinstance(given, list | tuple) and not given):
        return None
    found: list[Term] = []
    for word in given if isinstance(given, list | tuple) else [given]:
        if isinstance(word, str):
            parts = [word] if word in known else [part.strip() for part in word.split(",")]
            found += [Term(argument, "role" if part in ROLES else "glob", part) for part in parts if part]
        elif isinstance(word, type) and issubclass(word, nn.Module):
            found.append(Term(argument, "type", word))
        elif callable(word) and not isinstance(word, type | nn.Module):
            found.append(Term(argument, "predicate", word))
        else:
            raise UsageError(
                f"{shown(argument, word)} is of type {type(word).__name__}; expected a role "
                f"({', '.join(ROLES)}), a glob over module paths, a module class, a function of "
                f"(path, module), or a list of these"
            )
    if not found:
        raise UsageError(
            f"{shown(argument, given)} names nothing; give a role ({', '.join(ROLES)}) or a glob, or leave "
            f"{argument} out"
        )
    return tuple(found)


def shown(argument: str, given: object) -> str:
    """`only` or `skip` as a message shows it.

    Example:
        >>> print(shown("only", "*.q_proj"), shown("skip", ["head", nn.Linear]))
        only="*.q_proj" skip=["head", Linear]
    """

    if isinstance(given, list | tuple):
        return f"{argument}=[{', '.join(map(_word, given))}]"
    return f"{argument}={_word(given)}"


def _word(word: object) -> str:
    if isinstance(word, str):
        return f'"{word}"'
    return str(
        getattr(word, "__name__", None) or (type(word).__name__ if isinstance(word, nn.Module) else repr(word))
    )
