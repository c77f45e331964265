"""Files of shrunk models that somebody altered are refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import load, save
from secateur.errors import InputError, SecateurError, UsageError

from .saved import uneven_gpt2


def rewrite(folder: Path, change: Any, what: str = "") -> None:
    text = json.loads((folder / "compact.json").read_text())
    change(text)
    if what != "sha256":
        text["cuts_sha256"] = hashlib.sha256(json.dumps(text["cuts"], sort_keys=True).encode()).hexdigest()
    (folder / "compact.json").write_text(json.dumps(text))
    (folder / "MANIFEST.sha256").unlink(missing_ok=True)


def cuts(key: str, value: Any) -> Any:
    def change(text: dict[str, Any]) -> None:
        text["cuts"][key] = value

    return change


def inside(change: Any) -> Any:
    return lambda text: change(text["cuts"])


UP = "transformer.h.0.mlp.c_fc.weight"
HOSTILE: list[tuple[str, Any, str]] = [
    ("format", lambda t: t.update(format="pickle"), r"format 'pickle' is not known; expected 'secateur.compact.v1'"),
    ("weights", lambda t: t.update(weights={"../x.safetensors": ""}), r"names '../x.safetensors', which is no"),
    ("weights gone", lambda t: t.update(weights={}), r"expected weights, stored_apart and source"),
    ("digest", lambda t: t["weights"].update({"model.safetensors": "0"}), r"altered since compact.json was written"),
    ("cuts", lambda t: t.update(cuts=[]), r"expected cuts, with a config or null"),
    ("sha256", cuts("numbers", []), r"the cuts are not those that were written"),
    ("class", cuts("class", "BertModel"), r"class: the cuts are of 'BertModel', and the model is GPT2LMHeadModel"),
    ("code", inside(lambda c: c["config"].update(architectures=["os.system"])), r'architectures names "os.system"'),
    ("type", inside(lambda c: c["config"].update(model_type="x")), r'compact.json: model_type "x" is not known'),
    ("remote", inside(lambda c: c["config"].update(auto_map={"AutoModel": "x.y"}, model_type="x")), r"Python code"),
    ("depth", inside(lambda c: c["config"].update(n_layer=10**9)), r"n_layer is 1000000000, but the weight files hold"),
    ("sizes", inside(lambda c: c["config"].update(n_embd=28)), r"kept: |numbers: |the weight files do not fit"),
    ("tensor", inside(lambda c: c["kept"].update({"x.weight": [None]})), r"GPT2LMHeadModel has no tensor 'x.weig"),
    ("dims", inside(lambda c: c["kept"].update({UP: [None]})), rf"kept: {UP} has 2 dimensions"),
    ("range", inside(lambda c: c["kept"].update({UP: [None, [[0, 10**12]]]})), r"runs \[first, end\) within 0 "),
    ("order", inside(lambda c: c["kept"].update({UP: [None, [[4, 6], [2, 3]]]})), r"dimension 1: expected ascending"),
    ("empty", inside(lambda c: c["kept"].update({UP: [None, []]})), r"expected ascending runs"),
    ("whole", inside(lambda c: c["kept"].pop(UP)), r"the weight files do not fit: .*c_fc.weight has shape"),
    ("number", inside(lambda c: c["numbers"][0].update(old=7)), r"numbers: .* is built with \d+ there instead of 7"),
    ("grown", inside(lambda c: c["numbers"][0].update(new=10**6)), r"expected old and new with 1 <= new <= old"),
    ("path", inside(lambda c: c["numbers"][0].update(path=["__class__", "x"])), r"numbers: .* built with None there"),
    ("no path", inside(lambda c: c["numbers"][0].update(path=[])), r"expected entries with a module and a path"),
    ("axes", cuts("axes", [{"name": 3}]), r"axes: expected entries with name, kind, size"),
    ("checked", cuts("checked", [3]), r"checked: expected words"),
    ("difference", cuts("difference", "0"), r"difference: expected a number"),
    ("list", cuts("numbers", {}), r"numbers: expected a list"),
    ("kept", cuts("kept", []), r"kept: expected an object"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compact") / "gpt2"
    save(uneven_gpt2(), path)
    return path


def copied(folder: Path, place: Path) -> Path:
    place.mkdir()
    for name in ("compact.json", "model.safetensors", "generation_config.json"):
        (place / name).write_bytes((folder / name).read_bytes())
    return place


@pytest.mark.parametrize(("what", "change", "words"), HOSTILE, ids=[what for what, _, _ in HOSTILE])
def test_altered_manifests_are_refused_by_name(
    folder: Path, tmp_path: Path, what: str, change, words: str
) -> None:
    place = copied(folder, tmp_path / "x")
    rewrite(place, change, what)
    with pytest.raises((InputError, UsageError), match=words) as caught:
        load(place)
    assert str(place) in str(caught.value)


def test_altered_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "x")
    tensors = load_file(place / "model.safetensors")
    name = next(iter(tensors))
    for change, words in (
        (
            lambda: {k: v for k, v in tensors.items() if k != name},
            rf"missing in the files: .*{name.split('.')[-1]}",
        ),
        (lambda: {**tensors, "strange": torch.ones(2)}, r"without a place in the model: strange"),
        (lambda: {**tensors, name: tensors[name][:-1].contiguous()}, rf"{name} has shape"),
        (
            lambda: {**tensors, name: tensors[name].int()},
            rf"{name} has type torch.int32 instead of torch.float32",
        ),
    ):
        content = change()
        content.pop("lm_head.weight", None)
        tied = json.dumps({"lm_head.weight": "transformer.wte.weight"})
        save_file(content, place / "model.safetensors", metadata={"tied": tied})
        rewrite(place, lambda text: text["weights"].update({"model.safetensors": _digest(place)}))
        with pytest.raises(InputError, match=words):
            load(place)
    (place / "model.safetensors").write_bytes(b"\x08" + b"\0" * 30)
    with pytest.raises(InputError, match=r"not a sound safetensors file"):
        load(place)
    (place / "compact.json").write_text("[" * 10_000)
    with pytest.raises(InputError, match=r"not readable as JSON"):
        load(place)


def _digest(place: Path) -> str:
    from secateur.manifest import sha256

    return sha256(place / "model.safetensors")


def test_the_manifest_of_checksums_is_compared(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "x")
    (place / "MANIFEST.sha256").write_bytes((folder / "MANIFEST.sha256").read_bytes())
    load(place)
    text = json.loads((place / "compact.json").read_text())
    text["source"] = {"name": "other"}
    (place / "compact.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"compact.json: is altered since the run wrote it"):
        load(place)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 60) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=20)
@given(data=st.data())
def test_any_change_of_the_cuts_is_the_same_model_or_an_error_in_words(folder: Path, data) -> None:
    """Some place of the file gets some other value: no crash, no hang, nothing but our errors."""
    text = json.loads((folder / "compact.json").read_text())
    owner: Any = text["cuts"]
    while True:
        keys = sorted(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        deeper = isinstance(owner[key], (dict, list)) and bool(owner[key]) and data.draw(st.integers(0, 4))
        if not deeper:
            break
        owner = owner[key]
    owner[key] = data.draw(plain)
    from secateur.compact import Compact, open_compact, read_compact

    sound = open_compact(folder)
    config = text["cuts"].get("config")
    if config is not None and not (isinstance(config, dict) and config):
        return
    from dataclasses import replace

    try:
        found = read_compact(Compact(replace(sound.checkpoint, config=config or {}), text["cuts"], (), {}))
    except SecateurError as error:
        assert str(folder) in str(error)  # noqa: PT017 - both ends are fine
    else:
        assert isinstance(found, nn.Module)
