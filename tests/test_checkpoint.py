"""Hostile, truncated and altered files give one clear line before anything is built from them."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from secateur.checkpoint import headers, one_line, read_checkpoint, read_object, read_state
from secateur.errors import InputError, ResourceError, SecateurError, UsageError
from secateur.hub import fetch
from secateur.manifest import write_manifest

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path


def entry(first: int, last: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refused(action: Any, *arguments: Any, error: type[SecateurError] = InputError, **options: Any) -> str:
    """The message of the error that is expected, which is one line."""
    with pytest.raises(error) as caught:
        action(*arguments, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_folder_is_described(folder: Path) -> None:
    found = read_checkpoint(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found.fingerprint == found.files["model.safetensors"] == digest
    assert (found.tensors, found.elements, found.dtype, found.pickled) == (2, 10, torch.float32, False)
    assert found.config == {"model_type": "gpt2"}
    assert list(found.files) == ["config.json", "model.safetensors"]
    assert headers(folder / "model.safetensors") == {"a.weight": ("F32", 6), "b.bias": ("BF16", 4)}


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        ({"a": entry(0, 8)}, bytes(8), 10**18, "header too large"),
        ({"a": entry(0, 8)}, bytes(8), 2**40, "header too large"),
        ({"a": entry(0, 8)}, bytes(8), 5, "invalid JSON in header"),
        (b"garbage{{{", b"", None, "invalid JSON in header"),
        (b"\xff\xfe", b"", None, "invalid UTF-8 in header"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "invalid offset for tensor `b`"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), None, "invalid offset for tensor `b`"),
        ({"a": entry(0, 8)}, bytes(7), None, "file not fully covered"),
        ({"a": entry(0, 8)}, bytes(9), None, "file not fully covered"),
        ({"a": entry(0, 8, [3])}, bytes(8), None, "invalid shape, data type, or offset for tensor"),
        ({"a": entry(0, 8, [2**62, 4])}, bytes(8), None, "overflow"),
        ({"a": entry(0, 8, dtype="PICKLE")}, bytes(8), None, "unknown variant"),
        ({"a": entry(8, 0, [2])}, bytes(8), None, "invalid offset"),
        ({}, b"", None, "a safetensors file without a single tensor"),
    ],
)
def test_unsound_safetensors_are_named(
    folder: Path, header: object, data: bytes, length: int | None, reason: str
) -> None:
    path = write_raw(folder / "model.safetensors", header, data, length)
    for action, target in ((headers, path), (read_state, path), (read_checkpoint, folder)):
        said = refused(action, target)
        assert str(path) in said
        assert reason in said


def test_an_empty_weight_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    assert "not a sound safetensors file (header too small)" in refused(read_checkpoint, folder)


@settings(max_examples=200)
@given(data=st.data())
def test_a_mutated_safetensors_file_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file(STATE, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content) - 1))
    path.write_bytes(content[:cut])
    state, said = {}, ""
    try:
        state, _ = read_state(path)
    except InputError as error:  # either outcome is right
        said = str(error)
    if state:
        assert cut is None
        assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == 32
    else:
        assert str(path) in said
        assert "\n" not in said


@settings(max_examples=60)
@given(data=st.data())
def test_in_a_folder_that_a_run_wrote_no_mutation_loads(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "finished"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    save_file(STATE, folder / "model.safetensors")
    write_manifest(folder)
    read_checkpoint(folder)
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors", "MANIFEST.sha256"]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    said = refused(read_checkpoint, folder)
    assert said.startswith(str(folder))
    assert path.name in said  # of an altered manifest: another file is not what it lists


def test_altered_and_added_files_are_named(folder: Path) -> None:
    write_manifest(folder)
    (folder / "config.json").write_text('{"model_type": "gpt3"}')
    said = refused(read_checkpoint, folder)
    assert "config.json: is altered since the run wrote it, says MANIFEST.sha256; restore it, or remove" in said
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "added_tokens.json").write_text("{}")
    assert "added_tokens.json: was added after the run" in refused(read_checkpoint, folder)
    (folder / "MANIFEST.sha256").unlink()
    read_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not readable as JSON (Expecting value"),
        (b"{", "not readable as JSON (Expecting property name"),
        (b"\xff\xfe\x00", "not readable as JSON ('utf-8' codec can't decode byte 0xff"),
        (b"[" * 200_000, "not readable as JSON (maximum recursion depth"),
        (b"9" * 10_000, "not readable as JSON (Exceeds the limit"),
        (b"[]", "a JSON object is expected, found list"),
        (b"null", "a JSON object is expected, found NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_garbled_json_is_named(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    said = refused(read_checkpoint, folder)
    assert f"{folder / name}: {reason}" in said


def test_a_huge_or_missing_json_is_not_read(folder: Path) -> None:
    with open(folder / "config.json", "r+b") as file:
        file.truncate(2**40)  # sparse: takes no room on the disk
    assert "larger than 512 MiB" in refused(read_checkpoint, folder)
    assert "nothing.json: cannot be read (No such file or directory); check" in refused(
        read_object, folder / "nothing.json"
    )


def test_what_may_not_be_read_is_no_damaged_file(folder: Path) -> None:
    (folder / "taken").mkdir()
    assert "taken: cannot be read (Is a directory); check the path and its permissions" in refused(
        read_object, folder / "taken"
    )
    assert "taken: cannot be read (Is a directory); check" in refused(headers, folder / "taken")
    assert "nothing: cannot be read (No such file" in refused(headers, folder / "nothing")


def test_what_is_no_checkpoint_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    said = refused(read_checkpoint, folder)
    assert "no weights; model.safetensors or model.safetensors.index.json is expected" in said
    assert said.endswith("found config.json, weights.safetensors.")
    (folder / "shard-00001-model-00001-of-00001.safetensors").touch()
    assert "a distributed checkpoint (shard-...); merge it" in refused(read_checkpoint, folder)
    (folder / "config.json").unlink()
    assert f"give file.py:function@{folder / 'model.safetensors'}" in refused(read_checkpoint, folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(read_checkpoint, folder, error=UsageError)


def make_shards(folder: Path) -> dict[str, Any]:
    (folder / "model.safetensors").unlink()
    index: dict[str, Any] = {"metadata": {"total_size": 32}, "weight_map": {}}
    for number, (name, tensor) in enumerate(STATE.items(), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensor}, folder / shard)
        index["weight_map"][name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_found_and_hashed(folder: Path) -> None:
    make_shards(folder)
    found = read_checkpoint(folder)
    assert (found.tensors, found.elements) == (2, 10)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [path.name for path in found.weights] == names
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    assert found.fingerprint == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"weight_map": {"a": "../secret.safetensors"}},
            "names '../secret.safetensors', which is no .safetensors file",
        ),
        (
            {"weight_map": {"a": "/etc/passwd"}},
            "names '/etc/passwd', which is no .safetensors file in the same",
        ),
        (
            {"weight_map": {"a": "code.bin"}},
            "names 'code.bin', which is no .safetensors file in the same folder",
        ),
        ({"weight_map": {"a": ".."}}, "names '..'"),
        ({"weight_map": {"a": None}}, "names 'None'"),
        (
            {"weight_map": {"a": "model-9.safetensors"}},
            "model-9.safetensors: missing, though model.safetensors.index",
        ),
        ({"weight_map": []}, '"weight_map" and "metadata" are expected to be objects'),
        ({"weight_map": {}}, '"weight_map" and "metadata" are expected'),
        ({"metadata": None}, '"weight_map" and "metadata" are expected'),
    ],
)
def test_a_hostile_index_is_named(folder: Path, change: dict[str, Any], reason: str) -> None:
    index = make_shards(folder) | change
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reason in refused(read_checkpoint, folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the pickle ran code",))


def test_pickles_are_refused_unless_the_user_insists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.ckpt", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
        said = refused(read_checkpoint, folder)
        assert f"{folder / name}: a pickle, which can run code when it is opened, is refused" in said
        assert "allow_pickle=True (--allow-pickle)" in said
        assert "is refused" in refused(read_state, folder / name)
        assert "not readable as a file of tensors alone" in refused(
            read_state, folder / name, allow_pickle=True
        )
        (folder / name).unlink()
    torch.save(STATE, folder / "pytorch_model.bin")
    found = read_checkpoint(folder, allow_pickle=True)
    assert found.pickled
    assert (found.tensors, found.dtype) == (0, None)
    state, tied = read_state(folder / "pytorch_model.bin", allow_pickle=True)
    assert tied == {}
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    torch.save({"epoch": 3, "state_dict": STATE}, folder / "last.ckpt")
    assert list(read_state(folder / "last.ckpt", allow_pickle=True)[0]) == list(STATE)
    torch.save([1, 2], folder / "list.pt")
    assert "a dictionary of tensors is expected" in refused(read_state, folder / "list.pt", allow_pickle=True)
    assert "ran code" not in capsys.readouterr().out


def test_safetensors_are_preferred_to_a_pickle_beside_them(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert [path.name for path in read_checkpoint(folder).weights] == ["model.safetensors"]


def test_a_missing_weight_file_names_what_is_near(folder: Path) -> None:
    said = refused(read_state, folder / "modle.safetensors", error=UsageError)
    assert said.endswith("modle.safetensors: no such file. Nearest there: model.safetensors.")


@pytest.mark.parametrize("tied", ["[", "[]", '{"a": 1}'])
def test_a_garbled_table_of_tied_names(tmp_path: Path, tied: str) -> None:
    save_file(STATE, tmp_path / "a.safetensors", metadata={"tied": tied})
    assert 'the entry "tied" of its metadata is no table of names' in refused(
        read_state, tmp_path / "a.safetensors"
    )


def test_downloads_that_fail_give_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-mine").mkdir()
    options = {"offline": False, "allow_pickle": False, "trust_remote_code": False}
    raised: list[BaseException] = []

    def download(name: str, **kwargs: Any) -> str:
        assert not any("*.py" in pattern or ".bin" in pattern for pattern in kwargs["allow_patterns"])
        raise raised[-1]

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def said(error: BaseException, kind: type[SecateurError] = InputError, **more: bool) -> str:
        raised.append(error)
        return refused(fetch, "gpt2-min", error=kind, **options | more)

    broken = ConnectionError("Name or service\nnot known")
    assert (
        said(broken) == '"gpt2-min" is no folder here, and as a name on the hub its download failed '
        "(Name or service not known). Nearest there: gpt2-mine."
    )
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    assert '"gpt2-min" is no folder here and no model on the hub' in said(missing, UsageError)
    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    assert "grants access by request; log in with `hf auth login`" in said(gated, UsageError)
    invalid = errors.HFValidationError("x")
    assert "is neither a folder nor a Hugging Face name" in said(invalid, UsageError)
    absent = errors.LocalEntryNotFoundError("x")
    assert "nothing is downloaded offline. Nearest there: gpt2-mine." in said(absent, UsageError, offline=True)
    unreached = errors.LocalEntryNotFoundError("x")
    unreached.__cause__ = broken
    assert said(unreached, UsageError) == (
        '"gpt2-min" is no folder here and not in the cache, and the hub, where it may be a name, cannot be reached '
        "(Name or service not known); check the spelling, or the network. Nearest there: gpt2-mine."
    )
    assert "no space left on the disk" in said(OSError(28, "No space left on device"), ResourceError)


def test_without_its_package_a_name_asks_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refused(fetch, "gpt2", offline=True, allow_pickle=False, trust_remote_code=False, error=UsageError)
    assert "pip install 'secateur[hf]'" in said


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b.")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 1000))) == 300
    assert re.fullmatch("x+", one_line(ValueError("x" * 1000)))
