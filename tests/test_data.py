"""Windows are real, drawn from the seed, never twice the same token; generated data follows the model."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.data import PYTHON_DOCS, read_batches, read_text, self_generated, stream, tokens
from secateur.errors import NumericError, UsageError


class Letters:
    """A tokenizer with one token a letter: every token tells which document and place it came from."""

    pad_token_id = None
    bos_token_id = 1
    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["truncation"] is False
        return {"input_ids": [ord(letter) for letter in text]}

    def __len__(self) -> int:
        return 8


def documents(lengths: list[int]) -> list[str]:
    """Documents in which no letter occurs twice, over all documents."""
    start, made = 100, []
    for length in lengths:
        made.append("".join(chr(start + i) for i in range(length)))
        start += length
    return made


def rows(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    """The real tokens of each sample."""
    found = []
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["input_ids"].dtype == torch.long
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)  # padding on the right
            assert ids[length:].tolist() == [0] * (len(mask) - length)
            found.append(ids[:length].tolist())
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]  # no needless padding
    return found


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    context=st.integers(1, 9),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_windows_are_parts_of_documents_and_never_overlap(
    lengths: list[int], context: int, batch: int, seed: int, data: st.DataObject
) -> None:
    texts = documents(lengths)
    short = sum(0 < length < context for length in lengths)
    fits = sum(length // context for length in lengths) + short
    samples = data.draw(st.integers(1, max(fits, 1)))
    options: dict[str, Any] = {"context": context, "samples": samples, "batch": batch, "seed": seed}
    if fits == 0:
        with pytest.raises(UsageError, match="the text gives 0"):
            tokens(texts, Letters(), **options)
        return
    batches = tokens(texts, Letters(), **options)
    with pytest.raises(UsageError, match=f"the text gives {fits} "):
        tokens(texts, Letters(), **options | {"samples": fits + 1})
    found = rows(batches)
    assert [len(each["input_ids"]) for each in batches[:-1]] == [batch] * (len(batches) - 1)
    assert len(found) == samples
    joined = "".join(texts)
    for row in found:
        text = "".join(map(chr, row))
        assert text in joined
        assert any(text in document for document in texts)
        assert len(text) == context or text in texts
    everything = [token for row in found for token in row]
    assert len(everything) == len(set(everything))
    again = tokens(texts, Letters(), **options)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(batches, again, strict=True) for key in a)


def test_full_windows_come_before_short_documents_and_documents_take_turns() -> None:
    texts = documents([3, 100, 2, 100, 100])
    found = rows(tokens(texts, Letters(), context=10, samples=6, seed=3))
    assert all(len(row) == 10 for row in found)
    owners = [next(i for i, text in enumerate(texts) if chr(row[0]) in text) for row in found]
    assert sorted(owners[:3]) == sorted(owners[3:]) == [1, 3, 4]
    every = rows(tokens(texts, Letters(), context=60, samples=5))
    assert [len(row) for row in every[:3]] == [60, 60, 60]
    assert sorted(map(len, every[3:])) == [2, 3]


def test_the_seed_decides_and_the_global_generator_is_untouched() -> None:
    texts = documents([200] * 5)
    state = torch.get_rng_state()
    drawn = [rows(tokens(texts, Letters(), context=8, samples=5, seed=seed)) for seed in range(5)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(a != b for a, b in itertools.pairwise(drawn))
    starts = {
        (row[0] - 100) % 200
        for seed in range(200)
        for row in rows(tokens(texts, Letters(), context=64, samples=5, seed=seed))
    }
    assert starts == {first + 64 * window for first in range(9) for window in range(3)}  # 200 = 3 x 64 + 8


def test_batching_changes_nothing_but_the_padding() -> None:
    texts = documents([5, 50, 3, 8])
    one = rows(tokens(texts, Letters(), context=8, samples=9, batch=1))
    assert one == rows(tokens(texts, Letters(), context=8, samples=9, batch=4))
    assert {
        row.shape[1] for row in (b["input_ids"] for b in tokens(texts, Letters(), context=8, samples=9))
    } == {3, 5, 8}


def test_too_little_text_says_how_much_there_is() -> None:
    expected = (
        "128 samples of 16 tokens are asked for, and the text gives 4 (70 tokens in 3 documents). Ask for fewer"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        tokens(documents([40, 20, 10]), Letters(), context=16, samples=128)
    with pytest.raises(UsageError, match="gives 0"):
        tokens([], Letters(), context=16, samples=1)


@pytest.mark.parametrize("name", ["context", "samples", "batch"])
@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_numbers_out_of_range(name: str, number: float) -> None:
    options: dict[str, Any] = {"context": 4, "samples": 1, "batch": 1} | {name: number}
    with pytest.raises(UsageError, match=f"{name} is {number}; a whole number of at least 1 is expected"):
        tokens(documents([40]), Letters(), **options)
    with pytest.raises(UsageError, match=f"{name} is {number}"):
        self_generated(nn.Linear(1, 1), **options)


class Counting(nn.Module):
    """A language model without a choice: after token t comes t + 1, and 0 after 7."""

    def __init__(self, vocabulary: int = 8, positions: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 4)
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace(max_position_embeddings=positions)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        assert not self.training
        following = (ids + 1) % self.embedding.num_embeddings
        return 100.0 * nn.functional.one_hot(following, self.embedding.num_embeddings).float()


def test_a_tokenizer_of_another_model_is_refused() -> None:
    texts = documents([40])
    expected = re.escape("the tokenizer gives token 139, the model knows 0 to 7: they do not fit")
    with pytest.raises(UsageError, match=expected):
        tokens(texts, Letters(), context=40, samples=1, model=Counting())
    with pytest.raises(UsageError, match=expected):
        stream(texts, Letters(), model=Counting())
    assert len(stream(texts, Letters(), model=Counting(140))) == 40
    assert len(stream(texts, Letters(), model=nn.Linear(1, 1))) == 40  # does not say what it knows


def test_a_window_longer_than_the_models_positions_is_refused() -> None:
    with pytest.raises(UsageError, match="a context of 16 tokens is more than the 8 positions of the model"):
        tokens(documents([40]), Letters(), context=16, samples=1, model=Counting(200, positions=8))


def test_a_stream_is_all_documents_in_a_row() -> None:
    assert stream(["ab", "", "c"], Letters()).tolist() == [97, 98, 99]
    assert stream(["ab", "c"], Letters(), separator="\n\n").tolist() == [97, 98, 10, 10, 99]
    assert stream(["a"], Letters()).dtype == torch.long
    with pytest.raises(UsageError, match="2 documents give no token"):
        stream(["", ""], Letters())


def test_generated_text_is_what_the_model_says() -> None:
    batches = self_generated(Counting(), Letters(), context=5, samples=3, batch=2)
    assert rows(batches) == [[1, 2, 3, 4, 5]] * 3
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert rows(self_generated(Counting(), Letters(), context=50, samples=1)) == [
        [1, 2, 3, 4, 5, 6, 7, 0]
    ]  # its end
    assert rows(self_generated(Counting(), Letters(), context=1, samples=1)) == [[1]]


def test_without_a_tokenizer_samples_begin_anywhere() -> None:
    found = rows(self_generated(Counting(64), context=3, samples=20, seed=1))
    assert all(row == [row[0], (row[0] + 1) % 64, (row[0] + 2) % 64] for row in found)
    assert len({row[0] for row in found}) > 10


class Coin(Counting):
    """Token 2 or 3, three to one; rows from 8 on only pad the vocabulary and are the likeliest."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = torch.full((*ids.shape, self.embedding.num_embeddings), -torch.inf).nan_to_num(neginf=-1e9)
        logits[..., 2], logits[..., 3], logits[..., 8:] = torch.log(torch.tensor(3.0)), 0.0, 50.0
        return logits + self.dropout(torch.zeros(1))


def test_generated_tokens_follow_the_models_distribution() -> None:
    found = rows(self_generated(Coin(10), Letters(), context=64, samples=64, seed=5))
    drawn = torch.tensor([row[1:] for row in found])
    assert set(drawn.unique().tolist()) == {2, 3}
    assert abs((drawn == 2).float().mean() - 0.75) < 0.03  # 4,032 draws: standard deviation 0.007
    hot = torch.tensor(
        [row[1:] for row in rows(self_generated(Coin(10), Letters(), context=64, samples=64, temperature=2))]
    )
    assert abs((hot == 2).float().mean() - 3**0.5 / (3**0.5 + 1)) < 0.03


def test_generating_is_deterministic_and_leaves_no_trace() -> None:
    model = Coin(10)
    model.dropout.eval()  # modules in different modes
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = rows(self_generated(model, Letters(), context=16, samples=4, seed=7))
    assert first == rows(self_generated(model, Letters(), context=16, samples=4, seed=7))
    assert first != rows(self_generated(model, Letters(), context=16, samples=4, seed=8))
    assert torch.equal(state, torch.get_rng_state())
    assert (model.training, model.embedding.training, model.dropout.training) == (True, True, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Broken(Counting):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.nan


def test_what_cannot_write_is_named() -> None:
    with pytest.raises(NumericError, match="the model's logits are not finite at token 1"):
        self_generated(Broken(), Letters(), context=4, samples=1)
    with pytest.raises(
        UsageError, match=r"Flatten gives no logits of shape \(batch, length, vocabulary\); give data"
    ):
        self_generated(nn.Flatten(), Letters(), context=4, samples=1)
    with pytest.raises(UsageError, match="the model's vocabulary is not known; give a tokenizer or data"):
        self_generated(nn.Flatten(), context=4, samples=1)
    with pytest.raises(UsageError, match="temperature is 0; a number above 0 is expected"):
        self_generated(Counting(), Letters(), context=4, samples=1, temperature=0)
    with pytest.raises(UsageError, match="more than the 64 positions"):
        self_generated(Counting(), Letters(), context=65, samples=1)


def test_a_transformers_model_with_its_cache_writes_what_it_writes_without() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 32}
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    class Sized(SimpleNamespace):
        def __len__(self) -> int:
            return 32

    tokenizer = Sized(bos_token_id=1, eos_token_id=None, pad_token_id=None)
    cached = rows(self_generated(model, tokenizer, context=24, samples=3, seed=2))
    assert cached == rows(self_generated(Plain(), tokenizer, context=24, samples=3, seed=2))
    assert len({tuple(row) for row in cached}) == 3
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16}
    for other in (
        transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, **bert)),
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **t5)),
    ):
        with pytest.raises(UsageError, match="is no causal language model and cannot write text; give data"):
            self_generated(other, tokenizer, context=4, samples=1)


def test_a_real_tokenizer_and_the_python_docs() -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = read_text(PYTHON_DOCS)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts[:20], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=16)
    assert tokenizer.decode(stream(texts[:5], tokenizer)) == "".join(
        texts[:5]
    )  # longer than model_max_length: no warning
    batches = tokens(texts, tokenizer, context=128, samples=16, batch=4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 128)] * 4
    assert all(
        tokenizer.decode(row) in "".join(texts)
        for row in rows(batches)
        if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(row)
    )


def test_batches_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "images.py").write_text(
        "import torch\n\n"
        "def loader():\n"
        "    return torch.utils.data.DataLoader(torch.rand(6, 2), batch_size=2, shuffle=True)\n\n"
        "def endless():\n    while True:\n        yield {'x': torch.rand(1)}\n\n"
        "def nothing():\n    return []\n\n"
        "def tensor():\n    return torch.rand(2)\n"
    )
    spec = f"{tmp_path / 'images.py'}:"
    state = torch.get_rng_state()
    first, again = read_batches(spec + "loader", seed=4), read_batches(spec + "loader", seed=4)
    assert [tuple(batch.shape) for batch in first] == [(2, 2)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(read_batches(spec + "endless", limit=5)) == 5
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UsageError, match=r"images\.py:nothing gave no batches; it must give at least one"):
        read_batches(spec + "nothing")
    with pytest.raises(UsageError, match=r"images\.py:tensor returned Tensor; expected an iterable of batches"):
        read_batches(spec + "tensor")
    with pytest.raises(UsageError, match="lodaer is not in it; nearest: loader"):
        read_batches(spec + "lodaer")
