"""`secateur depth`: what its folder holds, that stock transformers loads it, and every refusal."""

from __future__ import annotations

import json

import pytest
import yaml

from secateur.errors import UsageError
from secateur.folder import verify
from secateur.shorten import depth_request

from .tiny import text

pytest.importorskip("transformers")
pytest.importorskip("plotly")


def test_blocks_are_dropped_and_the_folder_loads(models, secateur, tmp_path):
    import transformers

    (tmp_path / "story.txt").write_text(text())
    out, data = tmp_path / "out", ("--data", tmp_path / "story.txt", "--samples", 4, "--context", 32)
    said = secateur("depth", models["gpt2"], "--drop", 1, *data, "--out", out, "--offline", "--json").json
    found = {name: {m["name"]: m["value"] for m in each} for name, each in said["measurements"].items()}
    assert found["short"]["parameters"] < found["dense"]["parameters"]
    assert {"perplexity", "kl_divergence", "latency", "speedup", "macs", "disk_bytes"} <= set(found["short"])
    assert found["short"]["disk_bytes"] < found["dense"]["disk_bytes"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.n_layer == len(model.transformer.h) == 1
    assert model.num_parameters() == found["short"]["parameters"]
    assert verify(out) == []
    assert yaml.safe_load((out / "run/recipe.yaml").read_text())["drop"] == 1
    done = json.loads((out / "run/run.json").read_text())["done"]
    assert done.startswith("1 of 2 blocks dropped by block-influence: transformer.h.")
    assert done.replace("_", "\\_") in (out / "README.md").read_text()


@pytest.mark.thorough
def test_blocks_are_merged(models, secateur, tmp_path):
    import transformers

    out = tmp_path / "out"
    said = secateur(
        "depth", models["llama"], "--merge", "compressed:2", "--align", "weights", "--out", out, "--offline"
    )
    assert said.code == 0, said.err
    assert len(transformers.AutoModelForCausalLM.from_pretrained(out).model.layers) == 1
    done = json.loads((out / "run/run.json").read_text())["done"]
    assert done == (
        "feed-forwards of every 2 blocks merged (compressed, neurons aligned by weights), 1 of 2 blocks left"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of --drop 2 .blocks to take out. and --merge compressed:2"),
        ({"drop": 1, "merge": "merged:2"}, "give one of --drop 2"),
        ({"drop": 0}, "drop: Input should be greater than or equal to 1, got 0"),
        ({"merge": "compress:2"}, "'compress:2' is no way to merge; expected compressed:2 or merged:2"),
        ({"drop": 1, "method": "influence"}, "'influence' is no score of blocks; nearest: block-influence"),
        ({"drop": 1, "align": "weights"}, "--align belongs to --merge"),
        ({"drop": 1, "sparsity": 0.5}, "sparsity is no setting; "),
    ],
)
def test_words_for_requests_that_make_no_sense(given, said):
    with pytest.raises(UsageError, match=said):
        depth_request({"model": "m", **given})


def test_nothing_is_written_on_a_refusal(models, secateur, tmp_path):
    out = tmp_path / "out"
    assert "of 2 at most 1 may go" in secateur.refused(
        2, "depth", models["gpt2"], "--drop", 2, "--method", "last", "--out", out, "--offline"
    )
    assert "--if-exists 'replace' is not known" in secateur.refused(
        2, "depth", models["gpt2"], "--drop", 1, "--out", out, "--if-exists", "replace"
    )
    assert not out.exists()
