from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import align
from secateur.align import Embeddings
from secateur.align.stored import FORMAT
from secateur.errors import InputError, ResourceError, UsageError

from .test_fits import cloud

ONE, TWO = Embeddings(cloud(30, 3), "pruned </script> 层"), Embeddings(cloud(30, 5, 1), "original")
MAPS = {
    "affine": align.ridge(ONE, TWO),
    "joint": align.cca(ONE, TWO),
    "concatenation": align.concatenate(ONE, TWO, weights=[1, 3], normalize="rms"),
    "bare": align.procrustes(ONE.values, TWO.values, scale=True),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_come_back_as_they_were(name, tmp_path):
    map = MAPS[name]
    path = align.save(map, tmp_path / "map.safetensors")
    found = align.load(path)
    assert type(found) is type(map)
    assert repr(found) == repr(map)
    given = (ONE, TWO) if name == "concatenation" else (ONE.values,) if name == "bare" else (ONE,)
    one, two = map(*given), found(*given)
    values = [each.values if isinstance(each, Embeddings) else each for each in (one, two)]
    assert torch.equal(*values)
    assert os.listdir(tmp_path) == ["map.safetensors"]
    first = path.read_bytes()
    assert align.save(found, path).read_bytes() == first


def altered(path, change):
    """The file with its header or tensors changed."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        told = json.loads(file.metadata()[FORMAT])
    tensors = load_file(path)
    change(told, tensors)
    save_file(tensors, path, metadata={FORMAT: json.dumps(told)})


CHANGES = {
    "kind": lambda told, tensors: told.update(kind="os.system"),
    "role": lambda told, tensors: told["parts"][0].update(role="other"),
    "parts": lambda told, tensors: told.update(parts=[]),
    "tensor": lambda told, tensors: tensors.pop("first.shift"),
    "more": lambda told, tensors: tensors.update(more=torch.zeros(1)),
    "type": lambda told, tensors: tensors.update({"first.shift": tensors["first.shift"].float()}),
    "shape": lambda told, tensors: tensors.update({"first.shift": torch.zeros(9).double()}),
    "nan": lambda told, tensors: tensors["first.matrix"].fill_(float("nan")),
    "settings": lambda told, tensors: told["parts"][0].update(settings={"a": [1]}),
    "space": lambda told, tensors: told["parts"][0].update(source=3),
    "correlations": lambda told, tensors: tensors.update(correlations=torch.zeros(1).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_altered_maps_are_refused(change, tmp_path):
    path = align.save(MAPS["joint"], tmp_path / "map.safetensors")
    altered(path, CHANGES[change])
    with pytest.raises(InputError, match="this map was altered or is damaged"):
        align.load(path)


def test_altered_concatenations_are_refused(tmp_path):
    path = align.save(MAPS["concatenation"], tmp_path / "map.safetensors")
    altered(path, lambda told, tensors: told.update(weights=[1.0]))
    with pytest.raises(InputError, match="its weights do not belong to its parts"):
        align.load(path)


def test_other_files_are_no_maps(tmp_path):
    with pytest.raises(InputError, match="not a readable map"):
        align.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(InputError, match="not a readable map"):
        align.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"not a map; expected the format secateur\.align\.v1"):
        align.load(tmp_path / "other.safetensors")


def test_maps_go_to_safetensors_in_a_folder_that_is_there(tmp_path, monkeypatch):
    for path in (tmp_path / "map.pt", tmp_path / "missing" / "map.safetensors"):
        with pytest.raises(
            UsageError, match=r"expected the name of a \.safetensors file in a folder that exists"
        ):
            align.save(MAPS["affine"], path)
    with pytest.raises(UsageError, match=r"str is no map of secateur\.align"):
        align.save("map", tmp_path / "map.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="the map could not be written"):
        align.save(MAPS["affine"], tmp_path / "map.safetensors")
    assert os.listdir(tmp_path) == []
