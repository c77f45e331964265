"""The file of packed weights: small, exact, and refused with the tensor's name when it was altered."""

from __future__ import annotations

import copy
import json
import random
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import Blocks, magnitude, prune_
from secateur.deploy.sparse import load_sparse_, pack, save_sparse, sparsify_
from secateur.deploy.sparse.ops import sparse_linear
from secateur.deploy.sparse.store import named, read_sparse, sparse_header
from secateur.errors import InputError

from .test_kernels import matrix


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()


def pruned(sparsity=0.6):
    made = model()
    prune_(made, sparsity, only="all")
    return made


def test_a_model_comes_back_bit_for_bit(fast, tmp_path):
    made = pruned()
    path = tmp_path / "model.sparse.safetensors"
    save_sparse(made, path)
    again = load_sparse_(model(), path, dense=True)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in made.state_dict().items())
    whole = sum(tensor.nbytes for tensor in made.state_dict().values())
    assert path.stat().st_size < 0.5 * whole
    packed = load_sparse_(model(), path)
    x = torch.randn(2, 3, 8, 8)
    assert [type(m).__name__ for m in packed][:4:3] == ["SparseConv2d", "SparseLinear"]
    assert torch.allclose(packed(x), made(x), atol=1e-5)
    assert sparse_header(path) == {}
    assert sparse_header(tmp_path / "nothing") is None


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("block", [4, 16])
@torch.no_grad()
def test_a_model_in_blocks_is_stored_and_runs_in_them(fast, tmp_path, kind, block):
    made = model()
    prune_(made, 0.5, replace(magnitude, pattern=Blocks(block, 1)), only="3")
    expected, x = made, torch.randn(2, 3, 8, 8)
    made = copy.deepcopy(made)
    done = sparsify_(made, kind, only="3", block=block, measure=False)
    assert [(layer.kind, layer.block, layer.sparsity) for layer in done.layers] == [(kind, block, 0.5)]
    save_sparse(made, tmp_path / "m.safetensors")
    again = load_sparse_(model(), tmp_path / "m.safetensors")
    assert again[3].packed.block == block
    assert torch.equal(again(x), made(x))
    error = (again(x) - expected(x)).norm() / expected(x).norm()
    assert float(error) < (0.2 if kind == "int4" else 0.03)


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_what_sparsify_made_is_stored_as_it_is(fast, tmp_path, kind):
    made = pruned(0.7)
    sparsify_(made, kind, measure=False)
    save_sparse(made, tmp_path / "m.safetensors")
    again = load_sparse_(model(), tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), made(x))


def altered(tensors, **changes):
    return {**tensors, **{name.replace("__", ":"): value for name, value in changes.items()}}


def parts(weight, kind=None, **more):
    return named("w", pack(weight, kind, **more))


BASE = matrix(6, 100, 0.5)
NUMBERS = torch.tensor([1, 0, 0, 1, 6, 100])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (altered(parts(BASE), w__values=torch.zeros(3)), "stream of values has another length or type"),
        (altered(parts(BASE), w__mask=torch.zeros(6, 3, dtype=torch.int64)), "the mask has another shape"),
        (altered(parts(BASE), w__mask=torch.full((6, 2), -1)), "bits are set behind the last column"),
        (altered(parts(BASE), w__packed=NUMBERS[:5]), "no 6 whole numbers"),
        (altered(parts(BASE), w__packed=NUMBERS * 7), "version 7"),
        (altered(parts(BASE), w__packed=torch.tensor([1, 9, 0, 1, 6, 100])), "name no matrix"),
        (altered(parts(BASE), w__packed=torch.tensor([1, 0, 0, 1, 1 << 40, 100])), "name no matrix"),
        (altered(parts(BASE), w__packed=torch.tensor([1, 1, 0, 1, 6, 100])), "parts .* make no index"),
        (altered(parts(BASE), w__scale=torch.ones(6, 1)), "parts .* make no bitmask of float32"),
        (altered(parts(BASE), w__packed=torch.tensor([1, 0, 0, 1, 7, 100])), "the mask has another shape"),
        (altered(parts(BASE), w__negative=torch.zeros(6, 9, dtype=torch.int64)), "the signs of zeros"),
        (
            altered(parts(BASE, form="index"), w__counts=torch.full((6, 1), 300, dtype=torch.int16)),
            "the counts",
        ),
        (
            altered(parts(BASE, form="index"), w__index=torch.zeros(2, dtype=torch.uint8)),
            "the columns have another",
        ),
        (
            altered(
                parts(torch.ones(1, 3), form="index"), w__index=torch.tensor([0, 1, 200], dtype=torch.uint8)
            ),
            "columns are out of range",
        ),
        (
            altered(parts(torch.ones(1, 3), form="index"), w__index=torch.tensor([0, 2, 1], dtype=torch.uint8)),
            "out of order",
        ),
        (altered(parts(BASE, "int8"), w__scale=torch.zeros(6, 1)), "scales are not positive"),
        (altered(parts(BASE, "int8"), w__scale=torch.ones(6, 3)), "the scales have another shape"),
        (altered(parts(BASE, "int4"), w__codebook=torch.ones(16, dtype=torch.int8)), "the codebook"),
        (
            altered(parts(BASE, "int4", form="dense"), w__packed=torch.tensor([1, 2, 4, 1, 6, 100])),
            "name no matrix",
        ),
        (
            altered(parts(BASE, "int4", form="dense"), w__packed=torch.tensor([3, 2, 3, 1, 6, 100])),
            "name no matrix",
        ),
        (
            altered(parts(BASE, "int4", form="dense"), w__packed=torch.tensor([3, 2, 4, 1, 6, 130])),
            "another length",
        ),
        (
            altered(parts(BASE, "int4", form="dense"), w__mask=torch.zeros(6, 2, dtype=torch.int64)),
            "make no dense",
        ),
        (
            altered(parts(BASE, "int4", form="dense"), w__packed=torch.tensor([1, 4, 3, 1, 6, 100])),
            "name no matrix",
        ),
        (altered(parts(BASE), w__other=torch.ones(1)), "w:other belongs to no packed weight"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_by_name(fast, tmp_path, content, words):
    path = tmp_path / "m.safetensors"
    header = json.dumps({"format": "secateur.sparse.v1", "tied": {}})
    save_file(content, path, metadata={"secateur": header})
    with pytest.raises(InputError, match=words) as error:
        read_sparse(path)
    assert "w" in str(error.value)


def test_files_that_do_not_fit_are_refused(fast, tmp_path):
    path = tmp_path / "m.safetensors"
    save_sparse(pruned(), path)
    other = model()
    other[3] = nn.Linear(8 * 36, 65)
    with pytest.raises(InputError, match=r"3\.weight is 64 x 288 in the file, 65 x 288 in the model"):
        load_sparse_(other, path)
    with pytest.raises(InputError, match=r"missing in the file: 6\.weight"):
        load_sparse_(nn.Sequential(*model(), nn.Linear(10, 3, bias=False)), path)
    with pytest.raises(InputError, match="unknown to the model"):
        load_sparse_(model()[:5], path)
    (tmp_path / "other.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="no file of packed weights"):
        read_sparse(tmp_path / "other.safetensors")


def mutations(path, count):
    """Files with a few bytes changed, cut short, or with whole numbers of the header changed."""
    content, chance = path.read_bytes(), random.Random(0)
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(len(changed)) if chance.random() < 0.5 else chance.randrange(8 + length)
            changed[place] = chance.choice(
                (0, 255, chance.randrange(256), changed[place] ^ (1 << chance.randrange(8)))
            )
        if chance.random() < 0.1:
            del changed[chance.randrange(len(changed)) :]
        yield bytes(changed)


def survive(tmp_path, count):
    """Load every mutation; what is accepted is multiplied with, so that kernels meet it."""
    path, place = tmp_path / "m.safetensors", tmp_path / "mutated.safetensors"
    weights = {
        "a": (None, "bitmask", 1), "b": (None, "index", 1), "c": ("int8", "bitmask", 1), "d": ("int4", "bitmask", 1),
        "e": ("int8", "bitmask", 4), "f": ("int4", "bitmask", 16), "g": ("int8", "squares", (4, 4)),
        "h": ("int4", "dense", 1),
    }  # fmt: skip
    tensors = {
        name: tensor
        for each, (kind, form, block) in weights.items()
        for name, tensor in named(each, pack(matrix(7, 90, 0.7), kind, form=form, block=block)).items()
    }
    save_file(tensors, path, metadata={"secateur": json.dumps({"format": "secateur.sparse.v1", "tied": {}})})
    x, refused = {90: torch.randn(5, 90)}, 0
    for content in mutations(path, count):
        place.write_bytes(content)
        try:
            packed = read_sparse(place)[0]
        except InputError:
            refused += 1
            continue
        for each in packed.values():
            if each.rows * each.columns < 10_000:
                inputs = x.setdefault(each.columns, torch.randn(5, each.columns))
                sparse_linear(each, inputs), sparse_linear(each, inputs[:1]), each.dense()
    return refused


def test_altered_files_are_refused_or_harmless(fast, tmp_path):
    assert survive(tmp_path, 300) > 100


@pytest.mark.slow
def test_ten_thousand_altered_files(fast, tmp_path):
    assert survive(tmp_path, 10_000) > 3000


def test_tensors_of_a_file_are_plain(fast, tmp_path):
    save_sparse(pruned(), tmp_path / "m.safetensors")
    names = set(load_file(tmp_path / "m.safetensors"))
    assert {"3.weight:packed", "3.weight:values", "3.weight:mask", "3.bias"} <= names
