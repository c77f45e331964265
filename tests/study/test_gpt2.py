"""The GPT-2 study on a tiny model: rows recomputed, padding that is not read, prompts that are not scored, resuming."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch

from secateur import evaluate, finetune_, model
from secateur.core.depth import series
from secateur.core.forward import undisturbed
from secateur.errors import InputError, UsageError
from secateur.study.gpt2 import Plan, Sources, read, study, write_study
from secateur.study.gpt2.classifier import Classifier, fitted
from secateur.study.gpt2.given import IGNORED, article_batches, lead, prompt, review_batches
from secateur.study.gpt2.tasks import Tasks, written
from secateur.study.gpt2.variants import GPT2, KEPT, variants

from ..tiny import Folders, Secateur

pytest.importorskip("transformers")
SMALL = {
    "groups": (2, 4), "tokens": 200, "train_tokens": 256, "context": 48, "reviews": 12, "judged_reviews": 8,
    "tuned_reviews": 8, "articles": 4, "judged_articles": 3, "new_tokens": 6, "batch": 4, "repeats": 2,
}  # fmt: skip


def silent(*_):
    """Tell nobody."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    reviews = [
        {"text": f"the cat {word} the mat<br /><br />{i}", "label": word}
        for i in range(30)
        for word in ("sat", "ran")
    ]
    articles = [
        {"document": f"The dog ran {i}. It rained! The cat sat {i}. The end.", "summary": f"A dog ran {i}."}
        for i in range(12)
    ]
    for name, rows in (
        ("a", reviews[:40]),
        ("b", reviews[36:]),
        ("c", [*articles, {"document": "x", "summary": " "}]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def given(files, tmp_path_factory):
    loaded = model.load(Folders(tmp_path_factory.mktemp("models"))["gpt2"], offline=True)
    plan = Plan(**SMALL)
    sources = Sources(
        reviews=(f"{files}/a.jsonl", f"{files}/b.jsonl"), summaries=f"{files}/c.jsonl:document:summary"
    )
    return loaded, plan, read(sources, plan, loaded.tokenizer, loaded.model)


def test_what_is_judged_is_never_trained_on(given):
    _, plan, data = given
    train, test = ({text for text, _ in rows} for rows in (data.reviews.train, data.reviews.test))
    assert not train & test
    assert (len(data.reviews.train), len(data.reviews.test), data.reviews.classes) == (12, 8, 2)
    assert not any("<br" in text for text in train | test)
    assert not {a for a, _ in data.articles.train} & {a for a, _ in data.articles.test}
    assert len(data.articles.test) == plan.judged_articles
    assert data.text_name == "python-docs, a fifth"


def test_rows_are_made_as_they_are_called(given):
    loaded, plan, data = given
    makers, notes = variants(loaded.model, None, data, plan, silent)
    assert list(makers) == ["baseline", "smaller", "pruned", "merged_2", "compressed_2"]
    assert any("n = 4 left out: the model has 2 blocks" in note for note in notes)
    whole = evaluate.parameters(loaded.model).value
    pruned = makers["pruned"]()
    assert evaluate.nonzeros(pruned.model).value == round(whole * KEPT / GPT2)
    embedding = loaded.model.get_input_embeddings().weight
    assert torch.equal(pruned.model.get_input_embeddings().weight, embedding)
    merged, compressed, small = (makers[name]().model for name in ("merged_2", "compressed_2", "smaller"))
    blocks = loaded.model.transformer.h
    mean = (blocks[0].mlp.c_fc.weight + blocks[1].mlp.c_fc.weight) / 2
    for block in (*merged.transformer.h, *compressed.transformer.h):
        assert torch.allclose(block.mlp.c_fc.weight, mean, atol=1e-6)
    assert [len(s.blocks) for each in (merged, compressed, small) for s in series(each)] == [2, 1, 1]
    assert small.transformer.h[0].mlp.c_fc.weight.ne(blocks[0].mlp.c_fc.weight).any()  # it was taught
    (exact,) = (
        variants(loaded.model, None, data, Plan(**SMALL | {"nonzero": 30_001}), silent)[0]["pruned"]()
        for _ in "1"
    )
    assert evaluate.nonzeros(exact.model).value == 30_001
    with pytest.raises(UsageError, match="has no repeated blocks"):
        variants(torch.nn.Linear(2, 2), None, data, plan, silent)


def test_the_classifier_reads_the_last_real_token(given):
    loaded, _, data = given
    rows = data.reviews.train
    (batch,) = review_batches(rows[:4], loaded.tokenizer, 24, 4)
    found = Classifier(loaded.model, 2).eval()
    with undisturbed(found):
        here = found.features(batch["input_ids"], batch["attention_mask"])
        for row, (text, _) in enumerate(rows[:4]):
            ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:24]])
            alone = loaded.model.transformer(ids).last_hidden_state[0, -1]
            assert torch.allclose(here[row], alone, atol=1e-4)
        longer = {
            key: torch.nn.functional.pad(batch[key], (0, 5), value=7 if key == "input_ids" else 0)
            for key in ("input_ids", "attention_mask")
        }
        assert torch.allclose(found(**longer), found(batch["input_ids"], batch["attention_mask"]), atol=1e-4)
    held = copy.deepcopy(loaded.model.state_dict())
    head = fitted(loaded.model, review_batches(rows, loaded.tokenizer, 24, 4), 2)
    assert (
        evaluate.accuracy(
            head,
            [
                ({k: b[k] for k in ("input_ids", "attention_mask")}, b["labels"])
                for b in review_batches(rows, loaded.tokenizer, 24, 4)
            ],
        ).value
        > 0.7
    )
    assert all(torch.equal(value, held[key]) for key, value in loaded.model.state_dict().items())
    with pytest.raises(UsageError, match="Linear has no body"):
        Classifier(torch.nn.Linear(2, 2), 2)


def test_summaries_hold_nothing_of_the_prompt_and_padding_changes_none(given):
    loaded, plan, data = given
    documents = [document for document, _ in data.articles.test] + ["Short."]
    together = written(loaded.model, documents, plan, loaded.tokenizer)
    assert together == [written(loaded.model, [one], plan, loaded.tokenizer)[0] for one in documents]
    ids = prompt("word " * 500, loaded.tokenizer, plan)
    assert len(ids) == plan.context - plan.new_tokens
    assert loaded.tokenizer.decode(ids).endswith("\nTL;DR:")
    row = prompt(documents[0], loaded.tokenizer, plan)
    begun = len(row)
    with undisturbed(loaded.model):
        while len(row) < begun + plan.new_tokens and row[-1] != loaded.tokenizer.eos_token_id:
            row.append(int(loaded.model(torch.tensor([row])).logits[0, -1].argmax()))
    said = loaded.tokenizer.decode(row[begun:], skip_special_tokens=True)
    assert together[0] == said.strip().split("\n")[0]
    batch = article_batches(data.articles.train, loaded.tokenizer, plan)[0]
    for row, (_, summary) in enumerate(data.articles.train):
        labels = batch["labels"][row]
        kept = labels[labels != IGNORED].tolist()
        assert kept[-1] == loaded.tokenizer.eos_token_id
        assert f" {summary}".startswith(loaded.tokenizer.decode(kept[:-1]))
        assert torch.equal(batch["input_ids"][row][labels != IGNORED], labels[labels != IGNORED])
    assert lead("One. Two? Three! Four.") == "One. Two? Three!"
    assert lead('He said "no." Then he left. It rained. End.') == 'He said "no." Then he left. It rained.'


def test_a_row_is_what_the_parts_of_the_package_measure(given):
    loaded, plan, data = given
    makers, _ = variants(loaded.model, None, data, plan, silent)
    made = makers["pruned"]()
    asked = Tasks(made, data, plan, loaded.tokenizer, silent)
    assert asked.before()["perplexity"].value == evaluate.perplexity(made.model, data.text).value
    tuned = copy.deepcopy(made.model)
    finetune_(tuned, data.train, made.masks, loss="language-model", epochs=1, lr=plan.lr, seed=plan.seed)
    found = asked.after()
    assert found["perplexity"].value == evaluate.perplexity(tuned, data.text).value
    assert set(found) == {"perplexity", "accuracy", "rouge1", "rouge2", "rougeL"}
    classifier = asked._tuned_classifier(data.reviews)
    for name, mask in made.masks.items():  # pruned weights stay zero in every fine-tuning
        assert not classifier.model.get_parameter(name)[~mask].any()
        assert classifier.model.get_parameter(name).ne(made.model.get_parameter(name)).any()


class Stop(BaseException):
    """What a Ctrl-C is."""


@pytest.mark.thorough
def test_a_killed_study_goes_on_and_repeats_nothing(given, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    loaded, plan, data = given
    seen = []

    def show(found):
        seen.append(found.done)
        if found.done == 5:
            write_study(tmp_path, found, data, plan)
            raise Stop

    with pytest.raises(Stop):
        study("a", loaded, None, data, plan, tmp_path / "state", silent, show=show)
    assert "5 of 15 parts are done" in (tmp_path / "report.html").read_text()
    names = []
    monkeypatch.setattr(
        "secateur.study.gpt2.tasks._perplexity",
        lambda *a: names.append(1) or evaluate.perplexity(a[0], data.text),
    )
    found = study("a", loaded, None, data, plan, tmp_path / "state", silent, show=lambda f: seen.append(f.done))
    assert seen == [1, 2, 3, 4, 5, *range(6, 16)]
    assert len(names) == 6  # of three rows: the first is done, the second lacks its speed alone
    again = study("a", loaded, None, data, plan, tmp_path / "state", silent)
    assert again == found
    with pytest.raises(UsageError, match="begun with another plan"):
        study("a", loaded, None, data, Plan(**SMALL | {"seed": 1}), tmp_path / "state", silent)
    (tmp_path / "state" / "pruned.before.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        study("a", loaded, None, data, plan, tmp_path / "state", silent)


@pytest.mark.thorough
def test_the_command(given, files, monkeypatch, capsys, tmp_path):
    pytest.importorskip("plotly")
    loaded, _, _ = given
    secateur, out = Secateur(monkeypatch, capsys), tmp_path / "out"
    base = ("study", "gpt2", "--model", loaded.folder, "--smaller", loaded.folder, "--out", out, "--offline")
    sized = ("--groups", "2", "--tokens", 128, "--train-tokens", 128, "--context", 48)
    for name, word in (("judged", "cat"), ("known", "dog")):
        (tmp_path / f"{name}.txt").write_text(f"the {word} sat on the mat " * 200)
    texts = ("--text", tmp_path / "judged.txt", "--train", tmp_path / "known.txt")
    said = secateur(*base, *sized, *texts, "--no-pictures")
    assert said.code == 0, said
    assert "| compressed_2 |" in said.out
    told = json.loads((out / "study.json").read_text())
    assert list(told["rows"]) == ["baseline", "smaller", "pruned", "merged_2", "compressed_2"]
    assert told["rows"]["smaller"]["before"] == told["rows"]["baseline"]["before"]
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == list(told["rows"])
    assert "There is no" not in said.out
    assert "No reviews were given, so there is no accuracy" in (out / "report.html").read_text()

    def refused(*more):
        return secateur.refused(2, *base, "--if-exists", "overwrite", *more)

    assert "the model takes 64; give --context 64" in refused()
    assert "--reviews is given 1 times" in refused("--reviews", f"{files}/a.jsonl")
    assert "whole numbers" in refused("--groups", "two")
    assert "--text and --train go together" in refused("--text", "python-docs", "--context", 48)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": (1,)}, "different numbers of at least 2"),
        ({"groups": (2, 2)}, "different numbers of at least 2"),
        ({"tokens": 0}, "counts of at least 1"),
        ({"lr": 0.0}, "a rate above 0"),
        ({"tuned_reviews": 99}, "99 reviews to fine-tune on, of 12"),
    ],
)
def test_plans_that_make_no_sense(change, said):
    with pytest.raises(UsageError, match=said):
        Plan(**SMALL | change)


def test_data_that_do_not_fit(given, files):
    loaded, plan, _ = given

    for name, word in (("judged", "cat"), ("known", "dog")):
        (files / f"{name}.txt").write_text(f"the {word} sat on the mat " * 200)
    texts = {"text": f"{files}/judged.txt", "train": f"{files}/known.txt"}

    def refused(**sources):
        with pytest.raises((UsageError, InputError)) as error:
            read(Sources(**texts | sources), plan, loaded.tokenizer, loaded.model)
        return str(error.value)

    (files / "odd.jsonl").write_text('{"text": "a", "label": "new"}\n')
    (files / "broken.jsonl").write_text("{\n")
    assert "labels new" in refused(reviews=(f"{files}/a.jsonl", f"{files}/odd.jsonl"))
    assert "line 1: not readable as JSON" in refused(reviews=(f"{files}/broken.jsonl", f"{files}/a.jsonl"))
    assert "no field 'document'" in refused(summaries=f"{files}/a.jsonl")
    assert "no such file" in refused(summaries=f"{files}/none.jsonl")
    assert "expected .parquet or .jsonl" in refused(summaries=f"{__file__}")
    assert "share a document" in refused(text="python-docs", train="python-docs")
    (files / "few.jsonl").write_text('{"document": "a b", "summary": "b"}\n')
    assert "7 articles with a summary are asked for and 1 are there" in refused(summaries=f"{files}/few.jsonl")


def test_a_smaller_model_of_other_tokens_is_refused(given, tmp_path):
    loaded, plan, data = given
    other = copy.copy(loaded)
    object.__setattr__(other, "tokenizer", copy.deepcopy(loaded.tokenizer))
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(UsageError, match="reads other tokens"):
        study("a", loaded, other, data, plan, tmp_path, silent)
    object.__setattr__(other, "tokenizer", None)
    with pytest.raises(UsageError, match="no causal language model with a tokenizer"):
        study("a", other, None, data, plan, tmp_path, silent)
