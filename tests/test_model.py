"""A model is loaded whole or refused in one line, and what is saved loads again bit for bit."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.errors import InputError, UsageError
from secateur.folder import new_folder, verify
from secateur.manifest import sha256
from secateur.model import fingerprint, load, save

from .loading import configure, make, refused, same, tokenizer


@pytest.fixture
def gpt2(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "gpt2", tmp_path / "gpt2"))


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
