"""What a run needs is told before it starts, and it is about what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from secateur import recipes
from secateur.errors import ResourceError, UsageError
from secateur.stream import prune_checkpoint
from secateur.stream.job import prepare, read_source
from secateur.stream.memory import BASE, parse_memory

from .conftest import padded_batches
from .support import refused


def wide(folder, columns: int = 11008):
    """Headers of a Llama with a wide down projection; the file is a hole, for it is never read."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4,
        "intermediate_size": columns, "num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens": (64, 256), "lm_head": (64, 256), "model.norm": (256,)}
    block = {f"self_attn.{name}_proj": (256, 256) for name in "qkvo"}
    block |= {"mlp.gate_proj": (columns, 256), "mlp.up_proj": (columns, 256), "mlp.down_proj": (256, columns)}
    block |= {"input_layernorm": (256,), "post_attention_layernorm": (256,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in block.items()}
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(file.tell() + at)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_wide_second_moment_is_counted_and_refused(tmp_path):
    source = wide(tmp_path / "source")
    words = (
        r"the weight update of model.layers.0.mlp.down_proj.weight \(the second moment of its 11,008 inputs is "
        r'485 MB\) takes about 3.\d GB in all, and 2.0 GB are allowed. Allow more, or skip it with skip="model.layers.0'
    )
    named = {"data": padded_batches(), "memory": "2 GB"}
    refused(source, tmp_path, ResourceError, words, 0.5, recipes.sparsegpt, **named)
    needs = {}
    for name in ("magnitude", "wanda", "sparsegpt", "admm", "alps"):
        recipe = getattr(recipes, name)
        needs[name] = prepare(read_source(source), 0.5, recipe, data=padded_batches()).need.size
    assert BASE < needs["magnitude"] <= needs["wanda"] < 1e9
    assert needs["sparsegpt"] < needs["admm"] < needs["alps"]
    assert needs["sparsegpt"] - BASE > 5 * 4 * 11008**2
    own = replace(recipes.sparsegpt, update=lambda weight, choose, second_moment: (weight, choose()))
    assert prepare(read_source(source), 0.5, own, data=padded_batches()).need.size > needs["alps"]
    many = [{"input_ids": torch.zeros(1, 2048, dtype=torch.long)}] * 3
    more = prepare(read_source(source), 0.5, recipes.sparsegpt, data=many).need.size
    assert more - needs["sparsegpt"] > 2 * 4 * 6000 * 11008  # gate and up for all tokens at once
    assert prepare(read_source(source), 0.5, recipes.sparsegpt, data=many * 9).need.size < 1.5 * more


def test_memory_that_is_too_small_is_told_at_once(checkpoints, tmp_path):
    source = checkpoints("llama")
    words = "Python, torch and transformers alone take about 524 MB, and 100 MB are allowed"
    refused(source, tmp_path, ResourceError, words, 0.5, memory="100 MB")
    words = "scoring the 1,536 weights of model.layers.0.mlp.gate_proj.weight takes about 524 MB in all"
    refused(source, tmp_path, ResourceError, words, 0.5, memory=BASE)
    refused(source, tmp_path, UsageError, "expected an amount such as", 0.5, memory="much")
    prune_checkpoint(source, tmp_path / "out", 0.5, memory="1.5 GiB")


def test_masks_of_padded_data_are_counted(checkpoints, tmp_path, monkeypatch):
    source, data = checkpoints("llama"), padded_batches()
    monkeypatch.setattr("secateur.stream.memory.bytes_held", lambda calls: 1 << 30)
    words = r"attention masks of the calibration data take 1.1 GB of the 1.0 GB allowed. Give sequences without padding"
    refused(source, tmp_path, ResourceError, words, 0.5, recipes.wanda, data=data, memory="1 GB")


def test_amounts():
    assert [parse_memory(text) for text in ("16 GB", "1.5GiB", "900 mib", 7, "12", None)] == [
        16_000_000_000, 1_610_612_736, 943_718_400, 7, 12, None,
    ]  # fmt: skip
    for text in ("", "GB", "-1 GB", "1 XB", "0", 0, -5, "1 GB 2"):
        with pytest.raises(UsageError, match="expected an amount"):
            parse_memory(text)


CHILD = """
import re, sys, torch
torch.set_num_threads(1)
from secateur import recipes
from secateur.stream.job import prepare, prune_checkpoint, read_source
data = [{"input_ids": torch.randint(0, 64, (1, 256))} for _ in range(8)]
recipe = getattr(recipes, sys.argv[3])
print(prepare(read_source(sys.argv[1]), 0.5, recipe, data=data).need.size)
prune_checkpoint(sys.argv[1], sys.argv[2], 0.5, recipe, data=data)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "wanda_mended", "admm", "alps"])
def test_what_is_told_is_what_it_takes(tmp_path, name):
    source = wide(tmp_path / "source", 4096)
    call = [sys.executable, "-W", "ignore", "-c", CHILD, source, tmp_path / "out", name]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    told, took = map(int, done.stdout.split())
    assert 0.6 * told < took < 1.1 * told, (told, took)
