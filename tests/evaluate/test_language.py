import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import NumericError, UsageError
from secateur.evaluate import PROTOCOLS, loglikelihood_rolling, perplexity

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. \n Winston went in."


def bigram_loss(model, ids):
    """Sum of the losses of ids[1:], each from the token before it: float64, no windows, no batches."""
    scores = torch.log_softmax(model.table.double(), dim=1)
    return -sum(scores[before, after].item() for before, after in pairwise(ids))


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(2, 12),
    st.integers(1, 5),
)
def test_stride_judges_every_token_once_whatever_the_batching(bigram_factory, documents, context, batch_size):
    if max(map(len, documents)) < 2:
        return
    model = bigram_factory()
    measured = perplexity(model, documents, protocol="stride", context=context, stride=1, batch_size=batch_size)
    judged = sum(len(ids) - 1 for ids in documents)
    expected = math.exp(sum(bigram_loss(model, ids) for ids in documents) / judged)
    assert measured.value == pytest.approx(expected, rel=1e-5)
    assert measured.conditions["tokens"] == judged


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(2, 12))
def test_windows_leave_out_the_first_token_of_each_window(bigram_factory, ids, context):
    model = bigram_factory()
    parts = [ids[at : at + context] for at in range(0, len(ids), context)]
    judged = sum(len(part) - 1 for part in parts)
    measured = perplexity(model, ids, context=context)
    expected = math.exp(sum(bigram_loss(model, part) for part in parts) / judged)
    assert measured.value == pytest.approx(expected, rel=1e-5)
    assert measured.conditions["tokens"] == judged


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_value_does_not_depend_on_the_batching(gpt2, byte_tokenizer, protocol):
    texts = [TEXT, TEXT[:40], TEXT[3:70], "x"]
    values = [
        perplexity(gpt2, texts, tokenizer=byte_tokenizer, protocol=protocol, batch_size=size).value
        for size in (1, 2, 3, 100, None)
    ]
    assert values == pytest.approx([values[0]] * 5, rel=1e-6)


@pytest.mark.parametrize("protocol", ["windows", "stride"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_counted(gpt2, protocol, side):
    rows = [torch.randint(256, (length,)) for length in (20, 31, 7)]
    width = 40
    ids, mask = torch.full((3, width), 256), torch.zeros(3, width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = row, 1
    padded = perplexity(gpt2, {"input_ids": ids, "attention_mask": mask}, protocol=protocol, context=16)
    plain = perplexity(gpt2, rows, protocol=protocol, context=16)
    assert padded == plain


def test_the_conditions_say_which_number_it_is(gpt2, byte_tokenizer):
    ids = torch.arange(100)
    windows = perplexity(gpt2, ids, dataset="counting", batch_size=3)
    assert windows.conditions == {
        "protocol": "non-overlapping windows of 32",
        "dataset": "counting",
        "context": 32,
        "tokens": 96,
        "windows": 4,
        "documents": 1,
        "batch": 3,
        "dtype": "float32",
        "device": "cpu",
    }
    stride = perplexity(gpt2, ids, protocol="stride").conditions
    assert (stride["protocol"], stride["stride"], stride["tokens"]) == (
        "sliding windows of 32, stride 16",
        16,
        99,
    )
    assert stride["batch"] == 2048 // 32
    full = perplexity(gpt2, ids, drop_last=True).conditions
    assert (full["protocol"], full["tokens"]) == ("non-overlapping windows of 32, full ones only", 93)
    rolling = perplexity(gpt2, "ab cd", tokenizer=byte_tokenizer, protocol="lm-eval")
    assert rolling.name == "word_perplexity"
    assert {key: rolling.conditions[key] for key in ("tokens", "words", "bytes")} == {
        "tokens": 5,
        "words": 2,
        "bytes": 5,
    }


def test_the_stride_is_512_where_the_context_allows(bigram):
    long = torch.randint(7, (3000,))
    assert perplexity(bigram, long, protocol="stride", context=2048).conditions["stride"] == 512
    assert perplexity(bigram, long, protocol="stride", context=1000).conditions["stride"] == 500
    assert perplexity(bigram, long, protocol="stride", context=2).conditions["stride"] == 1


class Noisy(nn.Module):
    """Changes its answer in training mode, draws random numbers, and counts what it is asked for."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7))
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(7).eval()
        self.config = type("Config", (), {"use_cache": True, "n_positions": 8})()
        self.asked = []

    def forward(self, ids, use_cache=None):
        self.asked.append((use_cache, torch.is_grad_enabled(), torch.rand(()).item()))
        return (self.drop(self.table[ids]), "cache")


def test_measuring_leaves_no_trace():
    model = Noisy().train()
    model.frozen.eval()
    before = torch.get_rng_state()
    first = perplexity(model, torch.arange(20) % 7)
    second = perplexity(model, torch.arange(20) % 7)
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, model.drop.training, model.frozen.training) == (True, True, False)
    assert model.config.use_cache is True
    assert {entry[:2] for entry in model.asked} == {(False, False)}
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error(bigram):
    bigram.train()
    with torch.no_grad():
        bigram.table[3, 3] = math.nan
    with pytest.raises(NumericError):
        perplexity(bigram, [1, 3, 3, 1], context=4)
    assert bigram.training


def test_words_and_bytes_are_counted_in_the_original_text(gpt2, byte_tokenizer):
    text = " he said : « né » \n"
    plain = loglikelihood_rolling(gpt2, text, byte_tokenizer)
    cleaned = loglikelihood_rolling(gpt2, text, byte_tokenizer, detokenize=lambda t: t.replace(" : ", ": "))
    for found in (plain, cleaned):
        conditions = found["bits_per_byte"].conditions
        assert conditions["words"] == len(re.split(r"\s+", text)) == 8
        assert conditions["bytes"] == len(text.encode()) == 22
    assert plain["word_perplexity"].conditions["tokens"] == 22
    assert cleaned["word_perplexity"].conditions["tokens"] == 21
    assert cleaned["word_perplexity"].conditions["protocol"].endswith(", detokenized")
    assert plain["word_perplexity"].value != cleaned["word_perplexity"].value


def test_the_three_figures_are_one_loss(gpt2, byte_tokenizer):
    found = loglikelihood_rolling(gpt2, TEXT, byte_tokenizer)
    conditions = found["bits_per_byte"].conditions
    loss = found["bits_per_byte"].value * math.log(2) * conditions["bytes"]
    assert found["byte_perplexity"].value == pytest.approx(math.exp(loss / conditions["bytes"]), rel=1e-12)
    assert found["word_perplexity"].value == pytest.approx(math.exp(loss / conditions["words"]), rel=1e-9)
    assert found["bits_per_byte"].unit == "bits"


def test_a_tokenizer_without_special_tokens_needs_a_prefix(bigram):
    def letters(text):
        return [ord(letter) % 7 for letter in text]

    with pytest.raises(
        UsageError, match="the tokenizer has neither a BOS nor an EOS token; pass prefix_token="
    ):
        loglikelihood_rolling(bigram, "abc", letters, context=4)
    found = loglikelihood_rolling(bigram, "abc", letters, context=4, prefix_token=2)["bits_per_byte"]
    expected = bigram_loss(bigram, [2, *letters("abc")]) / 3 / math.log(2)
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_progress_counts_windows(bigram):
    seen = []
    perplexity(
        bigram,
        torch.zeros(20, dtype=torch.long),
        context=4,
        batch_size=2,
        progress=lambda *args: seen.append(args),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_bfloat16_is_judged_in_float32(bigram):
    exact = perplexity(bigram, torch.arange(50) % 7, context=10).value
    short = Bigram16(bigram)
    measured = perplexity(short, torch.arange(50) % 7, context=10)
    assert measured.conditions["dtype"] == "bfloat16"
    assert measured.value == pytest.approx(exact, rel=2e-2)
    wide = perplexity(Bigram16(bigram, torch.float64), torch.arange(50) % 7, context=10)
    assert wide.value == pytest.approx(exact, rel=1e-6)


class Bigram16(nn.Module):
    def __init__(self, bigram, dtype=torch.bfloat16):
        super().__init__()
        self.table = nn.Parameter(bigram.table.detach().to(dtype))

    def forward(self, ids):
        return {"logits": self.table[ids]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "strides"}, "unknown protocol 'strides'; nearest: stride"),
        ({"stride": 4}, 'protocol "windows" has no stride; leave stride= out or use protocol="stride"'),
        ({"protocol": "stride", "drop_last": True}, 'protocol "stride" has no drop_last; it belongs to'),
        ({"protocol": "stride", "stride": 9}, "stride 9 is not in 1 to 8, the context"),
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive whole number, got 1.5"),
        ({"context": 1}, "context 1 leaves nothing to predict from"),
        ({"context": None}, "the model does not say how many positions it has; pass context="),
        ({"protocol": "lm-eval"}, r'protocol "lm-eval" counts words and bytes: pass text'),
        ({"data": [3]}, "there is no token to judge: every document has fewer than 2 tokens"),
        ({"data": [3, 4], "drop_last": True}, "there is no token to judge"),
        ({"data": []}, "there is no token in the data"),
        ({"data": "text"}, "text needs a tokenizer"),
        ({"data": [1, 7]}, r"id 7 is outside the 7 tokens the model predicts; use the tokenizer"),
        (
            {"data": [1, 7, 2]},
            r"the model cannot look up these tokens \(ids 1 to 7, 2 positions\): index 7 is out",
        ),
        ({"data": [1, -1]}, r"document 0, token 1: id -1 is outside the vocabulary"),
    ],
)
def test_every_mistake_has_its_message(bigram, options, message):
    options = {"data": list(range(6)) * 4, "context": 8, **options}
    with pytest.raises(UsageError, match=message):
        perplexity(bigram, options.pop("data"), **options)


def test_mistakes_with_a_transformers_model(gpt2, byte_tokenizer):
    with pytest.raises(UsageError, match="context 33 is longer than the model's 32 positions; use at most 32"):
        perplexity(gpt2, torch.arange(50), context=33)
    with pytest.raises(UsageError, match=r"document 0, token 1: id 257 is outside the vocabulary \(0 to 256\)"):
        perplexity(gpt2, [0, 257])
    for nothing in ("", []):
        with pytest.raises(UsageError, match=r"pass text that is not empty, not token ids"):
            loglikelihood_rolling(gpt2, nothing, byte_tokenizer)


class Answer(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, ids):
        return self.answer(ids)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ids: "no", "the model returned str without logits; expected a tensor"),
        (
            lambda ids: torch.zeros(len(ids), 7),
            r"expected logits \(batch, tokens, vocabulary\) for ids \(1, 3\), got",
        ),
        (lambda ids: torch.zeros(1, 2, 7), "expected logits at 3 positions, got 2"),
    ],
)
def test_an_answer_that_is_no_logits_is_refused(answer, message):
    with pytest.raises(UsageError, match=message):
        perplexity(Answer(answer), [1, 2, 3, 4], context=4)


def test_models_that_do_not_predict_the_next_token_are_refused():
    for name, config in (("BertForMaskedLM", {}), ("Reader", {"is_encoder_decoder": True})):
        model = type(name, (Answer,), {})(lambda ids: torch.zeros(1, 3, 7))
        model.config = type("Config", (), config)()
        with pytest.raises(
            UsageError,
            match=f"perplexity needs a model that predicts each token from those before; {name} does",
        ):
            perplexity(model, [1, 2, 3, 4], context=4)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_loss_that_is_no_number_names_its_window(bigram, value):
    with torch.no_grad():
        bigram.table[3, 3] = value
    with pytest.raises(
        NumericError, match=r"the loss is (nan|inf) in document 1, tokens 4 to 8; look for NaN or Inf"
    ):
        perplexity(bigram, [[1, 2, 1], [1, 2, 2, 1, 1, 3, 3, 2]], context=4)


def test_a_loss_too_large_for_a_perplexity_is_said(bigram):
    with torch.no_grad():
        bigram.table[:, 0] = -5000.0
    with pytest.raises(NumericError, match=r"a mean loss of \d+ nats is too large for a perplexity"):
        perplexity(bigram, [0, 0, 0, 0], context=4)
