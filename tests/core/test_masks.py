"""Masks: counts, algebra, packing, applying, undoing, and every way a file can lie."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file
from torch import nn

from secateur.core.masks import Masks, undo_
from secateur.errors import InputError, UsageError

BITS = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), BITS, max_size=3))
def test_a_file_gives_back_the_same_masks(tmp_path_factory, arrays):
    masks = Masks({name: torch.from_numpy(bits) for name, bits in arrays.items()})
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    try:
        "".join(arrays).encode()
    except UnicodeEncodeError:
        return  # lone surrogates cannot be a parameter's name
    masks.save(path)
    assert Masks.load(path) == masks


def test_a_file_holds_one_bit_a_weight(tmp_path):
    Masks({"w": torch.ones(1000, 800, dtype=torch.bool)}).save(tmp_path / "m.safetensors")
    assert 100_000 <= (tmp_path / "m.safetensors").stat().st_size < 100_400


@given(BITS)
def test_counts_agree(bits):
    masks = Masks({"w": torch.from_numpy(bits)})
    assert masks.size == bits.size
    assert masks.nonzeros == np.count_nonzero(bits)
    assert masks.zeros + masks.nonzeros == masks.size
    assert masks.density == 1 - masks.sparsity


def test_algebra():
    a = Masks({"x": torch.tensor([True, True, False]), "y": torch.tensor([False])})
    b = Masks({"x": torch.tensor([True, False, False])})
    assert (a & b) == Masks({"x": torch.tensor([True, False, False]), "y": torch.tensor([False])})
    assert (a | b) == Masks({"x": torch.tensor([True, True, False])})
    assert a != b
    assert a != {"x": 1}
    assert repr(a) == "Masks(2 parameters, 2 of 4 pruned, sparsity 0.5000)"
    assert Masks({}).sparsity == 0.0


def test_zeros_are_positive_zeros():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[-3.0, -4.0]])
    Masks({"weight": torch.tensor([[False, True]])}).apply_(layer)
    assert layer.weight.tolist() == [[0.0, -4.0]]
    assert not torch.signbit(layer.weight)[0, 0]


def test_nothing_changes_unless_every_mask_fits():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = model[0].weight.clone()
    masks = Masks(
        {"0.weight": torch.zeros(2, 2, dtype=torch.bool), "2.weight": torch.zeros(2, 2, dtype=torch.bool)}
    )
    with pytest.raises(
        UsageError, match=r"no parameter 2\.weight; these masks belong to another model; nearest: "
    ):
        masks.apply_(model)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(UsageError, match=r"mask of 0\.weight: expected shape \(2, 2\), got \(3,\)"):
        Masks({"0.weight": torch.zeros(3, dtype=torch.bool)}).apply_(model)


def test_only_booleans():
    with pytest.raises(UsageError, match=r"mask of w: expected a boolean tensor, got torch\.float32"):
        Masks({"w": torch.ones(2)})


def test_undo_needs_the_originals():
    with pytest.raises(UsageError, match="prune with keep_originals=True"):
        undo_(nn.Linear(1, 1), Masks({"weight": torch.ones(1, 1, dtype=torch.bool)}))


def write(path, tensors, **header):
    save_file(tensors, str(path), metadata=header)
    return path


BYTE = np.array([0b1010_0000], np.uint8)
SHAPES = {"format": "secateur.masks.v1", "shapes": json.dumps({"w": [3]})}


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"w": BYTE}, {}, "not a mask file; expected format secateur.masks.v1, got None"),
        ({"w": BYTE}, SHAPES | {"shapes": "{"}, "list of shapes in the header is not readable"),
        ({"w": BYTE}, SHAPES | {"shapes": "[1]"}, "list of shapes in the header is not readable"),
        ({"w": BYTE}, SHAPES | {"shapes": '{"w": 3}'}, "list of shapes in the header is not readable"),
        ({"w": BYTE}, SHAPES | {"shapes": '{"v": [3]}'}, "do not belong to the masks in the file"),
        ({"w": BYTE}, SHAPES | {"shapes": '{"w": [-3]}'}, "do not belong to the masks in the file"),
        ({"w": BYTE}, SHAPES | {"shapes": '{"w": ["3"]}'}, "do not belong to the masks in the file"),
        ({"w": BYTE}, SHAPES | {"shapes": '{"w": [9]}'}, "mask w holds 1 bytes of uint8, its shape"),
        ({"w": BYTE}, SHAPES | {"shapes": '{"w": [2]}'}, "has bits set behind its last weight"),
        ({"w": BYTE.astype(np.int16)}, SHAPES, "bytes of int16"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, tensors, header, message):
    path = write(tmp_path / "m.safetensors", tensors, **header)
    with pytest.raises(InputError, match=message):
        Masks.load(path)


def test_a_file_that_tells_the_truth_is_read(tmp_path):
    path = write(tmp_path / "m.safetensors", {"w": BYTE}, **SHAPES)
    assert Masks.load(path)["w"].tolist() == [True, False, True]
    assert load_file(path)["w"].tolist() == [0b1010_0000]


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64])
def test_rubbish_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a readable mask file"):
        Masks.load(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="not a readable mask file"):
        Masks.load(tmp_path / "missing.safetensors")


def test_shuffled_masks_keep_as_many_of_each_and_other_ones():
    masks = Masks({"a": torch.rand(20, 30) > 0.8, "b": torch.rand(50) > 0.3})
    one, same, other = masks.shuffled(), masks.shuffled(0), masks.shuffled(1)
    assert one == same
    assert one != other
    assert one != masks
    for name, mask in masks.items():
        assert one[name].shape == mask.shape
        assert one[name].sum() == mask.sum()
    overlap = (one["a"] & masks["a"]).sum() / masks["a"].sum()
    assert 0.05 < overlap < 0.4  # about the density, 0.2
