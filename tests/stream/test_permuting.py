"""Channels put in order from file to file give bit by bit what permute_channels_, prune_ and saving give."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from secateur import recipes
from secateur.channels import permute_channels_
from secateur.core.masks import Masks
from secateur.errors import NumericError, ResourceError, UsageError
from secateur.model import load
from secateur.pattern import NM
from secateur.pretrained import quiet
from secateur.prune import prune_
from secateur.stream import permuting, prune_checkpoint
from secateur.verification import problems

from .conftest import padded_batches
from .support import contents, killed, refused

RIA = replace(recipes.ria, pattern=NM(2, 4))
RECIPES = {
    "ria": RIA,
    "magnitude": replace(recipes.magnitude, pattern=NM(1, 4)),
    "sparsegpt": replace(recipes.sparsegpt, pattern=NM(2, 4)),
}
OFTEN = {("ria", "llama")}


def as_in_memory(source, target, recipe) -> None:
    """Stream into `target`; everything must be that of load, permute_channels_, prune_, bit by bit."""
    before, data = contents(source), padded_batches()
    outcome = prune_checkpoint(source, target, None, recipe, data=data, permute=True)
    assert contents(source) == before
    assert problems(target) == []
    loaded = load(source)
    order = permute_channels_(loaded.model, recipe, data)
    assert len(order.kept) >= 2
    assert all(after >= before for before, after in order.kept.values())
    assert any(after > before for before, after in order.kept.values())
    masks = prune_(loaded.model, recipe=recipe, data=data)
    assert Masks.load(target / "run/masks.safetensors") == masks
    streamed = load(target).model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(streamed[name], tensor), name
    assert outcome.notes == (order.told.rstrip("."),)
    assert json.loads((target / "run/run.json").read_text())["notes"] == list(outcome.notes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in OFTEN else pytest.mark.thorough)
        for name in RECIPES
        for kind in ("llama", "gpt2", "opt", "qwen", "mixtral")
    ],
)
def test_as_in_memory(checkpoints, tmp_path, kind, name):
    as_in_memory(checkpoints(kind), tmp_path / "out", RECIPES[name])


@pytest.mark.thorough
def test_a_killed_run_goes_on_to_the_same_bytes(checkpoints, tmp_path):
    source, named = checkpoints("llama"), {"data": padded_batches(), "permute": True}
    prune_checkpoint(source, tmp_path / "whole", None, RIA, **named)
    for at in (6, 8, 9, 12, 15):
        out = tmp_path / f"out{at}"
        killed(at, source, out, None, RIA, **named)
        prune_checkpoint(source, out, None, RIA, **named, if_exists="resume")
        assert contents(out) == contents(tmp_path / "whole")


def test_a_resume_without_it_is_refused(checkpoints, tmp_path):
    source, named = checkpoints("llama"), {"data": padded_batches()}
    killed(8, source, tmp_path / "out", None, RIA, **named, permute=True)
    with pytest.raises(UsageError, match=r"cannot be continued: permute was True and is False now"):
        prune_checkpoint(source, tmp_path / "out", None, RIA, **named, if_exists="resume")


@pytest.fixture(scope="module")
def biased(checkpoints, tmp_path_factory):
    """A GPT-2 whose biases are no zeros, as those of a trained one."""
    folder = tmp_path_factory.mktemp("biased")
    model = load(checkpoints("gpt2")).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    with quiet():
        model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.mark.thorough
def test_biases_follow_their_rows_and_files_keep_their_layout(biased, tmp_path):
    as_in_memory(biased, tmp_path / "out", RECIPES["sparsegpt"])
    moved = set()
    for path in sorted(biased.glob("*.safetensors")):
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
        for name, tensor in before.items():
            if name.endswith("bias"):
                assert torch.equal(tensor.sort().values, after[name].sort().values)
                moved |= {name.partition("h.0.")[2]} if not torch.equal(tensor, after[name]) else set()
    assert {"attn.c_attn.bias", "mlp.c_fc.bias"} <= moved <= {"attn.c_attn.bias", "mlp.c_fc.bias", ""}


@pytest.mark.thorough
def test_what_cannot_be_put_in_order_is_told(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    refused(source, tmp_path, UsageError, r"for N:M, such as NM\(2, 4\); got Weights", 0.5, permute=True)
    words = "is no decoder of repeated blocks"
    refused(checkpoints("t5"), tmp_path, UsageError, words, None, RECIPES["magnitude"], permute=True)
    with monkeypatch.context() as patch:
        patch.setattr(permuting, "SCORE", 10**6)
        words = r"putting channels in order \(.*\) takes about .* Allow more, or leave it out"
        refused(
            source,
            tmp_path,
            ResourceError,
            words,
            None,
            RIA,
            data=padded_batches(),
            permute=True,
            memory="2 GB",
        )


def test_a_block_that_computes_something_else_stops_the_run(checkpoints, tmp_path, monkeypatch):
    def wrong(tensor, dim, indices, order):
        return tensor.flip(dim) if dim else tensor

    monkeypatch.setattr("secateur.channels.reordered", wrong)
    with pytest.raises(NumericError, match=r"block 0: the model computes something else"):
        prune_checkpoint(
            checkpoints("llama"), tmp_path / "out", None, RECIPES["magnitude"], only="*down_proj", permute=True
        )
    assert list(tmp_path.iterdir()) == []
