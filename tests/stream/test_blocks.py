"""Pruning with data from file to file gives bit by bit what loading, prune_ and saving give."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from secateur import recipes
from secateur.allocate import globally
from secateur.errors import InputError, NumericError, ResourceError, UsageError
from secateur.folder import verify
from secateur.pattern import NM
from secateur.recover import ALPS, IntoBias, SparseGPT
from secateur.stream import hidden, output, prune_checkpoint
from secateur.stream.journal import Journal
from secateur.verification import problems

from .conftest import WORDS, padded_batches
from .support import contents, killed, refused, same_as_in_memory, with_weight

QUICK_ALPS = replace(recipes.alps, update=ALPS(iterations=6))
RECIPES = {"wanda": recipes.wanda, "sparsegpt": recipes.sparsegpt, "alps": QUICK_ALPS}


OFTEN = {("wanda", "llama"), ("wanda", "mixtral"), ("alps", "gpt2"), ("alps", "mixtral")}
PAIRS = [
    pytest.param(name, kind, marks=[] if name == "sparsegpt" or (name, kind) in OFTEN else pytest.mark.slow)
    for name in RECIPES
    for kind in ("llama", "gpt2", "opt", "qwen", "mixtral")
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.thorough
def test_decoders_are_pruned_as_in_memory(checkpoints, tmp_path, kind, name):
    same_as_in_memory(checkpoints(kind), tmp_path / "out", 0.5, RECIPES[name], data=padded_batches())


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_bfloat16_is_pruned_as_in_memory(checkpoints, tmp_path, name):
    """Computed in float32 and rounded once when it is stored, in memory as here."""
    source = checkpoints("llama", torch.bfloat16)
    same_as_in_memory(source, tmp_path / "out", 0.5, RECIPES[name], data=padded_batches())


@pytest.mark.thorough
def test_other_points_of_the_axes(checkpoints, tmp_path):
    source, data = checkpoints("opt"), padded_batches()
    for number, (sparsity, recipe) in enumerate(
        [
            (0.4, replace(recipes.sparsegpt, allocate=globally)),  # counts need every layer's scores
            (None, replace(recipes.sparsegpt, pattern=NM(2, 4))),
            (0.5, replace(recipes.sparsegpt, score=recipes.random.score, update=IntoBias(SparseGPT()))),
        ]
    ):
        same_as_in_memory(source, tmp_path / f"{number}", sparsity, recipe, data=data)


@pytest.mark.thorough
def test_only_some_blocks_and_data_of_plain_tensors(checkpoints, tmp_path):
    ids = [torch.randint(3, WORDS, (2, 9), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    for number, recipe in enumerate((recipes.wanda, recipes.sparsegpt)):
        named = {"data": ids, "only": "*.1.*", "skip": "*down_proj"}
        same_as_in_memory(checkpoints("llama"), tmp_path / f"{number}", 0.5, recipe, **named)


@pytest.mark.thorough
def test_an_encoder_of_repeated_blocks(checkpoints, tmp_path):
    source, data = checkpoints("bert"), padded_batches()
    words = r"transform.dense.weight stands outside .* Skip it with skip=\"cls.predictions.transform.dense\""
    refused(source, tmp_path, UsageError, words, 0.5, recipes.wanda, data=data)
    for number, recipe in enumerate((recipes.wanda, recipes.sparsegpt)):
        named = {"data": data, "skip": "cls.predictions.transform.dense"}
        same_as_in_memory(source, tmp_path / f"{number}", 0.5, recipe, **named)


@pytest.mark.thorough
def test_what_is_no_stack_of_blocks_is_refused(checkpoints, tmp_path):
    data = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in padded_batches()]
    words = "T5ForConditionalGeneration is no decoder of repeated blocks.* Prune it in memory, or choose a recipe with"
    refused(checkpoints("t5"), tmp_path, UsageError, words, 0.5, recipes.wanda, data=data)
    prune_checkpoint(checkpoints("t5"), tmp_path / "t5", 0.5)  # without data any architecture will do
    words = "AlbertForMaskedLM does not simply hand hidden states from block to block"  # one block, three times
    named = {"data": padded_batches(), "only": "*ffn*"}
    refused(checkpoints("albert"), tmp_path, UsageError, words, 0.5, recipes.wanda, **named)
    words = "the calibration data do not fit LlamaForCausalLM"
    data = [{"pixel_values": torch.zeros(1, 3)}]
    refused(checkpoints("llama"), tmp_path, UsageError, words, 0.5, recipes.wanda, data=data)


def test_the_folder(checkpoints, tmp_path):
    prune_checkpoint(checkpoints("llama"), tmp_path / "out", 0.5, recipes.sparsegpt, data=padded_batches())
    assert verify(tmp_path / "out") == problems(tmp_path / "out") == []
    assert not (tmp_path / "out" / "run" / "state").exists()
    layers = json.loads((tmp_path / "out" / "run" / "layers.json").read_text())
    assert layers[0]["damping"] == 0.01
    assert layers[0]["pruned"] == 512
    assert layers[-1]["left out"]


class Events:
    """Counts whatever changes the disk and stops at the one asked for, before or after it happened."""

    def __init__(self, monkeypatch):
        self.left = 10**9
        for owner, name in ((Journal, "add"), (output, "_put"), (hidden.os, "replace"), (hidden.os, "fsync")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def call(*args, **named):
            self.happen()
            found = function(*args, **named)
            self.happen()
            return found

        return call

    def happen(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.thorough
def test_stopped_anywhere_and_resumed_gives_the_same_bytes(checkpoints, tmp_path, monkeypatch, name):
    """Each run gets a little further than the one before, and goes on where that one stopped."""
    arguments = checkpoints("gpt2"), tmp_path / "out", 0.5, RECIPES[name]
    data, stops = padded_batches(2), 0
    whole = prune_checkpoint(arguments[0], tmp_path / "whole", *arguments[2:], data=data)
    with monkeypatch.context() as patch:
        patch.setattr(output, "_INTERVAL", 1)
        events = Events(patch)
        while True:
            events.left = 14 + 26 * stops
            try:
                again = prune_checkpoint(*arguments, data=data, if_exists="resume")
                break
            except KeyboardInterrupt:
                stops += 1
                assert not arguments[1].exists()
    assert stops > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert again.pruned == whole.pruned


@pytest.mark.parametrize(("name", "at"), [("wanda", 6), ("sparsegpt", 6)])
@pytest.mark.thorough
def test_killed_and_resumed_gives_the_same_bytes(checkpoints, tmp_path, name, at):
    source, data = checkpoints("gpt2"), padded_batches(2)
    prune_checkpoint(source, tmp_path / "whole", 0.5, RECIPES[name], data=data)
    killed(at, source, tmp_path / "out", 0.5, RECIPES[name], data=data)
    journal = tmp_path / ".out.secateur-partial" / "run" / "state" / "journal.jsonl"
    assert "of block 0" in journal.read_text()
    assert "of block 1" not in journal.read_text()
    prune_checkpoint(source, tmp_path / "out", 0.5, RECIPES[name], data=data, if_exists="resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_run_is_not_continued_and_the_state_stays(checkpoints, tmp_path):
    source, data = checkpoints("gpt2"), padded_batches(2)
    given = {"sparsity": 0.5, "recipe": recipes.sparsegpt, "data": data, "if_exists": "resume"}
    killed(6, source, tmp_path / "out", **given)
    moved = [{**data[0], "input_ids": data[0]["input_ids"].roll(1)}, data[1]]
    for change, words in (
        ({"data": moved}, "cannot be continued: data was"),
        ({"recipe": QUICK_ALPS}, "recipe was"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"sparsity": 0.6}, "weights kept was"),
    ):
        with pytest.raises(UsageError, match=words):
            prune_checkpoint(source, tmp_path / "out", **{**given, **change})
    changed = shutil.copytree(source, tmp_path / "changed")
    with_weight(changed, "transformer.h.0.attn.c_attn.bias", lambda bias: bias + 1)
    with pytest.raises(UsageError, match=r"source is another one: model-\d+-of-\d+.safetensors changed"):
        prune_checkpoint(changed, tmp_path / "out", **given)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UsageError, match=f"threads was {threads} and is {threads + 1} now"):
            prune_checkpoint(source, tmp_path / "out", **given)
    finally:
        torch.set_num_threads(threads)
    state = tmp_path / ".out.secateur-partial" / "run" / "state"
    kept = (state / "update-hidden-1.bin").read_bytes()
    (state / "update-hidden-1.bin").write_bytes(kept[:-4])
    with pytest.raises(InputError, match=r"update-hidden-1.bin: missing or damaged.* overwrite"):
        prune_checkpoint(source, tmp_path / "out", **given)


@pytest.fixture
def broken(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("llama"), tmp_path / "broken")


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.thorough
def test_nan_and_inf_name_the_layer(broken, tmp_path, name):
    data = padded_batches()
    with_weight(broken, "model.layers.1.input_layernorm.weight", lambda norm: norm * float("nan"))
    words = "model.layers.1.self_attn.q_proj.weight: NaN or Inf among its input activations"
    assert not refused(broken, tmp_path, NumericError, words, 0.5, RECIPES[name], data=data).exists()
    with_weight(broken, "model.layers.1.input_layernorm.weight", torch.ones_like)
    with_weight(broken, LAYER, lambda weight: weight.index_fill(0, torch.tensor([3]), float("inf")))
    words = f"{LAYER}: NaN or Inf among its weights"
    assert not refused(broken, tmp_path, NumericError, words, 0.5, RECIPES[name], data=data).exists()


def test_damaged_shards_name_the_file(broken, tmp_path):
    data, path = padded_batches(), sorted(broken.glob("*.safetensors"))[2]
    whole = path.read_bytes()
    for change in (whole[:-10], whole[:30], b"\xff" * 8 + whole[8:]):
        path.write_bytes(change)
        refused(broken, tmp_path, InputError, path.name, 0.5, recipes.sparsegpt, data=data)
    with_weight(broken, LAYER, lambda weight: weight[:-1].clone(), {path: whole})
    words = rf"{LAYER} is stored with shape \(47, 32\) instead of \(48, 32\)"
    refused(broken, tmp_path, InputError, words, 0.5, recipes.sparsegpt, data=data)


def test_a_full_disk_keeps_the_state(checkpoints, tmp_path, monkeypatch):
    """While hidden states are written, which is where most is."""
    source, data = checkpoints("gpt2"), padded_batches(2)
    prune_checkpoint(source, tmp_path / "whole", 0.5, recipes.sparsegpt, data=data)
    with monkeypatch.context() as patch:
        synced, calls = hidden.os.fsync, []

        def full(number):
            calls.append(number)
            if len(calls) > 15:
                raise OSError(28, "No space left on device")
            synced(number)

        patch.setattr(hidden.os, "fsync", full)
        words = "no space left on the disk"
        partial = refused(source, tmp_path, ResourceError, words, 0.5, recipes.sparsegpt, data=data)
    assert partial.is_dir()
    assert not verify_passes(partial)
    prune_checkpoint(source, tmp_path / "out", 0.5, recipes.sparsegpt, data=data, if_exists="resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def verify_passes(folder) -> bool:
    try:
        return not verify(folder)
    except (UsageError, InputError):
        return False


def test_no_data(checkpoints, tmp_path):
    source = checkpoints("llama")
    words = "needs calibration data for second_moment"
    recipe = replace(recipes.sparsegpt, score=recipes.magnitude.score)
    refused(source, tmp_path, UsageError, words, 0.5, recipe)
    refused(source, tmp_path, UsageError, "data holds no batch", 0.5, recipe, data=iter(()))
    nothing = [{"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}]
    words = r"model.layers.0.self_attn.q_proj.weight: no calibration token reached this layer"
    for recipe in (recipes.wanda, recipes.sparsegpt):
        refused(source, tmp_path, UsageError, words, 0.5, recipe, data=nothing)
