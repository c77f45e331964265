"""A model is loaded whole or refused in one line, and what is saved loads again bit for bit."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import InputError, SecateurError, UsageError
from secateur.folder import new_folder, verify
from secateur.manifest import sha256, write_manifest
from secateur.model import Loaded, fingerprint, load, save

transformers = pytest.importorskip("transformers")

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 64,
}
T5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8, "vocab_size": 64}
MIXTRAL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "num_local_experts": 3,
    "vocab_size": 64,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate(sorted(letters), start=1)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def make(kind: str) -> nn.Module:
    torch.manual_seed(1)
    model = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
        ),
        "bert": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**BERT, num_labels=3)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small models in Hugging Face format; GPT-2 with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "bert", "t5", "mixtral"):
        (root / kind).mkdir()
        save(make(kind), tokenizer() if kind == "gpt2" else None, root / kind)
    return root


@pytest.fixture
def gpt2(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "gpt2", tmp_path / "gpt2"))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(spec: object, error: type[SecateurError] = InputError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(str(spec), **options)
    assert type(caught.value) is error
    return str(caught.value)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "mixtral"])
def test_a_folder_is_loaded_as_its_config_says(made: Path, kind: str) -> None:
    loaded = load(made / kind)
    assert type(loaded.model) is type(make(kind))
    assert same(loaded.model, make(kind))
    assert not any(module.training for module in loaded.model.modules())
    assert (loaded.kind, loaded.folder, loaded.spec) == ("transformers", made / kind, str(made / kind))
    digest = hashlib.sha256((made / kind / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.fingerprint == loaded.files["model.safetensors"] == digest
    assert loaded.files["config.json"] == sha256(made / kind / "config.json")
    assert (loaded.tokenizer is None) == (kind != "gpt2")
    assert loaded.stored_dtype == torch.float32


def test_tied_weights_are_tied_after_loading(made: Path) -> None:
    model: Any = load(made / "gpt2").model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(made / "gpt2" / "model.safetensors")


def test_the_type_is_float32_unless_said_otherwise(gpt2: Path) -> None:
    model = make("gpt2")
    save(model, None, gpt2, dtype="bfloat16")
    assert json.loads((gpt2 / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(gpt2 / "model.safetensors").values()} == {torch.bfloat16}
    assert same(model, make("gpt2"))  # saving in another type changes nothing
    assert model.config.dtype in (None, torch.float32)
    for asked, expected in [
        (None, "float32"),
        ("auto", "bfloat16"),
        ("float16", "float16"),
        (torch.float64, "float64"),
    ]:
        loaded = load(gpt2, dtype=asked)
        assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, expected)}
        assert loaded.stored_dtype == torch.bfloat16
    assert same(load(gpt2).model, make("gpt2").to(torch.bfloat16).float())
    assert 'dtype "flaot32" is not known; nearest: float32' in refused(gpt2, UsageError, dtype="flaot32")


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu"])
def test_a_device_that_is_not_there(gpt2: Path, device: str) -> None:
    assert f'device "{device}" cannot be used here (' in refused(gpt2, UsageError, device=device)


def test_loading_is_quiet_and_restores_every_setting(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    filters = list(warnings.filters)
    for level, bars in ((logging.INFO, True), (logging.WARNING, False)):
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (disable_progress_bars if bars else enable_progress_bars)()
        load(gpt2)
        save(make("gpt2"), None, gpt2)
        with pytest.raises(InputError):
            load(gpt2.parent / "gpt2" / "..", dtype="auto")
        assert logging.get_verbosity() == level
        assert logging.is_progress_bar_enabled() == bars
        assert are_progress_bars_disabled() == bars
    logging.enable_progress_bar()
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")


def test_a_local_folder_needs_no_network_and_no_generator(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    state = torch.get_rng_state()
    for offline in (True, False):
        load(gpt2, offline=offline)
    assert torch.equal(state, torch.get_rng_state())


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


def test_code_in_the_folder_runs_only_when_trusted(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = "from transformers import GPT2Config, GPT2LMHeadModel\n\n"
    source += "class Own(GPT2Config):\n    model_type = 'own'\n\n"
    (gpt2 / "code.py").write_text(source + "class OwnModel(GPT2LMHeadModel):\n    config_class = Own\n")
    mapping = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"}
    configure(gpt2, model_type="own", architectures=["OwnModel"], auto_map=mapping)
    assert "trust_remote_code=True (--trust-remote-code)" in refused(gpt2, UsageError)
    model = load(gpt2, trust_remote_code=True).model
    assert type(model).__name__ == "OwnModel"
    assert same(model, make("gpt2"))
    configure(gpt2, architectures=["OwnModle"])
    said = refused(gpt2, trust_remote_code=True)
    assert 'auto_map has no class "OwnModle"; nearest: OwnModel' in said


def test_a_folder_without_a_vocabulary_has_no_tokenizer(gpt2: Path) -> None:
    (gpt2 / "tokenizer.json").unlink()
    assert load(gpt2).tokenizer is None  # transformers would make one without words


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


def test_a_name_in_the_cache_needs_no_network(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "hub" / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    shutil.copytree(gpt2, cached / "snapshots" / "c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load("someone/small", offline=True)
    assert (loaded.spec, loaded.folder) == ("someone/small", cached / "snapshots" / "c0ffee")
    assert same(loaded.model, make("gpt2"))


STOCK = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
for path, name in zip(sys.argv[1::2], sys.argv[2::2]):
    model, report = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
assert "secateur" not in sys.modules
print(transformers.AutoTokenizer.from_pretrained(sys.argv[1]).encode("a b"))
"""


@pytest.mark.thorough
def test_what_is_saved_loads_in_a_fresh_process_with_stock_transformers(made: Path, tmp_path: Path) -> None:
    arguments, expected = [], []
    for kind in ("gpt2", "mixtral", "bert", "t5"):
        loaded = load(made / kind)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter[torch.rand_like(parameter) < 0.5] = 0
        with new_folder(tmp_path / kind) as folder:
            save(loaded.model, loaded.tokenizer, folder, source=loaded.folder)
        assert verify(tmp_path / kind) == []
        assert same(load(tmp_path / kind).model, loaded.model)
        if kind in ("gpt2", "mixtral"):  # a class costs the fresh process seconds
            arguments += [str(tmp_path / kind), type(loaded.model).__name__]
            expected.append(fingerprint(loaded.model))
    with new_folder(tmp_path / "half") as folder:
        save(make("gpt2"), tokenizer(), folder, dtype=torch.bfloat16)
    arguments += [str(tmp_path / "half"), "GPT2LMHeadModel"]
    expected.append(fingerprint(make("gpt2").to(torch.bfloat16)))
    command = [sys.executable, "-c", STOCK, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:3] == expected
    assert run.stdout.split("\n")[3] == str(load(made / "gpt2").tokenizer.encode("a b"))


def test_tokenizer_files_are_copied_as_they_are(gpt2: Path, tmp_path: Path) -> None:
    content = (gpt2 / "tokenizer.json").read_text().replace("\n", "\n ")
    (gpt2 / "tokenizer.json").write_text(content)
    (gpt2 / "generation_config.json").write_text(
        '{"temperature": 0.7, "do_sample": false}'
    )  # as published by some
    loaded = load(gpt2)
    save(loaded.model, loaded.tokenizer, tmp_path, source=loaded.folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (gpt2 / name).read_bytes()
    (tmp_path / "again").mkdir()
    save(loaded.model, loaded.tokenizer, tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.encode("a b") == loaded.tokenizer.encode("a b")


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()
        self.last = nn.Linear(4, 4, bias=False)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))

def build():
    return Net()

def untied():
    return Net(tied=False)

def wide():
    net = Net(tied=False)
    net.extra = nn.Linear(4, 4)
    net.last = nn.Linear(4, 5, bias=False)
    return net

def with_inputs():
    return Net(), (torch.rand(2, 4),)

def number():
    return 3

def lazy():
    return nn.LazyLinear(3)

def half():
    return Net().half()

def broken():
    raise ValueError("not\\ntoday")
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:"


def test_a_function_of_the_users_own(net: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    loaded = load(net + "build", seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert same(loaded.model, load(net + "build", seed=3).model)
    assert loaded.fingerprint == fingerprint(loaded.model) == load(net + "build", seed=3).fingerprint
    assert loaded.fingerprint != load(net + "build", seed=4).fingerprint
    assert (loaded.kind, loaded.tokenizer, loaded.folder, loaded.example) == ("python", None, None, None)
    assert loaded.files == {"net.py": sha256(tmp_path / "net.py")}
    assert not any(module.training for module in loaded.model.modules())
    example = load(net + "with_inputs", seed=3).example
    assert torch.equal(example[0], load(net + "with_inputs", seed=3).example[0])
    assert {p.dtype for p in load(net + "half").model.parameters()} == {torch.float16}  # what the function says
    assert {p.dtype for p in load(net + "half", dtype="float32").model.parameters()} == {torch.float32}
    with pytest.raises(AttributeError):
        loaded.seed = 3  # type: ignore[attr-defined]
    assert isinstance(loaded, Loaded)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("number", "net.py:number returned int; expected an nn.Module, or one with example inputs"),
        ("biuld", "net.py: biuld is not in it; nearest: build"),
        ("broken", "net.py:broken: this code of yours raised ValueError: not today\n  File "),
        ("lazy", "weight has no shape yet; run one forward pass before the model is returned"),
        ("build@nothing.safetensors", "nothing.safetensors: no such file."),
    ],
)
def test_functions_that_give_no_model(net: str, function: str, reason: str) -> None:
    assert reason in refused(net + function, UsageError)


@pytest.mark.parametrize("function", ["build", "untied"])
def test_a_python_model_is_saved_and_loaded_bit_for_bit(net: str, tmp_path: Path, function: str) -> None:
    model = load(net + function, seed=1).model
    model.first.weight.data[0] = torch.tensor([0.0, -0.0, 1e-45, torch.inf])  # type: ignore[union-attr, index]
    with new_folder(tmp_path / "out") as folder:
        save(model, None, folder)
    for spec in (
        f"{net}{function}@{tmp_path / 'out'}",
        f"{net}{function}@{tmp_path / 'out' / 'model.safetensors'}",
    ):
        loaded = load(spec, seed=2)
        assert fingerprint(loaded.model) == fingerprint(model)
        assert loaded.fingerprint == sha256(tmp_path / "out" / "model.safetensors")
        assert loaded.stored_dtype == torch.float32
        assert (loaded.model.last.weight is loaded.model.first.weight) == (function == "build")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("last.weight" in names) == (function == "untied")


def test_the_same_state_gives_the_same_file(net: str, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(load(net + "build").model, None, tmp_path / name)
        digests.add(sha256(tmp_path / name / "model.safetensors"))
    assert len(digests) == 1


def test_tied_values_come_back_where_the_model_is_no_longer_tied(net: str, tmp_path: Path) -> None:
    model = load(net + "build", seed=1).model
    save(model, None, tmp_path)
    loaded = load(f"{net}untied@{tmp_path}", seed=2).model
    assert torch.equal(loaded.last.weight, model.first.weight)  # type: ignore[arg-type, union-attr]
    save(load(net + "untied", seed=1).model, None, tmp_path)
    said = refused(f"{net}build@{tmp_path}")
    assert "first.weight and last.weight are one tensor in the model and differ in the file" in said


def test_weights_that_do_not_fit_are_named(net: str, tmp_path: Path) -> None:
    save(load(net + "untied").model, None, tmp_path)
    said = refused(f"{net}wide@{tmp_path}")
    assert said.startswith(
        f"{tmp_path / 'model.safetensors'} does not fit the model: missing in the file: extra.bias, extra"
    )
    assert "last.weight has shape (4, 4) instead of (5, 4)" in said
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"frist.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "unknown to the model: frist.weight (nearest: first.weight" in refused(f"{net}untied@{tmp_path}")
    save_file(state | {"first.bias": torch.ones(4, dtype=torch.float64)}, tmp_path / "model.safetensors")
    said = refused(f"{net}untied@{tmp_path}")
    assert "first.bias has type torch.float64, which does not fit in torch.float32 without loss" in said
    assert "a pickle, which can run code" in refused(f"{net}untied@{write_pickle(tmp_path, state)}")
    loaded = load(f"{net}untied@{write_pickle(tmp_path, state)}", allow_pickle=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())


def write_pickle(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


class Views(nn.Module):
    """Parameters that are parts of one memory, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.rand(6, 4)
        self.top, self.bottom = nn.Parameter(whole[:3]), nn.Parameter(whole[2:])
        self.turned = nn.Parameter(torch.rand(3, 5).t())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("also_empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("flag", torch.tensor([True, False]))


def test_views_empty_tensors_and_scalars_are_stored(tmp_path: Path) -> None:
    model, other = Views(), Views()
    save(model, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert fingerprint(model) != fingerprint(other)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            tensor.copy_(stored[name])
    assert fingerprint(model) == fingerprint(other)
    save(model, None, tmp_path, dtype="bfloat16")
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert kinds["scalar"] == kinds["top"] == torch.bfloat16
    assert kinds["flag"] == torch.bool
    assert model.top.dtype == torch.float32


class Extra(nn.Module):
    def get_extra_state(self) -> object:
        return {"a": 1}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Extra, "_extra_state in the model's state is dict; only tensors can be stored"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight is no dense tensor with values (torch.strided, meta)"),
        (lambda: nn.LazyLinear(2), "weight has no shape yet; run one forward pass"),
    ],
)
def test_states_that_are_no_plain_tensors(tmp_path: Path, build: Callable[[], nn.Module], reason: str) -> None:
    for action in (fingerprint, lambda model: save(model, None, tmp_path)):
        with pytest.raises(UsageError, match=re.escape(reason)):
            action(build())
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_sees_every_change() -> None:
    def digest(change: Callable[[nn.Linear], object] = lambda model: None) -> str:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        with torch.no_grad():
            change(model)
        return fingerprint(model)

    changes = [
        lambda model: model.weight[1, 2].mul_(1 + 2**-23),
        lambda model: model.bias.copy_(-model.bias),
        lambda model: model.bfloat16(),
        lambda model: setattr(model, "weight", nn.Parameter(model.weight.reshape(3, 2))),
        lambda model: setattr(model, "bias", None),
    ]
    digests = [digest(), *map(digest, changes)]  # type: ignore[arg-type]
    assert len(set(digests)) == len(digests)
    assert digest() == digest(lambda model: model.eval())


def test_without_transformers_the_extra_is_named(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'secateur[hf]'" in refused(gpt2, UsageError)


@pytest.mark.parametrize("name", ["model", "data", "checkpoint", "pretrained", "own", "documents"])
def test_heavy_packages_are_imported_inside_functions_only(name: str) -> None:
    source = Path(load.__code__.co_filename).with_name(f"{name}.py").read_text()
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    heavy = ("transformers", "huggingface_hub", "tokenizers", "pyarrow", "safetensors")
    assert not [module for module in imported if str(module).split(".")[0] in heavy]
    assert "secateur.errors" in imported


RESNET = """
import torch
from torch import nn
from torch.nn.functional import pad, relu

class Block(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.more = stride, outer - inner

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return relu(y + pad(short, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)))

class ResNet(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (inner, outer) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            first = Block(inner, outer, 1 if number == 1 else 2)
            setattr(self, f"layer{number}", nn.Sequential(first, *[Block(outer, outer, 1) for _ in range(depth - 1)]))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))

def resnet20():
    return ResNet(), torch.rand(1, 3, 32, 32)
"""


@pytest.mark.shared
def test_real_models(shared: Path, tmp_path: Path) -> None:
    story = load(shared / "models" / "stories260K")
    assert type(story.model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in story.model.parameters()) == 260_032
    assert story.tokenizer("Once upon a time")["input_ids"] == [403, 407, 261, 378]
    (tmp_path / "resnet.py").write_text(RESNET)
    resnet = load(f"{tmp_path / 'resnet.py'}:resnet20@{shared / 'models' / 'cifar10_resnet20_jpegft'}")
    with torch.no_grad():
        assert resnet.model(resnet.example).shape == (1, 10)
