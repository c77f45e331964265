"""A folder of packed weights: written by the command line, run by `secateur.load`, altered files found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur import Recipe, prune_, score
from secateur import model as models
from secateur.deploy.sparse import choice, table
from secateur.deploy.sparse.modules import SparseConv2d, SparseLinear
from secateur.errors import InputError, UsageError
from secateur.folder import write_manifest
from secateur.packed_folder import FILE, load_packed
from secateur.pattern import Channels, Heads, Neurons

from .loading import tokenizer
from .tiny import Secateur


@pytest.fixture
def command(monkeypatch, capsys) -> Secateur:
    return Secateur(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of one's own, in which packed ways are always faster."""
    monkeypatch.setenv(table.ENVIRONMENT, str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_measure", lambda *_: [[1.0, 0.5, 0.5, 0.5]] * 9)


def build():
    """A module of one's own."""
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))


@pytest.fixture
def folder(tmp_path):
    """A tiny GPT-2, pruned, in a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=211, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    prune_(model, 0.7)
    (tmp_path / "pruned").mkdir()
    models.save(model, None, tmp_path / "pruned")
    return tmp_path / "pruned", model


def test_a_folder_whose_masks_were_altered_is_not_packed(folder, command, tmp_path):
    place, model = folder
    (place / "run").mkdir()
    prune_(model, 0.7).save(place / "run" / "masks.safetensors")
    write_manifest(place)
    prune_(model, 0.8).save(place / "run" / "masks.safetensors")
    words = command.refused(3, "export", place, "--to", "sparse", "--out", tmp_path / "packed")
    assert words.startswith(f"{place / 'run' / 'masks.safetensors'}: is altered since the run wrote it")
    assert not (tmp_path / "packed").exists()
    (place / "MANIFEST.sha256").unlink()
    assert command("export", place, "--to", "sparse", "--out", tmp_path / "packed").code == 0


@torch.no_grad()
def test_export_and_load(folder, command, tmp_path):
    place, model = folder
    said = command("export", place, "--to", "sparse", "--out", tmp_path / "packed", "--json").json
    assert said["form"] == "sparse"
    verified = command("verify", tmp_path / "packed").out
    assert verified == f"{tmp_path / 'packed'}: every file is as it was written; it holds no masks to compare\n"
    assert said["bytes"][1] < 0.8 * said["bytes"][0]
    again = secateur.load(tmp_path / "packed")
    ids = torch.randint(0, 211, (2, 9))
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert isinstance(again.transformer.h[0].mlp.c_fc, SparseLinear)
    refused = command.refused(2, "inspect", tmp_path / "packed")
    assert "secateur.load runs it, `secateur evaluate` and `secateur bench` measure it" in refused
    content = bytearray((tmp_path / "packed" / FILE).read_bytes())
    content[-70] ^= 1
    (tmp_path / "packed" / FILE).write_bytes(content)
    with pytest.raises(InputError, match="is altered since the run wrote it"):
        secateur.load(tmp_path / "packed")


def measured(said):
    return {m["name"]: m["value"] for m in said["measurements"]}


def test_quality_and_size_of_a_packed_folder(tmp_path, command):
    """Counts are those of the dense folder, quality that of the packed weights, bytes what they take."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=300, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model, reads = transformers.GPT2LMHeadModel(config).eval(), tmp_path / "lm"
    prune_(model, 0.7)
    reads.mkdir()
    models.save(model, tokenizer(), reads)
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60, encoding="utf-8")
    command("export", reads, "--to", "sparse", "--out", tmp_path / "same")
    command("export", reads, "--to", "sparse", "--kind", "int8", "--outer", "int8", "--out", tmp_path / "small")
    how = ("--data", text, "--context", "16", "--json")
    dense = measured(command("evaluate", reads, *how).json)
    same = measured(command("evaluate", tmp_path / "same", *how).json)
    small = measured(command("evaluate", tmp_path / "small", "--reference", reads, "--no-speed", *how).json)
    for name in ("parameters", "nonzeros", "macs", "effective_macs"):
        assert same[name] == dense[name]
    assert same["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert same["state_bytes"] < dense["state_bytes"]
    assert small["state_bytes"] < same["state_bytes"]
    assert small["disk_bytes"] == (tmp_path / "small" / FILE).stat().st_size
    assert small["perplexity"] == pytest.approx(dense["perplexity"], rel=0.05)
    assert small["perplexity"] != dense["perplexity"]
    assert 0 < small["kl_divergence"] < 0.05
    said = command.refused(2, "evaluate", tmp_path / "small", "--dtype", "float16")
    assert "packed weights stay in the type that they were packed in; leave --dtype out" in said
    said = command.refused(2, "evaluate", tmp_path / "small", "--device", "nowhere")
    assert 'device "nowhere" cannot be used here' in said
    turned = measured(command("evaluate", reads, "--reference", tmp_path / "small", "--no-speed", *how).json)
    assert turned["kl_divergence"] > 0


def test_a_packed_module_of_ones_own_is_measured_with_its_function(tmp_path, command):
    from secateur.deploy.sparse import save_sparse

    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(64, 48), nn.ReLU()), torch.ones(2, 64)\n",
        encoding="utf-8",
    )
    model = build()[:2]
    prune_(model, 0.6, only="all")
    (tmp_path / "run").mkdir()
    models.save(model, None, tmp_path / "run")
    given = f"{tmp_path / 'own.py'}:build@{tmp_path / 'run'}"
    assert command("export", given, "--to", "sparse", "--out", tmp_path / "whole").code == 0
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "\nmodel = secateur.load('THIS FOLDER', 'own.py:build')\n" in card
    (tmp_path / "packed").mkdir()
    save_sparse(model, tmp_path / "packed" / FILE)
    found = measured(command("evaluate", f"{tmp_path / 'own.py'}:build@{tmp_path / 'packed'}", "--json").json)
    assert found["parameters"] == 64 * 48 + 48
    assert found["nonzeros"] == sum(int((p != 0).sum()) for p in model.parameters())
    assert found["macs"] == 2 * 64 * 48
    assert found["latency"] > 0
    given = f"{tmp_path / 'own.py'}:build@{tmp_path / 'packed' / FILE}"  # the file stands for its folder
    assert measured(command("evaluate", given, "--json", "--no-speed").json)["nonzeros"] == found["nonzeros"]
    said = command.refused(2, "evaluate", tmp_path / "packed")
    assert "holds a model of your own code" in said


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3))
        self.head = nn.Linear(64, 70)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 70), persistent=False)
        self.register_buffer("same", self.scale, persistent=False)

    def forward(self, x):
        return self.head(self.body(x).relu().mean((2, 3))) * self.scale

def build():
    return Net(), torch.ones(2, 3, 9, 9)
"""


@torch.no_grad()
def test_a_module_of_ones_own_without_units_and_without_zeros(tmp_path, command):
    """Shrunk, then pruned, then packed: what was cut is said beside the packed weights."""
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    spec, x = f"{tmp_path / 'net.py'}:build", torch.randn(2, 3, 9, 9)
    whole = models.load(spec)
    masks = prune_(whole.model, 0.4, Recipe(score.l2, Channels()), example=x)
    small = secateur.shrink(whole.model, masks, x)
    prune_(small, 0.7, only="all")
    secateur.save(small, tmp_path / "small")
    assert (
        command("export", f"{spec}@{tmp_path / 'small'}", "--to", "sparse", "--out", tmp_path / "packed").code
        == 0
    )
    assert not (tmp_path / "packed" / "config.json").exists()
    again = secateur.load(tmp_path / "packed", spec, prefer="memory")
    assert isinstance(again.body[3], SparseConv2d)
    assert torch.allclose(again(x), small(x), atol=1e-5)
    dense = models.load(f"{spec}@{tmp_path / 'packed'}").model  # with ordinary weights, for every other verb
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in small.state_dict().items())
    assert torch.equal(dense.scale, small.scale)
    assert torch.equal(dense.same, small.scale)
    assert command("verify", tmp_path / "packed").code == 0
    found = measured(command("evaluate", f"{spec}@{tmp_path / 'packed'}", "--json", "--no-speed").json)
    assert found["parameters"] == sum(p.numel() for p in small.parameters())
    assert "say what builds it" in command.refused(2, "evaluate", tmp_path / "packed")
    content = bytearray((tmp_path / "packed" / FILE).read_bytes())
    content[-70] ^= 1
    (tmp_path / "packed" / FILE).write_bytes(content)
    assert "is altered since the run wrote it" in command.refused(
        3, "evaluate", f"{spec}@{tmp_path / 'packed'}"
    )


@torch.no_grad()
def test_a_language_model_without_heads_and_without_zeros(folder, command, tmp_path):
    _, model = folder
    ids = torch.randint(0, 211, (2, 9))
    masks = prune_(model, 0.4, Recipe(score.l2, Heads() | Neurons()), example={"input_ids": ids})
    small = secateur.shrink(model, masks, {"input_ids": ids})
    prune_(small, 0.7)
    assert secateur.save(small, tmp_path / "small") == "compact"
    assert command("export", tmp_path / "small", "--to", "sparse", "--out", tmp_path / "packed").code == 0
    again = secateur.load(tmp_path / "packed")
    assert isinstance(again.transformer.h[0].mlp.c_fc, SparseLinear)
    assert torch.allclose(again(ids).logits, small(ids).logits, atol=1e-5)
    assert command("verify", tmp_path / "packed").code == 0
    assert torch.allclose(models.load(tmp_path / "packed").model(ids).logits, small(ids).logits, atol=1e-5)


@torch.no_grad()
def test_a_module_of_ones_own_needs_what_builds_it(tmp_path):
    from secateur.deploy.sparse import save_sparse

    model = build()
    prune_(model, 0.6, only="all")
    save_sparse(model, tmp_path / FILE)
    with pytest.raises(UsageError, match="say what builds it"):
        secateur.load(tmp_path)
    x = torch.randn(3, 64)
    assert torch.allclose(load_packed(tmp_path, build)(x), model(x), atol=1e-5)
    assert torch.allclose(secateur.load(tmp_path, build)(x), model(x), atol=1e-5)


def test_options_of_the_form_belong_to_it(folder, command, tmp_path):
    said = command.refused(2, "export", folder[0], "--kind", "int8", "--out", tmp_path / "x")
    assert said == "--kind, --outer and --block belong to --to sparse"
    for text in ("4y4", "4x4x4", "x4"):
        said = command.refused(
            2, "export", folder[0], "--to", "sparse", "--block", text, "--out", tmp_path / "x"
        )
        assert said == f"--block '{text}' is no block; expected a number of rows, 1, 4 or 16, or 4x4"
    said = command.refused(2, "export", folder[0], "--to", "sparse", "--block", "8", "--out", tmp_path / "x")
    assert said.startswith("block is (8, 1); expected 1, 4, 16 rows, or (4, 4)")


@torch.no_grad()
def test_a_loaded_folder_is_as_fast_as_measured_or_as_small_as_can_be(folder, command, tmp_path, monkeypatch):
    place, model = folder
    command("export", place, "--to", "sparse", "--outer", "int8", "--out", tmp_path / "packed")
    monkeypatch.setattr(
        choice, "_measure", lambda like, *_: [[1.0, 0.5, 2.0, 2.0], *[[1.0, 2.0, 2.0, 2.0]] * 8]
    )
    ids = torch.randint(0, 211, (2, 9))
    quick = secateur.load(tmp_path / "packed")
    small = secateur.load(tmp_path / "packed", prefer="memory")
    layer = quick.transformer.h[0].mlp.c_fc
    assert isinstance(layer, SparseLinear)
    assert layer.ways == (0, *[3] * 8)
    assert torch.equal(layer.dense, model.transformer.h[0].mlp.c_fc.weight.t())
    assert small.transformer.h[0].mlp.c_fc.dense is None
    assert small.transformer.h[0].mlp.c_fc.ways == (0, *[0] * 8)
    off = (quick(ids).logits - small(ids).logits).abs().max()  # the head's inputs are rounded to 8 bits
    assert float(off) < 0.02
    choice._known.clear()
    table.place().unlink()
    monkeypatch.setattr(choice, "_measure", lambda *_: [[1.0, 2.0, 2.0, 2.0]] * 9)
    dense = secateur.load(tmp_path / "packed")
    assert not isinstance(dense.transformer.h[0].mlp.c_fc, SparseLinear)
    assert torch.equal(dense.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    assert isinstance(
        secateur.load(tmp_path / "packed", prefer="memory").transformer.h[0].mlp.c_fc, SparseLinear
    )
    with pytest.raises(UsageError, match="prefer is 'size'; expected speed or memory"):
        secateur.load(tmp_path / "packed", prefer="size")
