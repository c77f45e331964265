"""Text files become the documents that are in them, and everything else becomes one clear line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.documents import PYTHON_DOCS, check_there, read_text
from secateur.errors import InputError, SecateurError, UsageError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_text_without_separators_is_one_document_unchanged(tmp_path: Path) -> None:
    text = "\n = Heading = \n\n two  blanks,\r\n an umlaut: ä, no end of line"
    assert read_text(write(tmp_path / "a.txt", text)) == [text]
    assert read_text(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + text.encode())) == [text]  # a byte order mark


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_lines_end_documents(tmp_path: Path, end: str) -> None:
    lines = [
        "<|endoftext|>",
        "one",
        "still one",
        "<|endoftext|>  ",
        "",
        "<|endoftext|>",
        "two <|endoftext|> two",
        "<|endoftext|>",
    ]
    documents = read_text(write(tmp_path / "a.txt", end.join(lines) + end))
    assert documents == [f"one{end}still one", "two <|endoftext|> two"]
    assert read_text(write(tmp_path / "b.txt", end.join(lines))) == documents


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff")), min_size=1))
def test_what_was_joined_is_read_back(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "joined.txt"
    path.write_bytes("\n<|endoftext|>\n".join(documents).encode())
    kept = [document for document in documents if document.strip()]
    if kept:
        assert read_text(path) == kept
    else:
        with pytest.raises(InputError, match="holds no text"):
            read_text(path)


def test_a_folder_gives_its_text_files_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        write(tmp_path / name, name)
    assert read_text(tmp_path) == ["a.txt", "b.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.txt file in this folder"):
        read_text(tmp_path / "empty")


def test_json_lines_by_field(tmp_path: Path) -> None:
    rows = [{"text": "one", "body": "eins"}, {"text": "two\nlines", "body": "zwei"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_text(path) == ["one", "two\nlines"]
    assert read_text(f"{path}:body") == ["eins", "zwei"]
    odd = write(tmp_path / "odd.jsonl:x.jsonl", json.dumps(rows[0]))
    assert read_text(odd) == ["one"]


def test_parquet_by_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "body": ["eins", "zwei"], "year": [1, 2]}), path)
    assert read_text(path) == ["one", "two"]
    assert read_text(f"{path}:body") == ["eins", "zwei"]
    with pytest.raises(UsageError, match=re.escape('a.parquet: no column "bodi"; nearest: body')):
        read_text(f"{path}:bodi")
    with pytest.raises(UsageError, match="row 0: text is expected, found int; choose another field"):
        read_text(f"{path}:year")
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"a\.parquet: not readable as Parquet"):
        read_text(path)


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'secateur[parquet]'")):
        read_text(write(tmp_path / "a.parquet", b"PAR1"))


def test_python_docs_are_on_every_machine_and_the_same_every_time() -> None:
    documents = read_text(PYTHON_DOCS)
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000
    assert documents[0].startswith('The "assert" statement')
    assert documents == read_text(PYTHON_DOCS)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", "", InputError, "holds no text; give a file with some"),
        ("a.txt", " \n<|endoftext|>\n\n", InputError, "holds no text"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\x80", InputError, "byte 0x89 at position 0 is no UTF-8"),
        ("a.txt", b"text\0text", InputError, "a zero byte at position 4; this is no text"),
        ("a.jsonl", "", InputError, "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', InputError, "line 2: not readable as JSON"),
        ("a.jsonl", '{"text": "a"}\n["text"]', InputError, "line 2: a JSON object is expected, found list"),
        ("a.jsonl", '{"txt": "a"}', UsageError, 'line 1: no field "text"; nearest: txt'),
        (
            "a.jsonl",
            '{"text": null}',
            UsageError,
            "line 1: text is expected, found NoneType; choose another field",
        ),
        ("a.jsonl", '{"text": "\\ud800"}', InputError, "line 1: half of a surrogate pair at position 0"),
        ("a.jsonl", b'{"text": "\xff"}', InputError, "line 1: byte 0xff at position 10 is no UTF-8"),
        ("a.jsonl", "[" * 100_000, InputError, "line 1: not readable as JSON"),
        (
            "a.csv",
            "text",
            UsageError,
            '".csv" is no kind of text that is read; known: .txt, .jsonl, .parquet, folders',
        ),
    ],
)
def test_what_is_no_text_is_named(
    tmp_path: Path, name: str, content: str | bytes, error: type[SecateurError], message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(error, match=re.escape(message)) as caught:
        read_text(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


def test_a_missing_file_names_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "wikitext.txt", "x")
    with pytest.raises(UsageError, match=r"no such file\. Nearest there: wikitext\.txt\."):
        read_text(tmp_path / "wikitxt.txt")
    with pytest.raises(UsageError, match=r'"pyton-docs": no such file\. Nearest there: python-docs'):
        read_text("pyton-docs")
    with pytest.raises(UsageError, match="no such file"):
        read_text(tmp_path / "a.jsonl:text")


@pytest.mark.shared
def test_real_files(shared: Path) -> None:
    stories = read_text(shared / "data/lm/tinystories_test.txt")
    assert len(stories) == 3117
    assert not any("<|endoftext|>" in story for story in stories)
    [wikitext] = read_text(shared / "data/lm/wikitext2_raw_test.txt")
    assert len(wikitext.split()) == 241_211
    assert len(read_text(f"{shared}/data/lm/lambada_test.jsonl")) == 5153


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl:words", "python-docs", "folder"])
def test_what_is_there_is_not_read(tmp_path, name, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "a.jsonl").write_text("no json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    check_there(name)


def test_what_is_not_there_is_told_in_the_words_of_the_reader(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for name in ("b.txt", "a.csv", "b.jsonl:text"):
        with pytest.raises(UsageError) as there:
            check_there(tmp_path / name)
        with pytest.raises(UsageError) as read:
            read_text(tmp_path / name)
        assert str(there.value) == str(read.value)
