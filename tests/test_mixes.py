"""Calibration from several texts: how they are named, what each gives, the draw, and every slip."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.data import tokens
from secateur.errors import UsageError
from secateur.mixes import Share, cut_each, drawn_from, mix_name, mixed_tokens, read_mix, read_texts, shared_out


class Words:
    """A tokenizer whose tokens are the numbers that a text holds."""

    pad_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def __len__(self):
        return 1000


def documents(first: int, count: int, length: int = 10) -> list[str]:
    return [" ".join(str(first + (i * length + j) % 400) for j in range(length)) for i in range(count)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.txt", [("a.txt", 1.0)]),
        ("a.txt:0.5", [("a.txt", 1.0)]),
        ("a.txt,b.txt", [("a.txt", 0.5), ("b.txt", 0.5)]),
        ("a.txt:0.7, b.jsonl:body", [("a.txt", 0.7), ("b.jsonl:body", 0.3)]),
        ("a:3,b.parquet:text:1", [("a", 0.75), ("b.parquet:text", 0.25)]),
        ("a:.5,b,python-docs", [("a", 0.5), ("b", 0.25), ("python-docs", 0.25)]),
        ("own.py:batches", [("own.py:batches", 1.0)]),
    ],
)
def test_a_mix_is_read(spec, expected):
    found = read_mix(spec)
    assert [part.spec for part in found] == [name for name, _ in expected]
    assert [part.share for part in found] == pytest.approx([share for _, share in expected])


def test_a_file_that_is_called_so_is_one_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one,two.txt", "a:0.5"):
        (tmp_path / name).write_text("x")
        assert read_mix(name) == (Share(name, 1.0),)
    assert read_mix("a:0.5,b.txt") == (Share("a:0.5", 0.5), Share("b.txt", 0.5))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.txt,,b.txt", "an empty name between commas"),
        ("a.txt:0,b.txt", "needs a share above 0"),
        ("a.txt:0.5,b.txt:0.5,c.txt", "together 1 leave nothing for the texts without one"),
        ("own.py:batches:0.5,a.txt", "own.py:batches is code and cannot be mixed"),
    ],
)
def test_slips_in_a_mix(spec, message):
    with pytest.raises(UsageError, match=message):
        read_mix(spec)


def test_names_hold_no_path():
    assert mix_name("/home/me/a.txt:0.25,/tmp/b.txt") == "25% a.txt and 75% b.txt"
    assert mix_name("/home/me/a.txt") == "a.txt"


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(100, 300))
def test_windows_are_shared_out_exactly(shares, samples):
    whole = sum(shares)
    counts = shared_out([Share(str(i), share / whole) for i, share in enumerate(shares)], samples)
    assert sum(counts) == samples
    assert all(abs(n - samples * share / whole) <= 1 for n, share in zip(counts, shares, strict=True))


def test_each_text_gives_its_share_and_tokens_are_counted():
    one, two = documents(1, 40), [*documents(500, 10), "501 502 503"]
    batches, counted = mixed_tokens([(one, 3), (two, 1)], Words(), context=5, samples=40, batch=8)
    rows = [
        row[mask.bool()] for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    low = torch.tensor([bool((row < 500).all()) for row in rows])
    assert [len(rows), int(low.sum())] == [40, 30]
    assert counted == [(30, 150), (10, 50)]
    assert sum(len(row) for row in rows) == 200
    assert len(set(low[:30].tolist())) == 2  # not one text after the other


def test_short_documents_count_their_own_tokens():
    _, counted = mixed_tokens([(["1 2 3", "4 5"], 1), (documents(500, 3), 1)], Words(), context=10, samples=4)
    assert counted == [(2, 5), (2, 20)]


def test_the_seed_decides_and_batches_do_not():
    texts = [(documents(1, 20), 1.0), (documents(1, 20), 1.0)]
    state = torch.get_rng_state()

    def drawn(**options):
        found, _ = mixed_tokens(texts, Words(), context=4, samples=12, **options)
        return torch.cat([b["input_ids"] for b in found])

    assert torch.equal(drawn(), drawn(batch=5))
    assert not torch.equal(drawn(), drawn(seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_one_text_is_drawn_as_without_a_mix():
    found, counted = mixed_tokens([(documents(1, 20), 0.3)], Words(), context=4, samples=12, seed=5)
    alone = tokens(documents(1, 20), Words(), context=4, samples=12, seed=5)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, alone, strict=True))
    assert counted == [(12, 48)]


def test_too_little_of_one_text_names_it():
    with pytest.raises(UsageError, match=r"^b\.txt: 6 samples of 5 tokens are asked for, and the text gives 2"):
        drawn_from(
            [(Share("a.txt", 0.5), documents(1, 9)), (Share("/x/b.txt", 0.5), documents(1, 1))],
            Words(), context=5, samples=12,
        )  # fmt: skip
    with pytest.raises(UsageError, match="2 samples leave none for c"):
        shared_out([Share("a", 0.45), Share("b", 0.45), Share("c", 0.1)], 2)
    for texts in ([], [(["1 2"], 0.0)]):
        with pytest.raises(UsageError, match="a mix needs texts, each with a share above 0"):
            mixed_tokens(texts, Words(), context=2, samples=1)


def test_from_files_to_words(tmp_path):
    for name, first in (("a.txt", 1), ("b.txt", 500)):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(documents(first, 10)))
    texts = read_texts(f"{tmp_path}/a.txt:0.75,{tmp_path}/b.txt")
    kept, held = cut_each(texts, lambda found: (found[:8], found[8:]))
    assert [[len(found) for _, found in part] for part in (kept, held)] == [[8, 8], [2, 2]]
    batches, said = drawn_from(kept, Words(), context=5, samples=8)
    assert len(batches) == 8
    assert said == "6 windows (30 tokens) of a.txt and 2 windows (10 tokens) of b.txt"
