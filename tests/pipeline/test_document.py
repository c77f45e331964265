"""A YAML file is read as plain values, each with its line; what is more than that is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import InputError, UsageError
from secateur.pipeline.document import parse, read

WORDS = st.text("abcxyz", min_size=1, max_size=6)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | WORDS | st.floats(-1e6, 1e6, width=32),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(WORDS, inside, max_size=3),
    max_leaves=8,
)


@given(value=PLAIN)
def test_json_is_yaml(value):
    assert parse(json.dumps(value), "f").value == value


def test_scalars_are_those_of_yaml_1_2():
    text = "a: 2:4\nb: 1e-4\nc: no\nd: 010\ne: ~\nf: 'true'\ng: 3.\nh:\ni: 2001-01-01\nj: .5\nk: 1_000\nl: 0x1F\nm: .\n"
    assert parse(text, "f").value == {
        "a": "2:4",
        "b": 1e-4,
        "c": "no",
        "d": 10,
        "e": None,
        "f": "true",
        "g": 3.0,
        "h": None,
        "i": "2001-01-01",
        "j": 0.5,
        "k": "1_000",
        "l": "0x1F",
        "m": ".",
    }


def test_every_value_knows_its_line():
    document = parse("a: 1\nb:\n  - c: 2\n\n  - d:\n      e: 3\n", "f.yaml")
    assert document.where(("a",)) == "f.yaml, line 1"
    assert document.where(("b", 0, "c")) == "f.yaml, line 3"
    assert document.where(("b", 1, "d", "e")) == "f.yaml, line 6"
    assert document.where(("b", 1, "d", "missing", 4)) == "f.yaml, line 5"
    assert document.where(("missing",)) == "f.yaml, line 1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "f, line 2: a stands here twice, first on line 1"),
        ("a: &x 1\nb: *x", "f, line 1: an alias; write it out"),
        ("a: !!python/object:os.system 1", "f, line 1: the tag python/object:os.system is refused"),
        ("a: !mine {b: 1}", "f, line 1: the tag !mine is refused"),
        ("a:\n  b: [1", "line 2: no YAML"),
        ("? [1]\n: 2", "f, line 1: a key must be a word"),
        ("a: !!int x", "f: no YAML"),
        ("[" * 30 + "1" + "]" * 30, "nested more than 20 deep"),
        ("- " * 5000 + "a", "no YAML"),
    ],
)
def test_what_is_no_plain_yaml(text, said):
    with pytest.raises(UsageError) as caught:
        parse(text, "f")
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "experiment.yaml").write_text("a: 1")
    with pytest.raises(
        UsageError, match=r"cannot be read \(No such file or directory\); nearest: experiment.yaml"
    ):
        read(tmp_path / "experimnt.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no text in UTF-8"):
        read(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a" * 1_000_001)
    with pytest.raises(InputError, match="1,000,001 bytes are too many"):
        read(tmp_path / "c.yaml")
