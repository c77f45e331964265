"""Patterns of whole units in words: `heads,neurons`, `channels`, `axes:v dimension`."""

from __future__ import annotations

from typing import Any

from secateur.errors import UsageError, nearest

__all__ = ["UNIT_WORDS", "check_units", "says_units", "units_of"]

# what a kind of units is called on the command line -> its pattern; --help needs no torch, so no class stands here
UNIT_WORDS = {
    "heads": "Heads",
    "kv-groups": "KVGroups",
    "query-heads": "QueryHeads",
    "neurons": "Neurons",
    "channels": "Channels",
    "hidden": "Hidden",
    "experts": "Experts",
}
AXES = "axes:"


def says_units(text: str) -> bool:
    """Whether a pattern in words cuts whole units, or means to.

    Example:
        >>> says_units("heads,neurons"), says_units("axes:v dimension"), says_units("2:4"), says_units("weights")
        (True, True, False, False)
    """
    return all(word in UNIT_WORDS or word.startswith(AXES) for word in _words(text))


def check_units(text: str) -> None:
    """Refuse words that are no pattern of units.

    Raises:
        UsageError: an unknown word, an empty glob, or a word twice.
    """
    words = _words(text)
    for word in words:
        if word.startswith(AXES):
            if not word.removeprefix(AXES).strip():
                raise UsageError(
                    f"{word!r} names no axis; say which, as in 'axes:v dimension' or 'axes:heads of *.3.*'"
                )
        elif word not in UNIT_WORDS:
            raise UsageError(f"{word!r} is no kind of units; {nearest(word, UNIT_WORDS)}")
    if len(set(words)) < len(words):
        raise UsageError(f"{text!r} names a kind of units twice")


def units_of(text: str, *, minimum: int = 1, multiple: int = 1, homogeneous: bool = False) -> Any:
    """The pattern that words name; of two that choose an axis the first counts.

    Example:
        >>> units_of("heads,neurons", multiple=8)
        Heads(multiple=8) | Neurons(multiple=8)
    """
    from secateur import pattern

    check_units(text)
    options: dict[str, Any] = {"minimum": minimum, "multiple": multiple, "homogeneous": homogeneous}
    found: Any = None
    for word in _words(text):
        if word.startswith(AXES):
            part = pattern.Axes(word.removeprefix(AXES).strip(), **options)
        else:
            part = getattr(pattern, UNIT_WORDS[word])(**options)
        found = part if found is None else found | part
    return found


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.replace("|", ",").replace("+", ",").split(",")]
    return [word if word.startswith(AXES) else word.lower().replace("_", "-") for word in words]
