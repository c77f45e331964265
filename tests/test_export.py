"""`secateur export`, and the verbs on what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import Masks, load, prune_, save
from secateur import model as models
from secateur.core.example import analysis_of
from secateur.folder import new_folder
from secateur.pattern import Channels, Heads, Neurons
from secateur.recipes import Recipe, magnitude

from .tiny import OWN, Folders, text

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "own.py"
    path.write_text(OWN)
    return path


def run_folder(spec: str, out: Path, example: Any, pattern: Any, share: float = 0.4) -> Path:
    """What `secateur prune` leaves of a model: zeros in the weights, and masks."""
    loaded = models.load(spec)
    masks = prune_(loaded.model, share, Recipe(magnitude.score, pattern=pattern), example=example)
    (out / "run").mkdir(parents=True)
    models.save(loaded.model, loaded.tokenizer, out, source=loaded.folder)
    masks.save(out / "run" / "masks.safetensors")
    return out


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 300, (2, 9))}


@pytest.fixture(scope="module")
def gpt2(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("runs") / "gpt2"
    return run_folder(str(folders["gpt2"]), out, tokens(), Heads() | Neurons())


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**tokens()).logits


@pytest.mark.thorough
def test_a_run_is_written_compact_and_all_verbs_read_it(secateur, gpt2: Path, tmp_path: Path) -> None:
    said = secateur("export", "--no-speed", gpt2, "--out", tmp_path / "small", "--json").json
    assert said["form"] == "compact"  # the config of GPT-2 cannot say fewer heads
    dense, small = (
        next(m["value"] for m in said["measurements"][n] if m["name"] == "parameters")
        for n in ("masked", "shrunk")
    )
    assert small < dense
    assert torch.allclose(logits(load(tmp_path / "small")), logits(load(gpt2)), atol=1e-4)
    found = json.loads((tmp_path / "small" / "run" / "export.json").read_text())
    assert found["difference"] < 1e-5
    assert {axis["kind"] for axis in found["axes"]} == {"head", "feed-forward unit"}
    card = (tmp_path / "small" / "README.md").read_text()
    assert "`secateur.load(folder)`" in card
    assert "heads of transformer.h.0.attn: " in card
    assert "every file is as it was written" in secateur("verify", tmp_path / "small").out
    rows = secateur("inspect", tmp_path / "small", "--json").json
    assert rows["parameters"] == small
    measured = secateur("evaluate", tmp_path / "small", "--max-tokens", 60, "--no-speed", "--json").json
    assert {m["name"]: m["value"] for m in measured["measurements"]}["parameters"] == small
    padded = secateur(
        "export", "--no-speed", tmp_path / "small", "--to", "padded", "--out", tmp_path / "padded", "--json"
    ).json
    assert padded["form"] == "padded"
    assert torch.allclose(logits(load(tmp_path / "padded")), logits(load(gpt2)), atol=1e-4)
    sparse = load(tmp_path / "small")
    prune_(sparse, 0.5)
    assert save(sparse, tmp_path / "sparse") == "compact"  # pruned further it stays one
    assert torch.equal(
        load(tmp_path / "sparse").transformer.h[0].mlp.c_fc.weight, sparse.transformer.h[0].mlp.c_fc.weight
    )
    path = tmp_path / "small" / "compact.json"
    text = json.loads(path.read_text())
    text["cuts"]["numbers"] = []
    path.write_text(json.dumps(text))
    said = secateur("verify", tmp_path / "small")
    assert said.code == 3
    assert "compact.json: altered" in said.out
    words = secateur.refused(3, "inspect", tmp_path / "small")
    assert "compact.json: the cuts are not those that were written (their SHA-256 differs)" in words


@pytest.mark.slow
def test_equal_widths_are_plain(secateur, folders, tmp_path: Path) -> None:
    run = run_folder(str(folders["llama"]), tmp_path / "run", tokens(), Neurons(homogeneous=True))
    said = secateur("export", "--no-speed", run, "--to", "hf", "--out", tmp_path / "small")
    assert said.code == 0, said.err
    assert "(plain)" in said.out
    width = json.loads((tmp_path / "small" / "config.json").read_text())["intermediate_size"]
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert found.model.layers[0].mlp.up_proj.weight.shape[0] == width < 64
    assert torch.allclose(logits(found), logits(load(run)), atol=1e-4)
    assert not (tmp_path / "small" / "compact.json").exists()


@pytest.mark.thorough
def test_layers_that_differ_are_padded_to_the_widest(secateur, folders, tmp_path: Path) -> None:
    llama = str(folders["llama"])
    loaded = models.load(llama)
    analysis, _ = analysis_of(loaded.model, tokens())
    names = [u.name for u in analysis.units if u.kind == "feed-forward unit"]
    masks = analysis.masks({names[0]: range(20), names[1]: range(30)})
    masks.apply_(loaded.model)
    (tmp_path / "run" / "run").mkdir(parents=True)
    models.save(loaded.model, loaded.tokenizer, tmp_path / "run")
    masks.save(tmp_path / "run" / "run" / "masks.safetensors")
    said = secateur("export", "--no-speed", tmp_path / "run", "--to", "padded", "--out", tmp_path / "a")
    assert "held as 30: equal widths were asked for" in said.out
    found = load(tmp_path / "a")
    assert [layer.mlp.up_proj.weight.shape[0] for layer in found.model.layers] == [30, 30]
    assert not found.model.layers[0].mlp.down_proj.weight[:, 20:].any()
    assert torch.allclose(logits(found), logits(loaded.model), atol=1e-4)


@pytest.mark.thorough
def test_a_network_of_ones_own(secateur, own_file: Path, tmp_path: Path) -> None:
    spec = f"{own_file}:cnn"
    loaded = models.load(spec)
    images = torch.randn(4, 1, 8, 8)
    masks = prune_(loaded.model, 0.4, Recipe(magnitude.score, pattern=Channels()), example=images)
    (tmp_path / "run" / "run").mkdir(parents=True)
    models.save(loaded.model, None, tmp_path / "run")
    masks.save(tmp_path / "run" / "run" / "masks.safetensors")
    given = f"{spec}@{tmp_path / 'run' / 'model.safetensors'}"
    words = secateur.refused(2, "export", given, "--out", tmp_path / "small")
    assert words.endswith(
        "the inputs of Sequential cannot be made up; give --data file.py:function with batches of them, or let the "
        "function return the model and example inputs"
    )
    said = secateur("export", "--no-speed", given, "--data", f"{own_file}:images", "--out", tmp_path / "small")
    assert said.code == 0, said.err
    small = load(tmp_path / "small", spec)
    assert small[0].out_channels < 8
    again = models.load(f"{spec}@{tmp_path / 'small' / 'model.safetensors'}")  # the file stands for its folder
    assert again.model[0].out_channels == small[0].out_channels
    assert again.weights == tmp_path / "small"
    verified = secateur("verify", tmp_path / "small").out
    assert verified.endswith(": every file is as it was written, and its parts belong together\n")
    assert torch.allclose(small(images), loaded.model(images), atol=1e-5)
    measured = secateur(
        "evaluate", f"{spec}@{tmp_path / 'small'}", "--labelled", f"{own_file}:images", "--no-speed"
    )
    assert measured.code == 0, measured.err
    assert f"{sum(p.numel() for p in small.parameters()):,}" in measured.out
    assert f"{(tmp_path / 'small' / 'model.safetensors').stat().st_size:,}" in measured.out
    assert secateur("verify", tmp_path / "small").code == 0
    assert "of your own code; say what builds it" in secateur.refused(2, "evaluate", tmp_path / "small")


def test_single_zeros_are_for_the_form_sparse(secateur, own_file: Path, tmp_path: Path) -> None:
    spec = f"{own_file}:cnn"
    loaded = models.load(spec)
    masks = prune_(loaded.model, 0.5)
    (tmp_path / "out" / "run").mkdir(parents=True)
    models.save(loaded.model, None, tmp_path / "out")
    masks.save(tmp_path / "out" / "run" / "masks.safetensors")
    given = (f"{spec}@{tmp_path / 'out'}", "--data", f"{own_file}:images", "--out", tmp_path / "small")
    words = secateur.refused(2, "export", *given)
    assert "are no whole units; nearest is unit" in words
    assert words.endswith("Single zeros are left out by --to sparse")
    assert models.load(spec).weights is None
    assert loaded.weights is None


@pytest.mark.parametrize("changed", ["run/metrics.json", "run/masks.safetensors", "model.safetensors"])
@pytest.mark.parametrize("to", ["sparse", "auto"])
def test_nothing_is_exported_of_a_run_that_was_altered(
    secateur, own_file: Path, tmp_path: Path, changed, to
) -> None:
    spec = f"{own_file}:cnn"
    loaded = models.load(spec)
    images = torch.randn(4, 1, 8, 8)
    masks = prune_(loaded.model, 0.4, Recipe(magnitude.score, pattern=Channels()), example=images)
    run = tmp_path / "run"
    with new_folder(run) as folder:
        (folder / "run").mkdir()
        models.save(loaded.model, None, folder)
        masks.save(folder / "run" / "masks.safetensors")
        (folder / "run" / "metrics.json").write_text("{}")
        (folder / "run" / "report.html").write_text("")
    (run / "run" / "report.html").unlink()  # taken away or added is no obstacle
    (run / "notes.txt").write_text("mine")
    given = f"{spec}@{run / 'model.safetensors'}"
    how = ("--data", f"{own_file}:images", "--no-speed") if to == "auto" else ()
    assert secateur("export", given, "--to", to, *how, "--out", tmp_path / "small").code == 0
    content = bytearray((run / changed).read_bytes())
    content[-1] ^= 1
    (run / changed).write_bytes(content)
    words = secateur.refused(3, "export", given, "--to", to, *how, "--out", tmp_path / "again")
    assert words == (
        f"{run / changed}: is altered since the run wrote it, says MANIFEST.sha256; restore it, or remove "
        "MANIFEST.sha256 to accept it."
    )
    assert not (tmp_path / "again").exists()


@pytest.mark.thorough
def test_what_cannot_be_exported_is_refused_by_name(secateur, folders, gpt2: Path, tmp_path: Path) -> None:
    words = secateur.refused(2, "export", folders["gpt2"], "--out", tmp_path / "a")
    assert "no run/masks.safetensors beside the weights, so nothing says which units go" in words
    assert "to='onnx' is not known" in secateur.refused(
        2, "export", gpt2, "--to", "onnx", "--out", tmp_path / "a"
    )
    assert "lie in each other" in secateur.refused(2, "export", gpt2, "--out", gpt2 / "small")
    words = secateur.refused(2, "export", gpt2, "--data", "text.txt", "--out", tmp_path / "a")
    assert "expected file.py:function that gives batches" in words
    loaded = models.load(str(folders["gpt2"]))
    masks = prune_(loaded.model, 0.5)
    (tmp_path / "run" / "run").mkdir(parents=True)
    models.save(loaded.model, loaded.tokenizer, tmp_path / "run")
    masks.save(tmp_path / "run" / "run" / "masks.safetensors")
    words = secateur.refused(2, "export", tmp_path / "run", "--out", tmp_path / "a")
    assert "are no whole units; nearest is unit" in words
    assert "transformer.h.0." in words
    assert not (tmp_path / "a").exists()
    assert isinstance(Masks.load(tmp_path / "run" / "run" / "masks.safetensors"), Masks)


@pytest.mark.thorough
def test_prune_writes_the_smaller_model_at_once(secateur, folders, tmp_path: Path) -> None:
    given = ("--pattern", "neurons", "--method", "magnitude", "--sparsity", 0.4, "--homogeneous", "--shrink")
    (tmp_path / "story.txt").write_text(text())
    judged = ("--evaluate", tmp_path / "story.txt", "--evaluate-tokens", 64)
    said = secateur("prune", folders["llama"], *given, *judged, "--out", tmp_path / "small", "--offline")
    assert said.code == 0, said.err
    assert f"written  {tmp_path / 'small'} (smaller, plain)" in said.out
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert found.model.layers[0].mlp.up_proj.weight.shape[0] < 64
    assert secateur("verify", tmp_path / "small").code == 0
    assert "# `llama`, smaller" in (tmp_path / "small" / "README.md").read_text()
    assert Masks.load(tmp_path / "small" / "run" / "masks-before.safetensors").zeros
    words = secateur.refused(
        2, "prune", folders["llama"], "--sparsity", 0.5, "--shrink", "--out", tmp_path / "b"
    )
    assert words.startswith("--shrink belongs to patterns of whole units")
