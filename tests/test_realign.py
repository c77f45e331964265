"""`secateur align`: from two models and texts to a folder, for sentence models and for models of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import align, embedding, realign
from secateur import model as models
from secateur.errors import InputError, UsageError
from secateur.folder import verify

from .tiny import tokenizer

transformers = pytest.importorskip("transformers")

OWN = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6))

def ends_in_tanh():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6), nn.Tanh())

def rows():
    return [(torch.randn(40, 12), torch.zeros(40)) for _ in range(5)]

def named():
    return [{"input": torch.randn(40, 12)} for _ in range(5)]

def images():
    return nn.Conv2d(1, 2, 3)

def pictures():
    return [torch.randn(3, 1, 8, 8)]
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    words = list("abcdefghijklmnopqr")
    lines = [
        " ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(3 + i % 9)) for i in range(90)
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def sentence_models(tmp_path_factory) -> tuple[Path, Path]:
    """An original of the sentence-transformers kind, and one whose weights were disturbed."""
    root = tmp_path_factory.mktemp("sentence")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    for name in ("original", "pruned"):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    pooling = root / "original" / "1_Pooling"
    pooling.mkdir()
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 24}
    (pooling / "config.json").write_text(json.dumps(flags))
    return root / "pruned", root / "original"


@pytest.mark.parametrize("pooling", embedding.POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_has_the_same_vector_in_any_company(sentence_models, pooling, side):
    loaded = models.load(sentence_models[1], offline=True)
    loaded.tokenizer.padding_side = side
    many = ["the cat sat on a mat", "rain", "the dog ran after it in the garden while rain fell"]
    together = embedding.encode(loaded.model, loaded.tokenizer, many, pooling=pooling)
    for text, row in zip(many, together, strict=True):
        ids = loaded.tokenizer(text, return_tensors="pt")
        hidden = loaded.model(**ids).last_hidden_state[0].detach()
        alone = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        if side == "right":  # with absolute positions, padding on the left moves the text
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
        assert row.shape == alone.shape
    alone = embedding.encode(loaded.model, loaded.tokenizer, many[:1], pooling=pooling, context=2)
    assert not torch.allclose(alone[0], together[0], atol=1e-3)


def test_what_cannot_be_embedded(sentence_models):
    loaded = models.load(sentence_models[1], offline=True)
    with pytest.raises(UsageError, match="pooling 'meen' is not known; nearest: mean"):
        embedding.encode(loaded.model, loaded.tokenizer, ["a"], pooling="meen")
    with pytest.raises(UsageError, match="embedding needs texts, a tokenizer"):
        embedding.encode(loaded.model, None, ["a"])
    with pytest.raises(UsageError, match="embedding needs texts"):
        embedding.encode(loaded.model, loaded.tokenizer, [])
    config = loaded.model.config
    headed = transformers.BertForSequenceClassification(config)
    with pytest.raises(UsageError, match="gives no last_hidden_state, so it is no embedding model"):
        embedding.encode(headed, loaded.tokenizer, ["a"])
    with pytest.raises(UsageError, match=r"expected one vector an example .* got \(3, 2, 6, 6\)"):
        embedding.encode_batches(nn.Conv2d(1, 2, 3), [torch.randn(3, 1, 8, 8)], label="", tell=lambda *_: None)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ],
)
def test_the_pooling_of_a_folder(tmp_path, config, found):
    assert embedding.pooling_of(tmp_path) is None
    assert embedding.pooling_of(None) is None
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps(config))
    assert embedding.pooling_of(tmp_path) == found
    for odd in ({"pooling_mode": "max"}, {"pooling_mode_max_tokens": True}, {}, {"pooling_mode": ["mean"]}):
        file.write_text(json.dumps(odd))
        with pytest.raises(UsageError, match="is not one of mean, cls, last; say which with --pooling"):
            embedding.pooling_of(tmp_path)
    file.write_text("[")
    with pytest.raises(InputError):
        embedding.pooling_of(tmp_path)


def test_sentence_models_on_the_command_line(secateur, sentence_models, texts, tmp_path):
    pruned, original = sentence_models
    out = tmp_path / "out"
    said = secateur(
        "align", pruned, original, "--data", texts, "--out", out, "--neighbours", 3, "--json", "--offline"
    )
    assert said.code == 0, said
    told = json.loads((out / "run" / "align.json").read_text())
    assert said.json["advice"] == told["advice"]
    assert set(said.json["measurements"]) == {"no map", "map", "new index"}
    assert told["map"]["stored"] == "the module 3_Dense of sentence-transformers"
    assert verify(out) == []
    assert str(original.parent) not in (out / "README.md").read_text()

    # the folder is one of sentence-transformers: carry its modules out by hand
    modules = json.loads((out / "modules.json").read_text())
    kinds = [module["type"].removeprefix("sentence_transformers.models.") for module in modules]
    assert kinds == ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"]
    assert all((out / module["path"]).is_dir() for module in modules)
    assert embedding.pooling_of(out) == "mean"
    loaded = models.load(out, offline=True)
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    vectors = nn.functional.normalize(embedding.encode(loaded.model, loaded.tokenizer, lines), dim=1)
    dense = load_file(out / "3_Dense" / "model.safetensors")
    stock = nn.functional.normalize(vectors @ dense["linear.weight"].T + dense["linear.bias"], dim=1)
    map = align.load(out / "run" / "map.safetensors")
    torch.testing.assert_close(stock, nn.functional.normalize(map(vectors), dim=1), rtol=1e-4, atol=1e-5)
    config = json.loads((out / "3_Dense" / "config.json").read_text())
    assert (config["in_features"], config["out_features"], config["bias"]) == (24, 24, True)
    assert map.target.startswith("original ")

    below = secateur(
        "align",
        pruned,
        original,
        "--data",
        texts,
        "--out",
        tmp_path / "b",
        "--neighbours",
        3,
        "--least",
        1,
        "--offline",
    )
    assert below.code == 6
    assert "is below --least 1" in below.err
    assert "advice   " in below.out
    assert (tmp_path / "b" / "3_Dense").is_dir()


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    torch.manual_seed(1)
    state = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 6)).state_dict()
    save_file(state, tmp_path / "original.safetensors")
    save_file(
        {key: value * (value.abs() > 0.1) for key, value in state.items()}, tmp_path / "pruned.safetensors"
    )
    return tmp_path


def test_models_of_ones_own_get_the_map_folded_in(secateur, own):
    both = "own.py:network@pruned.safetensors", "own.py:network@original.safetensors"
    said = secateur("align", *both, "--data", "own.py:rows", "--out", "out")
    assert said.code == 0, said
    assert "folded into 2, which is dense now" in said.out
    folded = models.load("own.py:network@out/model.safetensors").model
    pruned = models.load(both[0]).model
    map, x = align.load("out/run/map.safetensors"), torch.randn(50, 12)
    torch.testing.assert_close(folded(x).detach(), map(pruned(x).detach()), rtol=1e-4, atol=1e-5)
    assert verify("out") == []

    said = secateur(
        "align", *both, "--data", "own.py:rows", "--out", "beside", "--no-fold", "--fit", "procrustes"
    )
    assert "in run/map.safetensors, for align.load" in said.out
    assert models.load("own.py:network@beside/model.safetensors").fingerprint != ""
    found = load_file("beside/model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in load_file("pruned.safetensors").items())


def test_a_map_that_cannot_be_folded_is_stored_and_the_reason_said(secateur, own):
    both = "own.py:ends_in_tanh@pruned.safetensors", "own.py:ends_in_tanh@original.safetensors"
    said = secateur("align", *both, "--data", "own.py:named", "--out", "out", "--fit", "cca")
    assert said.code == 0, said
    assert "something that is not linear stands between it and the vectors" in said.out
    assert json.loads(Path("out/run/align.json").read_text())["map"]["fit"] == "cca"


def test_requests_that_cannot_be(secateur, own, sentence_models, texts):
    both = "own.py:network@pruned.safetensors", "own.py:network@original.safetensors"
    refused = lambda *more: secateur.refused(2, "align", *both, "--out", "out", *more)  # noqa: E731
    assert "--fit 'rige' is not known; nearest: ridge" in refused("--data", "own.py:rows", "--fit", "rige")
    assert "--data is missing" in refused()
    assert "a tokenizer" in refused("--data", texts)
    assert "no such file" in refused("--data", "nothing.txt")
    assert "one file.py:function" in refused("--data", "own.py:rows", "--data", "own.py:rows")
    assert "too few for 60 neighbours" in refused("--data", "own.py:rows", "--neighbours", 60)
    same = secateur.refused(2, "align", both[1], both[1], "--out", "out", "--data", "own.py:rows")
    assert "both models have the same weights" in same
    pruned, original = sentence_models
    assert "lie in each other" in secateur.refused(
        2, "align", pruned, original, "--data", texts, "--out", original / "x"
    )
    assert not Path("out").exists()


def test_every_fit_has_a_name():
    random = torch.Generator().manual_seed(0)
    one, two = (align.Embeddings(torch.randn(40, 4, generator=random), name) for name in "ab")
    kinds = {name: realign.fit(name, one, two).settings for name in realign.FITS}
    assert [kinds[name]["fit"] for name in realign.FITS] == ["ridge", "procrustes", "procrustes", "cca"]
    assert [kinds[name].get("scale") for name in realign.FITS[1:3]] == [True, False]
