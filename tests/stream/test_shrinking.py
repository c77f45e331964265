"""shrink_checkpoint against shrinking in memory: the same numbers, plain or compact, file by file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.deploy.models import build, example

from secateur import load, shrink, shrink_checkpoint
from secateur.core.example import analysis_of
from secateur.errors import UsageError

pytest.importorskip("transformers")


def stored(kind: str, place: Path, **options) -> torch.nn.Module:
    model = build(kind, 2)
    model.save_pretrained(place, **options)
    return model


def logits(model) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(**example(model), use_cache=False).logits


@pytest.mark.thorough
def test_layers_that_differ_are_compact_and_ties_are_kept(tmp_path: Path) -> None:
    model = stored("gpt2", tmp_path / "big")
    inputs = example(model)
    analysis, _ = analysis_of(model, inputs)
    names = [u.name for u in analysis.units if u.kind in ("head", "feed-forward unit")]
    keep = {name: range(1 + at) for at, name in enumerate(names)}
    assert shrink_checkpoint(tmp_path / "big", keep, tmp_path / "small", shard="20 kB") == "compact"
    found = load(tmp_path / "small")
    found.set_attn_implementation("eager")
    assert found.lm_head.weight is found.transformer.wte.weight
    wanted = shrink(model, keep, inputs, analysis=analysis)
    assert torch.allclose(logits(found), logits(wanted), atol=1e-6)
    with pytest.raises(UsageError, match=r"no config of its class says these widths"):
        shrink_checkpoint(tmp_path / "big", keep, tmp_path / "plain", to="hf")
    assert not (tmp_path / "plain").exists()


@pytest.mark.thorough
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path) -> None:
    model = stored("llama", tmp_path / "big")
    analysis, _ = analysis_of(model, example(model))
    pairs = next(u for u in analysis.units if u.kind == "rotary pair")
    with pytest.raises(UsageError, match=r"^rotary pairs of .*: the modules cannot follow this axis"):
        shrink_checkpoint(tmp_path / "big", {pairs.name: [0]}, tmp_path / "small")
    with pytest.raises(UsageError, match=r"none of the \d+ prunable axes"):
        shrink_checkpoint(tmp_path / "big", {"heads": [0]}, tmp_path / "small")
    with pytest.raises(UsageError, match=r"the source with its zeros is that already"):
        shrink_checkpoint(tmp_path / "big", {}, tmp_path / "small", to="padded")
    stored("vit", tmp_path / "vit")
    with pytest.raises(UsageError, match=r"ViTForImageClassification: does not read tokens"):
        shrink_checkpoint(tmp_path / "vit", {}, tmp_path / "small")
    assert not (tmp_path / "small").exists()
