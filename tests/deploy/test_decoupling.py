"""Layers with an index of their own into what they share: nothing changes, then each loses units of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.deploy.models import build, example
from torch import Tensor, nn
from typer.testing import CliRunner

from secateur import decouple_, decoupling, load, save, shrink, shrunk
from secateur.cli import app
from secateur.core.example import analysis_of
from secateur.core.taps import taps_of
from secateur.deploy.decoupling import entries_of, restore_
from secateur.errors import InputError, UsageError

pytest.importorskip("transformers")


def logits(model, inputs) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False)[0]


@cache
def decoupled(kind: str, *what: str):
    """A decoupled model, its inputs, and its axes."""
    model = build(kind, 2)
    inputs = example(model)
    before = logits(model, inputs)
    decouple_(model, decoupling(model, inputs, what), inputs)
    assert torch.equal(logits(model, inputs), before)
    return model, inputs, analysis_of(model, inputs)[0]


def lost(analysis, *kinds: str) -> dict[str, Tensor]:
    """Half of the units of these kinds, others on every axis."""
    draw = torch.Generator().manual_seed(0)
    return {
        u.name: torch.randperm(u.size, generator=draw)[: u.size // 2] for u in analysis.units if u.kind in kinds
    }


@pytest.mark.parametrize(
    ("kind", "what", "lose"),
    [
        ("llama", ("rope", "residual"), ("hidden", "KV group", "feed-forward unit")),
        pytest.param("gpt2", ("residual",), ("hidden", "head"), marks=pytest.mark.slow),
        pytest.param(
            "t5", ("bias", "residual"), ("hidden", "head", "feed-forward unit"), marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.thorough
def test_every_block_loses_its_own(kind: str, what: tuple[str, ...], lose: tuple[str, ...]) -> None:
    model, inputs, analysis = decoupled(kind, *what)
    keep = lost(analysis, *lose)
    assert len(keep) > len(lose)
    small = shrink(model, keep, inputs, analysis=analysis, fallback="refuse")
    assert shrunk(small).difference <= 1e-5
    assert shrunk(small).parameters[1] < 0.8 * shrunk(small).parameters[0]
    held = {name for name in model.state_dict() if ".decoupled." in name}
    assert held
    assert {name for name in small.state_dict() if ".decoupled." in name} == held
    widths = {len(kept) for name, kept in keep.items() if name.startswith("hidden")}
    assert all(small.state_dict()[name].numel() in widths for name in held if name.endswith("residual"))


@pytest.mark.thorough
def test_rotary_pairs_of_each_layer() -> None:
    """Llama's integer for the width of a head holds pairs and value dimensions alike, so both go together."""
    model, inputs, analysis = decoupled("llama", "rope", "residual")
    pairs = [u.name for u in analysis.units if u.kind == "rotary pair"]
    values = [u.name for u in analysis.units if u.kind == "v dimension"]
    assert len(pairs) == 2
    keep = {pairs[0]: [0, 2], pairs[1]: [1], values[0]: [0, 2, 3, 5], values[1]: [1, 4]}
    small = shrink(model, keep, inputs, analysis=analysis, fallback="refuse")
    assert shrunk(small).exact
    assert [layer.self_attn.head_dim for layer in small.model.layers] == [4, 2]
    assert small.model.layers[0].self_attn.decoupled.rope.tolist() == [0, 2, 3, 5]
    dense = copy.deepcopy(model)
    analysis.masks(keep).apply_(dense)
    assert torch.allclose(logits(dense, inputs), logits(small, inputs), atol=1e-5)


class Block(nn.Module):
    """A feed-forward block that adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stream(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.leave = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


@pytest.mark.thorough
def test_the_stream_keeps_what_a_block_does_not_read() -> None:
    """Against the same written out by hand: a block reads, normalises and writes its own dimensions alone."""
    torch.manual_seed(0)
    model, x = Stream().eval(), torch.randn(4, 5, 3)
    found = decoupling(model, x, ["residual"])
    assert str(found).endswith("0 MACs, before anything goes")
    assert (found.bytes_kept, found.bytes_moved) == (2 * 8 * 8, 2 * 4 * 5 * 8 * 4 * 5 // 4)
    decouple_(model, found, x)
    keep = {
        "hidden dimensions of blocks.0": [0, 1, 4, 6, 7],
        "hidden dimensions of blocks.1": [2, 3, 4],
        "feed-forward units of blocks.1.up,blocks.1.down": [0, 5, 9],
    }
    names = {u.name for u in analysis_of(model, x)[0].units}
    keep = {name: kept for name, kept in keep.items() if name in names}
    assert len([name for name in keep if name.startswith("hidden")]) == 2
    small = shrink(model, keep, x, fallback="refuse")
    h = model.enter(x)
    for at, block in enumerate(model.blocks):
        mine = torch.tensor(keep[f"hidden dimensions of blocks.{at}"])
        units = torch.tensor(keep.get(f"feed-forward units of blocks.{at}.up,blocks.{at}.down", range(12)))
        y = F.layer_norm(h[..., mine], (len(mine),), block.norm.weight[mine], block.norm.bias[mine])
        y = F.linear(y, block.up.weight[units][:, mine], block.up.bias[units]).relu()
        y = F.linear(y, block.down.weight[mine][:, units], block.down.bias[mine])
        h = h.index_add(-1, mine, y)
    torch.testing.assert_close(small(x), model.leave(h), rtol=1e-5, atol=1e-6)


FRESH = """
import sys, torch, secateur
inputs = torch.load(sys.argv[2], weights_only=True)
model = secateur.load(sys.argv[1])
model.set_attn_implementation("eager")
with torch.no_grad():
    torch.save(model(**inputs, use_cache=False)[0], sys.argv[3])
"""


@pytest.mark.slow  # tests/test_saving.py does it with a module of one's own
def test_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    model, inputs, analysis = decoupled("llama", "rope", "residual")
    small = shrink(model, lost(analysis, "KV group", "feed-forward unit"), inputs, analysis=analysis)
    assert save(small, tmp_path / "small") == "compact"
    with pytest.raises(UsageError, match=r"decoupled is in|decoupled is not built"):
        save(small, tmp_path / "plain", to="hf")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    words = [sys.executable, "-c", FRESH, *(str(tmp_path / n) for n in ("small", "inputs.pt", "out.pt"))]
    subprocess.run(words, check=True, capture_output=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.allclose(found, logits(small, inputs), atol=1e-6)


class Biased(nn.Module):
    """Two layers of attention with one table of biases, as T5 has it; the first layer hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(5)
        bias = self.table((steps[:, None] - steps).abs()).permute(2, 0, 1)
        for layer in self.layers:
            x, bias = layer(x, bias)
        return self.head(x)


class Attention(nn.Module):
    """Four heads of three."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 3
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:2], -1, self.width)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.mT + bias).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2)), bias


@pytest.mark.thorough
def test_heads_of_layers_that_share_a_bias(tmp_path: Path) -> None:
    """Each loses its own, and once more; what a layer hands on is the whole table; the masked model is the oracle."""
    torch.manual_seed(0)
    model, x = Biased().eval(), torch.randn(2, 5, 8)
    assert len([u for u in analysis_of(model, x)[0].units if u.kind == "head"]) == 1
    decouple_(model, decoupling(model, x, ["bias"]), x)
    analysis = analysis_of(model, x)[0]
    heads = [u.name for u in analysis.units if u.kind == "head"]
    assert len(heads) == 2
    keep = {heads[0]: [0, 2, 3], heads[1]: [1, 2]}
    small = shrink(model, keep, x, analysis=analysis, fallback="refuse")
    again = shrink(small, {heads[0]: [0, 2]}, x, fallback="refuse")
    assert again.layers[0].decoupled.bias.tolist() == [0, 3]
    analysis.masks({heads[0]: [0, 3], heads[1]: [1, 2]}).apply_(model)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    assert save(again, tmp_path / "small") == "compact"
    found = load(tmp_path / "small", Biased)
    assert taps_of(found) == taps_of(model)
    torch.testing.assert_close(found(x), again(x))


def test_what_cannot_be_decoupled_is_refused_by_name() -> None:
    bert = build("bert", 2)
    with pytest.raises(UsageError, match=r"'residual': no repeated block .*a norm behind the sum"):
        decoupling(bert, example(bert), ["residual"])
    with pytest.raises(UsageError, match=r"'rope': no table of angles"):
        decoupling(bert, example(bert), ["rope"])
    with pytest.raises(UsageError, match=r"decouple 'ropes'.*rope"):
        decoupling(bert, example(bert), ["ropes"])
    with pytest.raises(UsageError, match=r"decouple what\?"):
        decoupling(bert, example(bert), [])
    model, inputs, _ = decoupled("llama", "rope", "residual")
    with pytest.raises(UsageError, match=r"decoupled already"):
        decoupling(model, inputs, ["residual"])


def test_another_answer_undoes_it() -> None:
    torch.manual_seed(0)
    model, x = Stream().eval(), torch.randn(4, 5, 3)
    found = decoupling(model, x, ["residual"])
    calls = count()
    model.blocks[0].register_forward_hook(lambda *_: torch.full((4, 5, 8), float(next(calls))))
    names = list(model.state_dict())
    with pytest.raises(UsageError, match="computes something else, so it was left as it was"):
        decouple_(model, found, x)
    assert list(model.state_dict()) == names
    assert len(model.blocks[1]._forward_hooks) == len(model.blocks[1]._forward_pre_hooks) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"module": "nowhere"}, r"has no module 'nowhere'"),
        ({"size": 0}, r"no tap"),
        ({"name": "../x"}, r"no tap"),
        ({"leaf": []}, r"no tap"),
        ({"dim": "1"}, r"expected entries with"),
        ({"module": "blocks"}, r"runs what it holds"),
    ],
)
def test_entries_of_files_are_trusted_in_nothing(change, match: str) -> None:
    good = {"module": "blocks.0", "name": "residual", "leaf": ["x"], "dim": -1, "size": 8, "writes": True}
    model = Stream()
    restore_(model, [good])
    assert entries_of(taps_of(model)) == [good]
    with pytest.raises(InputError, match=match):
        restore_(Stream(), [{**good, **change}])
    with pytest.raises(InputError, match="expected a list"):
        restore_(Stream(), {})


@pytest.mark.thorough
def test_on_the_command_line(tmp_path: Path) -> None:
    build("llama", 2).save_pretrained(tmp_path / "model")
    (tmp_path / "data.py").write_text(
        "import torch\n\ndef batches():\n    g = torch.Generator().manual_seed(0)\n"
        "    return [{'input_ids': torch.randint(0, 50, (2, 9), generator=g)} for _ in range(2)]\n"
    )
    given = ["--data", f"{tmp_path / 'data.py'}:batches"]

    def run(*words: object):
        found = CliRunner().invoke(app, [str(word) for word in words])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert found.exit_code == 0, found.output
        return found.stdout

    words = ["inspect", tmp_path / "model", "--axes", "--decouple", "residual"]
    plain = json.loads(run(*words, "--json", *given))
    assert plain["decoupled"]["bytes of indices"] == 2 * 8 * 24
    assert "hidden dimensions of model.layers.1" in {axis["name"] for axis in plain["axes"]}
    with pytest.raises(UsageError, match="--decouple belongs to --axes"):
        run("inspect", tmp_path / "model", "--decouple", "rope")
    words = ["prune", tmp_path / "model", "--pattern", "hidden", "--method", "magnitude", "--sparsity", "0.5"]
    words += ["--decouple", "residual", *given, "--out", tmp_path / "out"]
    with pytest.raises(UsageError, match="give --shrink"):
        run(*words)
    assert "Decoupled residual: 2 indices of 384 bytes" in run(*words, "--shrink")
    small = load(tmp_path / "out")
    assert small.model.layers[0].decoupled.residual.numel() == 12
    assert small.model.embed_tokens.weight.shape[1] == 24
