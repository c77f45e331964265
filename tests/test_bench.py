"""`secateur bench`: every model measured beside the packed one, bytes, and where it is slower."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur import peers, prune_
from secateur.bench import Bench
from secateur.deploy.sparse import choice, table
from secateur.measurement import Measurement, Spread

from .tiny import Secateur

EVEN, NOWHERE = "no difference seen", "nowhere seen to be slower than dense"
OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), torch.randn(3, 64)
"""


@pytest.fixture
def command(monkeypatch, capsys) -> Secateur:
    return Secateur(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(table.ENVIRONMENT, str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_measure", lambda *_: [[1.0, 0.5, 0.5, 0.5]] * 9)


@pytest.fixture
def net(tmp_path):
    """A module of one's own, pruned, in a file."""
    (tmp_path / "net.py").write_text(OWN)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    prune_(model, 0.8, only="all")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_a_module_of_ones_own_before_and_after_packing(net, command):
    spec = f"{net}/net.py:net@{net}/model.safetensors"
    options = ("--rounds", "2", "--batch", "5", "--json")
    said = command("bench", spec, "--threads", "1,2", *options).json
    names = {m["conditions"]["model"] for m in said["latency"]}
    assert {"packed", "dense"} <= names <= {"packed", "dense", "dense, oneDNN", "dense int8"}
    assert {(m["conditions"]["what"], m["conditions"]["threads"]) for m in said["latency"]} == {
        (f"batch {rows}", threads) for rows in (1, 5) for threads in (1, 2)
    }
    assert all(m["value"] > 0 and m["spread"]["repeats"] == 2 for m in said["latency"] + said["speedup"])
    over = [m for m in said["speedup"] if m["spread"]["high"] < 1]
    assert said["slower"] == [f"{m['conditions']['what']} over {m['conditions']['over']}" for m in over]
    even = [m for m in said["speedup"] if m["spread"]["low"] <= 1 <= m["spread"]["high"]]
    assert said["alike"] == [f"{m['conditions']['what']} over {m['conditions']['over']}" for m in even]
    memory = {m["conditions"]["model"]: m["value"] for m in said["sizes"] if m["name"] == "state_bytes"}
    assert memory["packed"] < 0.5 * memory["dense"]
    command("export", spec, "--to", "sparse", "--out", net / "packed")
    again = command("bench", f"{net}/net.py:net@{net}/packed", "--threads", "1", *options).json
    sizes = {m["name"]: m["value"] for m in again["sizes"] if m["conditions"].get("model") != "dense"}
    assert sizes["disk_bytes"] == (net / "packed" / "model.sparse.safetensors").stat().st_size
    shown = command("bench", spec, "--threads", "1", "--rounds", "2").out
    assert "batch 16, 1 thread, packed" in shown
    assert "slower than" in shown or "nowhere seen to be slower than dense" in shown


@pytest.mark.parametrize(
    ("ratio", "low", "high", "column", "last"),
    [
        (0.98, 0.95, 1.01, EVEN, f"{EVEN} from dense at batch 1 with 2 threads: 0.98 (0.95 to 1.01)\n{NOWHERE}"),
        (1.02, 1.0, 1.05, EVEN, f"{EVEN} from dense at batch 1 with 2 threads: 1.02 (1.00 to 1.05)\n{NOWHERE}"),
        (0.98, 0.96, 0.99, "0.98", "slower than dense at batch 1 with 2 threads: 0.98 (0.96 to 0.99)"),
        (1.5, 1.4, 1.6, "1.50", NOWHERE),
    ],
)  # fmt: skip
def test_a_difference_is_told_where_the_rounds_agree_on_it(
    command, monkeypatch, ratio, low, high, column, last
):
    said = {"what": "batch 1", "threads": 2}
    found = Bench(
        [Measurement("latency", 2.0, "ms", {**said, "model": name}, Spread(1.0, 3.0, "interquartile", 9))
         for name in ("packed", "dense")],
        [Measurement("speedup", ratio, "1", {**said, "over": "dense"}, Spread(low, high, "interquartile", 9))],
        [],
    )  # fmt: skip
    monkeypatch.setattr("secateur.bench.bench", lambda *_, **__: found)
    shown = command("bench", "folder").out
    lines = shown.splitlines()
    assert lines[1].rstrip().endswith("1 to 3")
    assert lines[2].endswith(f"1 to 3              {column}")
    assert shown.endswith(f"{lines[2]}\n{last}\n")


def test_a_language_model_also_decodes(tmp_path, command):
    transformers = pytest.importorskip("transformers")
    from secateur import model as models

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=64, n_head=4, vocab_size=211, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    masks = prune_(model, 0.7)
    (tmp_path / "pruned" / "run").mkdir(parents=True)
    masks.save(tmp_path / "pruned" / "run" / "masks.safetensors")
    models.save(model, None, tmp_path / "pruned")
    options = ("--rounds", "2", "--tokens", "3", "--threads", "1", "--json", "--outer", "int8")
    said = command("bench", tmp_path / "pruned", *options).json
    assert "decoding, a token" in {m["conditions"]["what"] for m in said["latency"]}
    assert "weights packed" in " ".join(said["notes"])
    (disk,) = [m for m in said["sizes"] if m["name"] == "disk_bytes"]  # masks are no weights
    assert disk["value"] == (tmp_path / "pruned" / "model.safetensors").stat().st_size
    assert disk["conditions"]["model"] == "dense"


@torch.no_grad()
def test_peers_compute_the_same(net):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(5, 64)
    for made, close in ((peers.prepared(model), 1e-5), (peers.dynamic_int8(model), 0.05)):
        assert made is not None or not torch.backends.mkldnn.is_available()
        if made is not None:
            assert float((made(x) - model(x)).abs().max()) < close


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threads", "two"), "--threads two: whole numbers are expected, as in --threads 1,2"),
        (("--prefer", "size"), "--prefer 'size' is not known; expected speed or memory"),
        (("--threads", "0"), "at least 1 row, 2 rounds, 0 tokens and 1 thread are measured"),
    ],
)
def test_mistakes_are_said(net, command, options, words):
    assert words in command.refused(2, "bench", f"{net}/net.py:net@{net}/model.safetensors", *options)


def test_a_model_without_zeros_is_nothing_to_pack(net, command):
    save_file(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).state_dict(), net / "full.safetensors"
    )
    said = command.refused(2, "bench", f"{net}/net.py:net@{net}/full.safetensors", "--threads", "1")
    assert "Prune first" in said
