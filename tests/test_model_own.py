"""Models of the user's own code: called, filled, saved and loaded bit for bit; states and fingerprints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import UsageError
from secateur.folder import new_folder
from secateur.manifest import sha256
from secateur.model import Loaded, fingerprint, load, save

from .loading import refused, same, write_pickle

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
