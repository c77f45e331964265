"""HTML in which data cannot become markup: every text is escaped unless it was built here."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from typing import Any

__all__ = ["Html", "data_block", "join", "named", "plain", "shown", "tag"]

_LONGEST_NAME, _LONGEST_TEXT = 160, 10_000
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_NAME + 1},}}")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


class Html(str):
    """Text that is markup already; `tag` and `join` make it, and pass it on without escaping."""

    __slots__ = ()


def shown(text: object) -> str:
    """A name from a model or a file as it may be shown: nothing invisible, nothing that reorders, not too long.

    Control characters, line ends, direction overrides and lone surrogates (a name read from a file can hold
    any of them) become their escapes; beyond 160 characters the middle is left out.

    Example:
        >>> print(shown("a" + chr(0x202E) + "b"))
        a\\u202eb
    """
    return "".join(_escape(c) if _hidden(c) else c for c in _cut(str(text)))


def _cut(text: str) -> str:
    """Text without its middle where it is longer than a name may be."""
    side = (_LONGEST_NAME - 1) // 2
    return text if len(text) <= _LONGEST_NAME else f"{text[:side]}…{text[-side:]}"


def _hidden(character: str) -> bool:
    return character in _BIDI or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def plain(text: object) -> Html:
    """Text as HTML that shows it literally; `Html` stays as it is.

    Hidden characters but line ends become their escapes, and words beyond 160 characters lose their middle.
    """
    if isinstance(text, Html):
        return text
    cut = _LONG_WORD.sub(lambda word: _cut(word[0]), str(text)[:_LONGEST_TEXT])
    cut = "".join(_escape(c) if _hidden(c) and c not in "\n\t" else c for c in cut)
    return Html(html.escape(cut, quote=True))


def join(*parts: object, between: str = "") -> Html:
    """Several pieces in a row, those that are no `Html` escaped; None is left out."""
    return Html(between.join(plain(part) for part in parts if part is not None))


def tag(element: str, /, *children: object, **attributes: object) -> Html:
    """An element; children and attribute values are escaped.

    Args:
        element: its name, written in this package, never data.
        children: texts, or `Html`.
        attributes: `_` in a name stands for `-`, and one at its end is dropped (`class_`); True writes the name
            alone, None and False leave it out.

    Example:
        >>> tag("p", "1 < 2", class_="note", hidden=True)
        '<p class="note" hidden>1 &lt; 2</p>'
    """
    opened = element
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            opened += f" {key}"
        elif value is not None and value is not False:
            opened += f' {key}="{plain(value)}"'
    if element in _VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{join(*children)}</{element}>")


def data_block(identifier: str, content: Any) -> Html:
    """JSON inside a page, for its own script to read.

    `<`, `>` and `&` become escapes of JSON, so that no text can end the element or open a comment; so do the
    line separators that JavaScript once took for ends of lines. Numbers that JSON lacks become null.
    """
    text = json.dumps(_finite(content), allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Html(text), type="application/json", id=identifier)


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def named(text: object) -> Html:
    """A name inside running text, whose direction stays its own, and whose line breaks after dots."""
    return tag("bdi", join(*shown(text).replace(".", ".\0").split("\0"), between="<wbr>"))
