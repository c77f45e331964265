"""Blocks taken out: the same as blocks that hand on what they read, and loadable by a process that knows nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.core.depth import chosen, series
from secateur.deploy import drop_blocks, drop_blocks_
from secateur.deploy.depth import bypassed
from secateur.errors import UsageError
from secateur.pretrained import quiet

from .models import build, example

# what goes of each family, by running numbers or paths
GONE = {
    "gpt2": [1, 3],
    "llama": [0],
    "gemma3": [0, 2],  # leaves full attention only
    "deepseek": [1],  # one of the two dense ones in front
    "opt": [-1, -2],
    "bert": [2],
    "vit": [1, 2],
    "convnext": ["convnext.encoder.stages.1.layers.2", "convnext.encoder.stages.0.layers.1"],
    "t5": ["encoder.block.3", "decoder.block.1"],
    "bart": ["model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.3"],
    "mixtral": [1, 2],
}
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for name, family in json.loads(sys.argv[1]).items():
    model, info = getattr(transformers, family).from_pretrained(
        f"{name}", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    with torch.no_grad():
        save_file({"logits": model.eval()(**load_file(f"{name}/inputs.st")).logits}, f"{name}/answer.st")
assert "secateur" not in sys.modules
"""


def logits(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.slow
def test_a_fresh_process_with_stock_transformers_loads_every_family(tmp_path):
    """from_pretrained alone, none missing, none left over, the same numbers; all families in one process."""
    expected, families = {}, {}
    for kind, which in GONE.items():
        model = build(kind)
        given = example(model)
        with bypassed(model, chosen(model, which)):
            masked = logits(model, given)
        small = drop_blocks(model, which, example=given)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        expected[kind] = logits(small, given)
        assert torch.equal(expected[kind], masked), kind
        assert not torch.equal(expected[kind], logits(model, given)), kind  # comparing equals proves nothing
        with quiet():
            small.save_pretrained(tmp_path / kind)
        save_file(given, tmp_path / kind / "inputs.st")
        families[str(tmp_path / kind)] = type(model).__name__
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, json.dumps(families)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for kind, answer in expected.items():
        assert torch.equal(load_file(tmp_path / kind / "answer.st")["logits"], answer), kind


def test_numbers_and_config_follow():
    model = build("gemma3")
    small = drop_blocks(model, [0, 3])
    assert [block.self_attn.layer_idx for block in small.model.layers] == [0, 1]
    assert small.config.num_hidden_layers == 2
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.num_hidden_layers == 4 == len(model.model.layers)
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2, 3]


@pytest.mark.thorough
def test_the_stacks_of_an_encoder_decoder_are_counted_apart():
    small = drop_blocks(build("bart"), [0, 1], stack="decoder")
    assert (small.config.encoder_layers, small.config.decoder_layers) == (4, 2)
    small = drop_blocks(build("t5"), 1, stack="encoder")
    assert (small.config.num_layers, small.config.num_decoder_layers) == (3, 4)
    small = drop_blocks(build("t5"), 1, stack="decoder")
    assert (small.config.num_layers, small.config.num_decoder_layers) == (4, 3)


def test_generation_with_a_cache_agrees_with_generation_without():
    small = drop_blocks(build("gpt2"), [1])
    ids = example(small)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        small.generate(ids, use_cache=True, **options), small.generate(ids, use_cache=False, **options)
    )


def test_in_place_returns_the_model_and_keeps_the_blocks_themselves():
    model = build("llama")
    kept = [model.model.layers[i] for i in (0, 1, 3)]
    assert drop_blocks_(model, 2) is model
    assert list(model.model.layers) == kept


def test_what_the_config_cannot_say_is_refused_and_the_model_left_alone():
    model = build("t5")
    with pytest.raises(UsageError, match=r"without decoder\.block\.0 is nothing that its config can describe"):
        drop_blocks_(model, "decoder.block.0")
    assert len(model.decoder.block) == 4
    assert model.config.num_decoder_layers == 4


def test_numbers_that_are_baked_into_blocks_are_seen():
    """GPT-2's option divides attention by the number of its block: the next block would compute something else."""
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UsageError, match=r"transformer\.h\.1\.attn\.scaling is built as .* instead of"):
        drop_blocks_(model, 1)
    assert len(model.transformer.h) == model.config.n_layer == 4
    drop_blocks_(model, 3)  # nothing behind it changes its number


class Block(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.up, self.down, self.same = nn.Linear(width, 9), nn.Linear(9, out), width == out

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) + (x if self.same else 0)


class Net(nn.Module):
    """A model of one's own: a block that changes the width, no config."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Block(a, b) for a, b in ((4, 4), (4, 4), (4, 6), (6, 6))])

    def forward(self, x):
        for block in self.body:
            x = block(x)
        return x


def test_a_model_without_config_and_blocks_that_change_the_shape():
    model, x = Net(), torch.randn(5, 4)
    small = drop_blocks(model, 1, example=x)
    assert list(small.body._modules) == ["0", "1", "2"]
    with pytest.raises(UsageError, match=r"without body\.2 the model does not run .*changes the shape"):
        drop_blocks(model, 2, example=x)
    assert len(model.body) == 4
    model.weight = nn.Parameter(torch.ones(4))
    model.forward = lambda x: Net.forward(model, x) * model.weight[len(model.body) - 1] * len(model.body)
    with pytest.raises(
        UsageError, match=r"not that of a model in which they hand on what they read \(relative difference"
    ):
        drop_blocks_(model, 3, example=x)
    assert len(model.body) == 4


@pytest.mark.thorough
def test_words_for_what_is_not_there():
    model = build("bart")
    with pytest.raises(UsageError, match="an encoder and in a decoder; say which with stack="):
        drop_blocks(model, 0)
    with pytest.raises(UsageError, match="block 4 is not there; the blocks are 0 to 3"):
        drop_blocks(model, 4, stack="encoder")
    with pytest.raises(
        UsageError, match=r"'model\.encoder\.layer\.0' is none of the 8 blocks; nearest: model\.enc"
    ):
        drop_blocks(model, "model.encoder.layer.0")
    with pytest.raises(UsageError, match=r"model\.encoder\.layers: all 4 blocks would go; keep at least one"):
        drop_blocks_(model, range(4), stack="encoder")
    assert model.config.encoder_layers == 4
    assert [b.self_attn.layer_idx for b in model.model.decoder.layers] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="Linear has no repeated blocks"):
        drop_blocks(nn.Linear(3, 3), 0)
    assert [len(each.blocks) for each in series(model)] == [4, 4]
