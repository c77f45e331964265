"""A folder in Hugging Face format whose weights are integers alone: loaded as what they stand for, or refused."""

import copy
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur import model as models
from secateur import prune_, prune_checkpoint, quantize_, save_quantized
from secateur.checkpoint import INTEGERS, weight_file
from secateur.errors import InputError, UsageError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_head=2, n_layer=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, max_position_embeddings=32, rope_theta=5e5,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    prune_(model.eval(), 0.5)
    place = tmp_path_factory.mktemp(request.param)
    models.save(model, None, place)
    integers = copy.deepcopy(model)
    quantize_(integers, "int8", outer="int8")
    save_quantized(integers, place / INTEGERS)
    (place / "model.safetensors").unlink()
    return model, integers, place


def test_it_is_loaded_as_the_weights_that_the_integers_stand_for(folder):
    model, integers, place = folder
    again = secateur.load(place)
    assert type(again) is type(model)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, integers(ids).logits, rtol=1e-4, atol=1e-5)
    assert again.config.vocab_size == 96
    if model.config.tie_word_embeddings:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    for name, before in model.state_dict().items():
        assert not again.state_dict()[name][before == 0].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_its_type_is_as_asked(folder, dtype):
    loaded = models.load(str(folder[2]), dtype=dtype, offline=True)
    assert loaded.model.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert loaded.stored_dtype is None
    assert INTEGERS in loaded.files


def test_another_model_is_refused_by_name(folder, tmp_path):
    content = load_file(folder[2] / INTEGERS)
    for file in folder[2].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / INTEGERS).write_bytes((folder[2] / INTEGERS).read_bytes())
    with pytest.raises(InputError, match=r"quantized\.safetensors"):
        secateur.load(tmp_path)
    save_file(content, tmp_path / INTEGERS)  # without what the header says
    with pytest.raises(InputError):
        secateur.load(tmp_path)
    (tmp_path / INTEGERS).write_bytes((folder[2] / INTEGERS).read_bytes()[:-9])
    with pytest.raises(InputError, match="not a sound safetensors file"):
        secateur.load(tmp_path)


def test_integers_are_not_pruned_from_file_to_file(folder, tmp_path):
    with pytest.raises(UsageError, match="holds integers, which are not pruned from file to file"):
        prune_checkpoint(folder[2], tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_ordinary_weights_come_first(tmp_path):
    (tmp_path / INTEGERS).touch()
    assert weight_file(tmp_path).name == INTEGERS
    (tmp_path / "model.safetensors").touch()
    assert weight_file(tmp_path).name == "model.safetensors"
    assert weight_file(tmp_path / "model.safetensors").name == "model.safetensors"
