"""Every altered, missing or added file is found, and a hostile manifest opens nothing outside the folder."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import InputError, NumericError, ResourceError, UsageError
from secateur.manifest import (
    MANIFEST,
    read_manifest,
    sha256,
    unlisted,
    verify,
    write_json,
    write_manifest,
    write_text,
)

FILES = {
    "config.json": b'{"a": 1}\n',
    "model.safetensors": bytes(range(256)) * 4,
    "run/run.json": b"{}",
    "run/deep/er/empty": b"",
    "back\\slash and\nline.txt": b"odd",
    "umlaut-\xe4.txt": b"\xc3\xa4",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "out"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    write_manifest(root)
    return root


def test_the_manifest_is_sorted_and_holds_the_digests(folder: Path) -> None:
    entries = read_manifest(folder)
    assert list(entries) == sorted(FILES)
    assert entries == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert verify(folder) == []
    assert unlisted(folder) is None
    first = (folder / MANIFEST).read_bytes()
    write_manifest(folder)
    assert (folder / MANIFEST).read_bytes() == first


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this machine")
def test_sha256sum_reads_it(folder: Path) -> None:
    result = subprocess.run(
        ["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": OK") == len(FILES)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_altered_byte_of_any_file_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The manifest's own bytes included."""
    folder = tmp_path_factory.getbasetemp() / "altered"
    if not folder.exists():
        for name, content in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_manifest(folder)
    name = data.draw(st.sampled_from([MANIFEST, *(name for name, content in FILES.items() if content)]))
    original = (folder / name).read_bytes()
    kind = data.draw(st.sampled_from(["alter", "remove", "insert"]))
    at = data.draw(st.integers(0, len(original) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: kind == "insert" or value != original[at]))
    middle = b"" if kind == "remove" else bytes([byte])
    altered = original[:at] + middle + original[at + (kind != "insert") :]
    try:
        (folder / name).write_bytes(altered)
        assert altered != original
        assert verify(folder) != []
    finally:
        (folder / name).write_bytes(original)
        assert verify(folder) == []


def test_missing_altered_and_extra_files_are_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(bytes(1024))
    (folder / "run/extra.txt").write_text("new")
    problems = verify(folder)
    assert problems[0] == "config.json: missing"
    assert problems[1].startswith("model.safetensors: altered (SHA-256 ")
    assert problems[2] == "run/extra.txt: extra, not in the manifest"
    assert len(problems) == 3


def test_hidden_files_and_state_are_no_part_of_the_result(folder: Path) -> None:
    (folder / ".DS_Store").write_text("x")
    (folder / "run/state").mkdir()
    (folder / "run/state/layer").write_text("3")
    assert verify(folder) == []
    before = (folder / MANIFEST).read_bytes()
    write_manifest(folder)
    assert (folder / MANIFEST).read_bytes() == before
    assert unlisted(folder) == ".DS_Store in it is not a file that a run wrote"


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "/etc/passwd", "run/../../secret.txt", "./config.json", "run//run.json", ".", "run/"],
)
def test_hostile_lines_are_reported_and_not_obeyed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    with open(folder / MANIFEST, "a") as file:
        file.write("0" * 64 + f"  {name}\n")
    opened = []
    real = builtins.open

    def watch(path: object, *rest: object, **more: object) -> object:
        opened.append(str(path))
        return real(path, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", watch)
    problems = verify(folder)
    monkeypatch.undo()
    assert len(problems) == 1
    assert f"with a path outside the folder or not in plain form: {name!r}" in problems[0]
    assert opened
    assert all(os.path.realpath(path).startswith(str(folder) + "/") for path in opened)
    with pytest.raises(InputError, match="a path outside the folder"):
        read_manifest(folder)


def test_links_are_problems_and_never_followed(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.mkdir()
    (secret / "run.json").write_bytes(FILES["run/run.json"])
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret / "run.json")
    (folder / "run/run.json").unlink()
    (folder / "run/deep/er/empty").unlink()
    (folder / "run/deep/er").rmdir()
    (folder / "run/deep").rmdir()
    (folder / "run").rmdir()
    (folder / "run").symlink_to(secret)
    assert verify(folder) == [
        "run/deep/er/empty: missing",
        "run/run.json: missing",
        "config.json: symbolic link",
        "run: symbolic link",
        "run: extra, not in the manifest",
    ]
    (folder / MANIFEST).rename(secret / "manifest")
    (folder / MANIFEST).symlink_to(secret / "manifest")
    assert f"{MANIFEST} is no regular file" in verify(folder)


def test_special_files_are_not_opened(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # opening it would wait for ever
    assert verify(folder) == ["config.json: special file"]
    with pytest.raises(UsageError, match=r"config.json: special file in a run's folder"):
        write_manifest(folder)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# secateur run folder\n", "", 'does not begin with the line "# secateur run folder"'),
        ("  config.json", " config.json", "line 3 that is not of the form SHA-256, two blanks, path"),
        ("  config.json", " *config.json", "line 3 that is not of the form"),
        (
            "run/run.json\n",
            "run/run.json\n" + "0" * 64 + "  config.json\n",
            "lists 'config.json' a second time",
        ),
        ("run/run.json\n", "run/run.json\r\n", "is not in the form in which it was written"),
    ],
)
def test_a_manifest_that_is_not_ours_is_named(folder: Path, old: str, new: str, problem: str) -> None:
    with open(folder / MANIFEST, newline="") as file:
        text = file.read()
    assert old in text
    with open(folder / MANIFEST, "w", newline="") as file:
        file.write(text.replace(old, new))
    assert any(problem in found for found in verify(folder)), verify(folder)


def test_no_manifest_and_no_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert verify(folder) == [  # and not every file as extra
        "MANIFEST.sha256 is missing, so nothing says which files belong here and whether they are as they were written"
    ]
    with pytest.raises(InputError, match=r"MANIFEST.sha256 is missing\.") as caught:
        read_manifest(folder)
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match="nowhere is no folder; give the folder that a run wrote"):
        verify(folder / "nowhere")


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    with open(folder / MANIFEST, "r+b") as file:
        file.truncate(2**40)  # sparse: takes no room on the disk
    assert verify(folder)[0] == f"{MANIFEST} is larger than {64 * 2**20} bytes"


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"perplexity": 20.5, "name": "ä"})
    assert json.loads(path.read_text()) == {"perplexity": 20.5, "name": "ä"}
    before = path.read_bytes()
    with pytest.raises(NumericError, match=r"metrics\.json: Out of range float values are not JSON compliant"):
        write_json(path, {"perplexity": float("nan")})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        write_text(path, "half")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4, the example of section B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == sha256(tmp_path / "abc", flush=True) == expected
