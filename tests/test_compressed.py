"""Checkpoints in the sparse layouts of compressed-tensors: read exactly, and refused by name where altered."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur import model as models
from secateur.compressed import layout_of, read_compressed
from secateur.errors import InputError, UsageError
from secateur.pattern import NM

from .tiny import Secateur

LAYOUTS = ("sparse-bitmask", "sparse-24-bitmask")


def written(name, weight, layout, early=False):
    """A weight as compressed-tensors wrote it: bits by numpy, lowest first."""
    kept = weight != 0
    bits = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    prefix = f"{name}.weight" if early else name
    each = kept.sum(-1)
    parts = {f"{prefix}.bitmask": bits}
    if layout == "sparse-bitmask":
        parts |= {
            f"{prefix}.shape": torch.tensor(weight.shape),
            f"{prefix}.compressed": weight[kept],
            f"{prefix}.row_offsets": torch.cumsum(each, 0) - each,
        }
    else:
        parts |= {
            f"{prefix}.shape": torch.tensor(weight.shape).reshape(-1, 1),
            f"{prefix}.compressed": weight[kept].reshape(len(weight), -1),
        }
    return parts


def two_of_four(rows, columns):
    weight = torch.randn(rows, columns).view(rows, -1, 4)
    keep = torch.rand(weight.shape).topk(2, -1).indices
    return torch.zeros_like(weight).scatter(-1, keep, weight.gather(-1, keep)).view(rows, columns)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_exactly(tmp_path, layout, dtype, early):
    for rows, columns in ((5, 12), (3, 8), (1, 20)):
        weight = two_of_four(rows, columns) if layout == LAYOUTS[1] else torch.randn(rows, columns + 1).relu()
        weight = weight.to(dtype)
        save_file(
            written("a.b", weight, layout, early) | {"a.b.bias": torch.ones(3)}, tmp_path / "m.safetensors"
        )
        found = read_compressed([tmp_path / "m.safetensors"], layout)
        assert set(found) == {"a.b.weight", "a.b.bias"}
        assert torch.equal(found["a.b.weight"], weight)
        assert found["a.b.weight"].dtype == dtype


def test_parts_in_several_files(tmp_path):
    weight = torch.randn(5, 9).relu()
    parts = written("a", weight, LAYOUTS[0])
    files = []
    for number, (name, tensor) in enumerate(parts.items()):
        files.append(tmp_path / f"{number}.safetensors")
        save_file({name: tensor.contiguous()}, files[-1])
    assert torch.equal(read_compressed(files, LAYOUTS[0])["a.weight"], weight)


def altered(change):
    weight = torch.randn(5, 9).relu()
    weight[:, 0] = 1
    parts = written("a", weight, LAYOUTS[0])
    change(parts)
    return parts


def set_(name, change):
    return lambda parts: parts.__setitem__(f"a.{name}", change(parts[f"a.{name}"]))


def bit(bits):
    bits[0, 1] ^= 0x80
    return bits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("a.row_offsets"), "row_offsets is missing"),
        (lambda parts: parts.pop("a.compressed"), "compressed is missing"),
        (lambda parts: parts.__setitem__("a.weight", torch.ones(2)), "the weight is there twice"),
        (set_("compressed", lambda x: x[1:]), "bits are set, and there are"),
        (set_("compressed", lambda x: x.to(torch.int8)), r"values are torch\.int8, which is not read here"),
        (set_("bitmask", bit), "bits are set behind the last column"),
        (set_("bitmask", lambda x: x[1:]), "which is not that of shape"),
        (set_("shape", lambda x: x * 1_000_000_007), "which is not that of shape"),
        (set_("shape", lambda x: -x), "the shape is no list of positive whole numbers"),
        (set_("shape", lambda x: x.double()), "the shape is no list of positive whole numbers"),
        (set_("row_offsets", lambda x: x + 1), "row offsets disagree with the bits"),
        (set_("row_offsets", lambda x: x[:-1]), "there are 4 row offsets"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_by_name(tmp_path, change, words):
    save_file(altered(change), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=rf"a\.weight: .*{words}"):
        read_compressed([tmp_path / "m.safetensors"], LAYOUTS[0])


def test_two_of_four_must_be_two_of_four(tmp_path):
    weight = torch.randn(4, 8).relu() + torch.eye(4, 8)
    parts = written("a", weight, LAYOUTS[0])
    save_file(parts, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"a\.weight: not two of every four are kept"):
        read_compressed([tmp_path / "m.safetensors"], LAYOUTS[1])
    save_file({"b.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"says sparse-bitmask, but the weights hold no bitmask"):
        read_compressed([tmp_path / "m.safetensors"], LAYOUTS[0])


def test_the_layout_is_what_the_config_says():
    assert layout_of({}) is None
    assert layout_of({"quantization_config": {"sparsity_config": {"format": "dense"}}}) is None
    said = {"sparsity_config": {"format": "sparse-bitmask"}, "quant_method": "compressed-tensors"}
    assert (
        layout_of({"quantization_config": said}) == layout_of({"compression_config": said}) == "sparse-bitmask"
    )
    with pytest.raises(UsageError, match=r"sparse-bitmask\) and quantized"):
        layout_of({"quantization_config": said | {"config_groups": {"group_0": {}}}})


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_folder_loads_and_is_exported_plain(tmp_path, monkeypatch, capsys, layout):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, bos_token_id=0,
        eos_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    masks = secateur.prune_(model, recipe=secateur.Recipe(secateur.magnitude.score, pattern=NM(2, 4)))
    folder = tmp_path / "compressed"
    folder.mkdir()
    models.save(model, None, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in masks:
        tensors |= written(name.removesuffix(".weight"), tensors.pop(name), layout)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    sparse = {
        "format": layout,
        "global_sparsity": 0.5,
        "sparsity_structure": "2:4",
        "ignore": [],
        "targets": ["Linear"],
    }
    content["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparse}
    (folder / "config.json").write_text(json.dumps(content))
    for extra in folder.glob("*.json"):
        if "manifest" in extra.name.lower():
            extra.unlink()
    ids = torch.randint(0, 97, (2, 7))
    again = secateur.load(folder)
    assert torch.equal(again(ids).logits, model(ids).logits)
    run = Secateur(monkeypatch, capsys)
    assert run("export", folder, "--to", "hf", "--out", tmp_path / "plain", "--json").json["form"] == "hf"
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    run("export", folder, "--to", "sparse", "--out", tmp_path / "packed")
    packed = secateur.load(tmp_path / "packed", prefer="memory")
    assert torch.allclose(packed(ids).logits, model(ids).logits, atol=1e-4)
