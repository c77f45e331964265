"""A TEXT on the command line becomes documents.

TEXT is a .txt file, a folder of them, `file.jsonl:field`, `file.parquet:column`, or `python-docs`, the
documentation inside CPython that every machine has.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from secateur import own
from secateur.checkpoint import one_line
from secateur.errors import InputError, UsageError, nearest

__all__ = ["PYTHON_DOCS", "check_there", "read_text"]

PYTHON_DOCS = "python-docs"
_KINDS = (".txt", ".jsonl", ".parquet")
_FIELD = re.compile(r"(?P<path>.+\.(?:jsonl|parquet)):(?P<field>[^/]+)")
_SEPARATOR = re.compile(r"(?:\r?\n)?^<\|endoftext\|>[ \t\r]*$\n?", re.MULTILINE)


def read_text(spec: str | Path) -> list[str]:
    """Read documents, in the order of the file, or of the names of files and topics.

    Args:
        spec: one of
            `file.txt`: documents end with a line `<|endoftext|>`; without such a line the file is one document;
            `folder`: its .txt files, read as above;
            `file.jsonl:field`, `file.parquet:column`: one document a row, by default from "text";
            `python-docs`: the documentation topics inside CPython.

    Returns:
        At least one document, none of them blank, as in the file but for the line end before `<|endoftext|>`.

    Raises:
        UsageError: no such file, kind of file, field or column.
        InputError: a file is empty, no text, or not what its name says.
    """
    if str(spec) == PYTHON_DOCS:
        return _python_docs()
    path, field = _place(str(spec))
    documents = [document for document in _documents(path, field) if document.strip()]
    if not documents:
        raise InputError(f"{path}: holds no text; give a file with some.")
    return documents


def check_there(spec: str | Path) -> None:
    """Whether there is such a text, of a kind that is read; nothing is read yet, so a slip costs no waiting.

    Raises:
        UsageError: as `read_text`, but for fields and columns.
    """
    if str(spec) != PYTHON_DOCS:
        _files(_place(str(spec))[0])


def _place(spec: str) -> tuple[Path, str]:
    """The path, and the field or column of it."""
    found = None if Path(spec).expanduser().exists() else _FIELD.fullmatch(spec)
    path, field = (found["path"], found["field"]) if found else (spec, "text")
    return Path(path).expanduser(), field


def _files(path: Path) -> list[Path]:
    """The file, or those of the folder."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            raise UsageError(f"{path}: no .txt file in this folder.")
        return files
    if not path.is_file():
        raise UsageError(f'"{path}": no such file.{own.near(path.name, [PYTHON_DOCS, *_names(path.parent)])}')
    if path.suffix not in _KINDS:
        raise UsageError(
            f'{path}: "{path.suffix}" is no kind of text that is read; known: {", ".join(_KINDS)}, folders.'
        )
    return [path]


def _documents(path: Path, field: str) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": _from_txt,
        ".jsonl": lambda file: _from_jsonl(file, field),
        ".parquet": lambda file: _from_parquet(file, field),
    }
    return itertools.chain.from_iterable(readers[file.suffix](file) for file in _files(path))


def _from_txt(path: Path) -> Iterator[str]:
    return iter(_SEPARATOR.split(_decoded(_bytes(path), str(path))))


def _from_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(_decoded(line, place))
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{place}: not readable as JSON ({one_line(error)}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{place}: a JSON object is expected, found {type(row).__name__}.")
        if field not in row:
            raise UsageError(f'{place}: no field "{field}"; {nearest(field, row)}.')
        yield _text(row[field], place)


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: Parquet needs the extra parquet: pip install 'secateur[parquet]'."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            rows = file.read(columns=[column]).column(0).to_pylist() if column in names else None
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as Parquet ({one_line(error)}).") from error
    if rows is None:
        raise UsageError(f'{path}: no column "{column}"; {nearest(column, names)}.')
    for number, row in enumerate(rows):
        yield _text(row, f"{path}, row {number}")


def _python_docs() -> list[str]:
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise UsageError(f"{PYTHON_DOCS}: this Python was built without its documentation topics.") from error
    return [topics.topics[name] for name in sorted(topics.topics)]


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{place}: text is expected, found {type(value).__name__}; choose another field.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: half of a surrogate pair at position {error.start}, which is no text."
        ) from error
    return value


def _decoded(content: bytes, place: str) -> str:
    if b"\0" in content:
        raise InputError(f"{place}: a zero byte at position {content.index(0)}; this is no text.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte {content[error.start]:#04x} at position {error.start} is no UTF-8."
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
