"""Shrunk models saved, and loaded where nothing is known of how they were made; hostile files are refused by name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.deploy.models import build, example
from torch import nn

from secateur import decouple_, decoupling, drop_blocks, load, own, save, shrink, shrunk
from secateur.errors import InputError, UsageError

from .saved import WIDTHS, axes, kept, logits, shrunken, uneven_gpt2

OWN = '''
import torch
from torch import nn


class Net(nn.Module):
    """Convolutions, batch norms, a recurrent layer, tied weights, and tables that are in no state."""

    def __init__(self):
        super().__init__()
        self.width = 12
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 10, 3, padding=1, groups=2)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 10), persistent=False)
        self.mean = torch.tensor([0.1, 0.2, 0.3])
        self.up = nn.LSTM(10, 8, batch_first=True)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.norm(self.first(x - self.mean.view(1, 3, 1, 1))).relu().view(len(x), self.width, 8, 8)
        y = self.second(y).relu() * self.scale.view(1, -1, 1, 1)
        y, _ = self.up(y.flatten(2).transpose(1, 2))
        return self.head(self.two(self.one(y).relu()).mean(1))


def net():
    return Net()


def attention():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    layer.eval()
    return layer


class Block(nn.Module):
    """Adds to a stream."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Stream(nn.Module):
    """Blocks on a stream."""

    def __init__(self):
        super().__init__()
        self.enter, self.blocks, self.leave = nn.Linear(16, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 2)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def stream():
    return Stream().eval()


def picky():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    float(model[0].weight.detach().sum())  # looks at values: cannot be built on the meta device
    return model
'''

FRESH = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

root = sys.argv[1]

def compare(name, model):
    saved = load_file(f"{root}/{name}.safetensors")
    wanted = saved.pop("wanted")
    with torch.no_grad():
        found = model(saved["x"]) if "x" in saved else model(**saved, use_cache=False)["logits"]
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    assert found.shape == wanted.shape and gap <= 1e-5, (name, gap)

compare("hf", AutoModelForCausalLM.from_pretrained(f"{root}/hf"))
compare("padded", AutoModelForCausalLM.from_pretrained(f"{root}/padded"))
assert "secateur" not in sys.modules

import secateur

compare("compact", secateur.load(f"{root}/compact"))
for name in ("net", "attention", "stream"):
    compare(name, secateur.load(f"{root}/{name}", f"{root}/own.py:{name}"))
"""


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    """Layers that differ."""
    return uneven_gpt2()


@pytest.fixture(scope="module")
def equal() -> nn.Module:
    """Equal widths in all layers."""
    torch.manual_seed(0)
    return shrunken("gpt2", "feed-forward unit", seed=None)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def net(code: Path) -> nn.Module:
    torch.manual_seed(0)
    model = own.call(f"{code}:net").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    inputs = torch.randn(2, 3, 8, 8)
    analysis = axes(model, inputs)
    return shrink(model, kept(analysis), inputs, analysis=analysis)


@pytest.mark.thorough
def test_a_fresh_process_loads_every_form(tmp_path: Path, gpt2, equal, net, code: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    assert save(equal, tmp_path / "hf") == "hf"
    assert save(gpt2, tmp_path / "padded", to="padded") == "padded"
    assert save(gpt2, tmp_path / "compact") == "compact"
    assert save(net, tmp_path / "net") == "compact"
    torch.manual_seed(0)
    layer = own.call(f"{code}:attention")
    x = torch.randn(2, 5, 16)
    analysis = axes(layer, x)
    attention = shrink(layer, kept(analysis, "head", "feed-forward unit"), x, analysis=analysis)
    save(attention, tmp_path / "attention")
    stream = own.call(f"{code}:stream")
    decouple_(stream, decoupling(stream, x, ["residual"]), x)
    stream = shrink(stream, kept(axes(stream, x)), x)
    assert stream.blocks[0].decoupled.residual.tolist() != stream.blocks[1].decoupled.residual.tolist()
    save(stream, tmp_path / "stream")
    for name, model in {"hf": equal, "padded": gpt2, "compact": gpt2}.items():
        inputs = example(model)
        with torch.no_grad():
            save_file(
                {**inputs, "wanted": model(**inputs, use_cache=False)["logits"]},
                tmp_path / f"{name}.safetensors",
            )
    for name, model, x in (
        ("net", net, torch.randn(3, 3, 8, 8)),
        ("attention", attention, torch.randn(3, 5, 16)),
        ("stream", stream, torch.randn(3, 5, 16)),
    ):
        with torch.no_grad():
            save_file({"x": x, "wanted": model(x)}, tmp_path / f"{name}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = {
        name: sum(p.numel() for p in load(tmp_path / name).parameters()) for name in ("hf", "padded", "compact")
    }
    assert sizes["hf"] == shrunk(equal).parameters[1] < shrunk(equal).parameters[0]
    assert sizes["compact"] == shrunk(gpt2).parameters[1]
    assert sizes["padded"] == shrunk(gpt2).parameters[0]


def test_what_is_loaded_is_the_model_bit_for_bit(tmp_path: Path, gpt2, net, code: Path) -> None:
    save(gpt2, tmp_path / "a")
    found = load(tmp_path / "a")
    assert type(found) is type(gpt2)
    assert not found.training
    assert {k: (v.dtype, v.tolist()) for k, v in found.state_dict().items()} == {
        k: (v.dtype, v.tolist()) for k, v in gpt2.state_dict().items()
    }
    assert found.lm_head.weight is found.transformer.wte.weight
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(logits(found), logits(gpt2))
    assert str(shrunk(found)) == str(shrunk(gpt2))
    assert found.generation_config.to_dict() == gpt2.generation_config.to_dict()
    save(net, tmp_path / "b")
    again = load(tmp_path / "b", lambda: own.call(f"{code}:net"))
    assert again.two.weight is again.one.weight
    assert torch.equal(again.scale, net.scale)
    assert again.up._flat_weights[0] is again.up.weight_ih_l0
    assert (again.width, again.second.groups) == (net.width, net.second.groups)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), net.eval()(x))


@pytest.mark.slow
def test_a_loaded_model_shrinks_further_and_is_saved_again(tmp_path: Path, gpt2) -> None:
    save(gpt2, tmp_path / "a")
    first = load(tmp_path / "a")
    inputs = example(first)
    analysis = axes(first, inputs)
    name = next(u.name for u in analysis.units if u.kind == "feed-forward unit" and u.size > 3)
    second = shrink(first, {name: [0, 2]}, inputs, analysis=analysis)
    save(second, tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(second))
    assert len(shrunk(load(tmp_path / "b")).axes) == len(shrunk(gpt2).axes) + 1


@pytest.mark.slow
def test_blocks_dropped_first_and_training_between(tmp_path: Path) -> None:
    model = build("gpt2", 3)
    inputs = example(model)
    short = drop_blocks(model, 1, example=inputs)
    analysis = axes(short, inputs)
    small = shrink(short, kept(analysis, *WIDTHS), inputs, analysis=analysis)
    with torch.no_grad():
        small.transformer.h[0].mlp.c_fc.weight.add_(0.5)
    small = copy.deepcopy(small).to(torch.bfloat16)
    save(small, tmp_path / "a", source=None)
    found = load(tmp_path / "a")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(found), logits(small))
    assert {p.dtype for p in load(tmp_path / "a", dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.thorough
def test_rotary_tables_keep_their_numbers_and_their_type(tmp_path: Path) -> None:
    small = shrunken("llama", "rotary pair", "v dimension", seed=None, head_dim=8)
    assert small.model.rotary_emb.inv_freq.shape == (2,)
    assert save(small, tmp_path / "a") == "compact"  # no config says which pairs are left
    found = load(tmp_path / "a", dtype=torch.bfloat16)
    assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(found.model.rotary_emb.inv_freq, small.model.rotary_emb.inv_freq)
    assert torch.equal(logits(load(tmp_path / "a")), logits(small))
    with pytest.raises(
        UsageError, match=r"from_pretrained would build another model: .*(inv_freq|scaling|head_dim)"
    ):
        save(small, tmp_path / "b", to="hf")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "kinds", "field", "value"),
    [
        ("gpt2", ("feed-forward unit",), "n_inner", 48),
        slow("llama", WIDTHS, "num_key_value_heads", 1),
        slow("bert", ("feed-forward unit", "head", "hidden"), "num_attention_heads", 2),
        slow("t5", WIDTHS, "num_heads", 2),
        slow("convnext", ("channel", "hidden", "feed-forward unit"), "hidden_sizes", [4, 6]),
    ],
)  # fmt: skip
def test_a_config_is_found_where_one_can_say_the_widths(
    tmp_path: Path, equal, kind, kinds, field, value
) -> None:
    small = equal if kind == "gpt2" else shrunken(kind, *kinds, seed=None)
    before = small.config.to_dict()
    assert save(small, tmp_path / "a", to="hf") == "hf"
    assert json.loads((tmp_path / "a" / "config.json").read_text())[field] == value
    assert small.config.to_dict() == before
    from transformers import AutoModel

    parts = AutoModel.from_pretrained(tmp_path / "a")
    assert sum(p.numel() for p in parts.parameters()) <= shrunk(small).parameters[1]


def test_what_no_config_says_is_refused_by_name(tmp_path: Path, gpt2) -> None:
    with pytest.raises(UsageError) as caught:
        save(gpt2, tmp_path / "a", to="hf")
    words = str(caught.value)
    assert words.startswith("GPT2LMHeadModel: no config of its class says these widths")
    assert "transformer.h.0." in words
    assert 'to="compact"' in words
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match=r"to='pt' is not known; "):
        save(gpt2, tmp_path / "b", to="pt")
    with pytest.raises(UsageError, match=r"GPT2LMHeadModel: nothing was taken out of it by shrink"):
        save(build("gpt2", 2), tmp_path / "b", to="compact")


@pytest.mark.slow
def test_a_plain_checkpoint_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    small = shrunken("t5", "hidden", seed=None)  # scales its answer by a width that has to stay
    with pytest.raises(UsageError, match=r"the plain checkpoint computes something else \(relative difference"):
        save(small, tmp_path / "a", to="hf")
    assert save(small, tmp_path / "a") == "compact"
    with pytest.raises(UsageError, match=r"hidden dimensions of the model: mean over it, so that zeros"):
        save(small, tmp_path / "b", to="padded")


def test_a_model_that_was_changed_besides_is_refused_when_it_is_saved(tmp_path: Path, gpt2) -> None:
    other = copy.deepcopy(gpt2)
    other.transformer.h[0].mlp.act = nn.ReLU()
    with pytest.raises(
        UsageError, match=r"another model: transformer.h.0.mlp.act is built as \w+ instead of ReLU"
    ):
        save(other, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_own_modules_need_their_builder_and_the_right_one(tmp_path: Path, net, code: Path) -> None:
    save(net, tmp_path / "a")
    with pytest.raises(
        UsageError, match=r"holds a Net of your own code; say what builds it: secateur.load\(folder"
    ):
        load(tmp_path / "a")
    with pytest.raises(UsageError, match=r"build gave int; expected an nn.Module"):
        load(tmp_path / "a", lambda: 3)
    with pytest.raises(InputError, match=r"class: the cuts are of 'Net', and the model is Linear"):
        load(tmp_path / "a", lambda: nn.Linear(3, 3))
    with pytest.raises(UsageError, match=r"no such folder"):
        load(tmp_path / "none", lambda: nn.Linear(3, 3))
    with pytest.raises(UsageError, match=r"its whole size is known to your own code alone"):
        save(net, tmp_path / "b", to="padded")
    with pytest.raises(UsageError, match=r"Net: no model of transformers, so no config can describe it"):
        save(net, tmp_path / "b", to="hf")
    picky = own.call(f"{code}:picky")
    small = shrink(picky, {"feed-forward units of 0,2": [1, 2, 6]}, torch.randn(4, 5))
    save(small, tmp_path / "c")
    x = torch.randn(4, 5)
    assert torch.equal(load(tmp_path / "c", f"{code}:picky")(x), small.eval()(x))
    save(picky, tmp_path / "d")  # not shrunk: the same two functions
    assert torch.equal(load(tmp_path / "d", lambda: own.call(f"{code}:picky", seed=3))(x), picky.eval()(x))


def test_a_folder_without_a_config_needs_its_builder(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    assert save(model, tmp_path / "own") == "state"
    with pytest.raises(
        UsageError, match=r"own: no config\.json says what model .*: secateur\.load\(folder, build\), with"
    ):
        load(tmp_path / "own")
    assert torch.equal(load(tmp_path / "own", lambda: nn.Linear(3, 4)).weight, model.weight)
