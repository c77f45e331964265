"""Folders that are damaged, hostile or not there are refused in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from secateur.errors import SecateurError, UsageError
from secateur.manifest import sha256, write_manifest
from secateur.model import load

from .loading import configure, make, refused, same


@pytest.fixture
def gpt2(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "gpt2", tmp_path / "gpt2"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"architectures": None},
            "config.json: no architectures, so the head is not known; for gpt2 known: GPT2For",
        ),
        ({"architectures": []}, "no architectures, so the head is not known"),
        (
            {"architectures": ["GPT2LMHead"]},
            'architectures names "GPT2LMHead"; for gpt2 nearest: GPT2LMHeadModel',
        ),
        ({"architectures": ["Trainer"]}, 'architectures names "Trainer"; for gpt2 known: GPT2'),
        ({"architectures": ["LlamaForCausalLM"]}, 'architectures names "LlamaForCausalLM"; for gpt2'),
        ({"model_type": "gtp2"}, 'model_type "gtp2" is not known; nearest: '),
        ({"model_type": None}, 'model_type "None" is not known'),
        ({"n_layer": 3}, "Tensors missing in the files, so random: transformer.h.2.attn.c_attn.bias, "),
        ({"n_layer": 1}, "Tensors without a place in the model: transformer.h.1.attn.c_attn.weight, "),
        (
            {"vocab_size": 301},
            "of another shape than the config says: transformer.wte.weight (300, 16) instead of (301, 16)",
        ),
        ({"tie_word_embeddings": False}, "Tensors missing in the files, so random: lm_head.weight."),
        (
            {"architectures": ["GPT2ForSequenceClassification"]},
            "Tensors missing in the files, so random: score.weight.",
        ),
        ({"n_head": 3}, "cannot be loaded as GPT2LMHeadModel (ValueError: "),
        ({"n_head": 0}, "cannot be loaded as GPT2LMHeadModel (ZeroDivisionError: "),
        ({"n_embd": "wide"}, "config.json: makes no gpt2 config ("),
        ({"n_layer": 10**9}, "config.json: n_layer is 1000000000, but the weight files hold 28 tensors"),
        ({"num_labels": 10**9}, "config.json: num_labels is 1000000000, but"),
        ({"n_layer": 1200}, "config.json: describes a model far larger than the weight files (28 tensors, "),
        ({"n_embd": 10**6}, "config.json: describes a model far larger than the weight files (28 tensors, "),
        ({"vocab_size": 10**12}, "config.json: describes a model far larger than the weight files"),
    ],
)
def test_a_config_that_does_not_fit_is_named(gpt2: Path, changes: dict[str, Any], reason: str) -> None:
    configure(gpt2, **changes)
    said = refused(gpt2)
    assert str(gpt2) in said
    assert reason in said
    assert "\n" not in said


def test_unexpected_tensors_can_be_dropped_when_the_user_says_so(gpt2: Path) -> None:
    configure(gpt2, n_layer=1)
    assert "and 6 more (drop_unexpected=True (--drop-unexpected) loads without them)" in refused(gpt2)
    model = load(gpt2, drop_unexpected=True).model
    expected = make("gpt2").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    configure(gpt2, n_layer=3)
    assert "missing in the files" in refused(gpt2, drop_unexpected=True)


def test_a_config_chooses_no_code(gpt2: Path) -> None:
    configure(gpt2, quantization_config={"quant_method": "gptq"})
    assert "the weights are quantized; prune the checkpoint from which" in refused(gpt2, UsageError)
    configure(
        gpt2,
        quantization_config=None,
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
        fusion_config={"all": True},
        transformers_weights="../other.safetensors",
        auto_map={"AutoModelForCausalLM": "evil.Model"},
    )
    model: Any = load(gpt2).model
    assert model.config._attn_implementation == "sdpa"
    assert same(model, make("gpt2"))
    configure(gpt2, model_type="unheard-of")
    assert "needs Python code from its folder; read that code" in refused(gpt2, UsageError)


@pytest.mark.parametrize(
    "content", ["{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}']
)
def test_a_broken_tokenizer_is_named(gpt2: Path, content: str) -> None:
    (gpt2 / "tokenizer.json").write_text(content)
    assert re.search(r"gpt2/tokenizer\.json: makes no tokenizer \(.+\)\.", refused(gpt2))


def mutations(content: str) -> st.SearchStrategy[str]:
    """The file with some of its values replaced by other JSON values."""
    values = st.sampled_from(
        ["null", "-1", "0", "1e400", "NaN", '""', '"x"', "[]", "{}", "true", "99999999999", "[[1]]"]
    )
    places = [found.span(1) for found in re.finditer(r": ?(\"[^\"]*\"|[\d.e-]+|null|true|false)", content)]

    def replaced(chosen: list[tuple[tuple[int, int], str]]) -> str:
        text = content
        for (first, last), value in sorted(dict(chosen).items(), reverse=True):
            text = text[:first] + value + text[last:]
        return text

    return st.lists(st.tuples(st.sampled_from(places), values), min_size=1, max_size=3).map(replaced)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]
)
@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.thorough
def test_mutated_files_load_or_give_one_line(
    data: st.DataObject, name: str, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    shutil.copytree(made / "gpt2", folder, dirs_exist_ok=True)
    (folder / name).write_text(data.draw(mutations((made / "gpt2" / name).read_text())))
    try:
        loaded = load(folder)
    except SecateurError as error:
        assert str(folder) in str(error)  # noqa: PT017 - either outcome is right
        assert "\n" not in str(error)  # noqa: PT017
        assert error.exit_code in (2, 3)  # noqa: PT017
    else:
        assert isinstance(loaded.model, nn.Module)


def test_files_altered_after_a_run_are_refused(gpt2: Path) -> None:
    write_manifest(gpt2)
    load(gpt2)
    with open(gpt2 / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert "model.safetensors: is altered since the run wrote it" in refused(gpt2)


def test_pickles_need_insistence(gpt2: Path) -> None:
    state = load_file(gpt2 / "model.safetensors")
    (gpt2 / "model.safetensors").unlink()
    torch.save(state, gpt2 / "pytorch_model.bin")
    assert "pytorch_model.bin: a pickle, which can run code when it is opened, is refused" in refused(gpt2)
    loaded = load(gpt2, allow_pickle=True)
    assert same(loaded.model, make("gpt2"))
    assert loaded.fingerprint == sha256(gpt2 / "pytorch_model.bin")
    (gpt2 / "pytorch_model.bin").write_bytes(b"\x80\x04}.")
    refused(gpt2, allow_pickle=True)


def test_names_that_lead_nowhere(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gpt2.parent)
    assert 'pt2": no such folder, and no Hugging Face name. Nearest there: gpt2.' in refused(
        "./pt2", UsageError
    )
    assert "Nearest there: gpt2." in refused(gpt2.parent / "gpt-2", UsageError)
    assert '"": no such folder' in refused("", UsageError)
    assert '"a/b/c": no such folder, and no Hugging Face name.' in refused("a/b/c", UsageError)
    said = refused("gpt2/model.safetensors", UsageError)
    assert said == (
        "gpt2/model.safetensors is a file; give its folder, or file.py:function@gpt2/model.safetensors for weights "
        "of your own."
    )
    said = refused("gpt-2", UsageError, offline=True)
    assert said.startswith('"gpt-2" is no folder here and not in the cache, and nothing is downloaded offline.')
    assert "seed -1 is not in" in refused("gpt2", UsageError, seed=-1)
