import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.evaluate.corpus import check_tokens, context_for, documents, encode, positions, texts, vocabulary


class Configured(nn.Module):
    def __init__(self, **entries):
        super().__init__()
        self.config = type("Config", (), entries)()


def lists(data, tokenizer=None):
    return [document.tolist() for document in documents(data, tokenizer)]


def letters(text):
    return [ord(letter) - ord("a") for letter in text]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        (torch.tensor([1, 2, 3]), [[1, 2, 3]]),
        (torch.tensor([1, 2, 3], dtype=torch.int32), [[1, 2, 3]]),
        (np.array([1, 2, 3], dtype=np.uint16), [[1, 2, 3]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([torch.tensor([1, 2]), np.array([3])], [[1, 2], [3]]),
        ([[1, 2], []], [[1, 2]]),
        ({"input_ids": torch.tensor([[1, 2], [3, 4]])}, [[1, 2], [3, 4]]),
        ([{"input_ids": [[1, 2]]}, {"input_ids": [3]}], [[1, 2], [3]]),
        ("abc", [[0, 1, 2]]),
        (["ab", "c"], [[0, 1], [2]]),
    ],
)
def test_every_form_of_data_becomes_documents(data, expected):
    assert lists(data, letters) == expected


def test_padding_is_dropped_on_either_side():
    batch = {
        "input_ids": torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
    }
    assert lists([batch]) == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there is no token in the data; expected text or token ids"),
        ("", "there is no token in the data; expected text or token ids"),
        (torch.zeros(0), "there is no token in the data"),
        (3, "expected text or token ids, got int"),
        (torch.tensor([1.0]), "token ids must be integers, got float32"),
        (torch.tensor([True]), "token ids must be integers, got bool"),
        (torch.zeros(2, 2, 2, dtype=torch.long), r"must be one-dimensional, got shape \(2, 2, 2\)"),
        ({"ids": [1]}, r"a batch needs input_ids, got \['ids'\]"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask is \(1, 1\), input_ids are \(1, 2\); give one shape",
        ),
    ],
)
def test_what_is_no_data_is_refused(data, message):
    with pytest.raises(UsageError, match=message):
        documents(data, letters)


def test_texts_tells_text_from_ids():
    assert texts("ab") == ["ab"]
    assert texts(("a", "b")) == ["a", "b"]
    assert texts([1, 2]) is None
    assert texts([]) is None


def test_every_kind_of_tokenizer_encodes(byte_tokenizer):
    inner = byte_tokenizer.backend_tokenizer
    expected = byte_tokenizer("a b")["input_ids"]
    assert len(expected) == 3
    for tokenizer in (byte_tokenizer, inner, lambda text: byte_tokenizer(text), lambda text: expected):
        assert encode(tokenizer, "a b") == expected


def test_a_text_longer_than_the_model_is_no_reason_to_warn(byte_tokenizer, caplog):
    assert len(encode(byte_tokenizer, "x" * 100)) == 100
    assert not caplog.records


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(UsageError, match="text needs a tokenizer: pass tokenizer=, or token ids"):
        encode(None, "a")
    with pytest.raises(UsageError, match="tokenizer must encode text, got int"):
        encode(3, "a")


def test_positions_and_vocabulary_come_from_the_model(gpt2):
    assert (positions(gpt2), vocabulary(gpt2)) == (32, 257)
    assert (positions(nn.Linear(1, 1)), vocabulary(nn.Linear(1, 1))) == (None, None)
    assert positions(Configured(block_size=64)) == 64
    assert positions(Configured(text_config=Configured(n_positions=9).config, n_positions=5)) == 9
    assert vocabulary(Configured(vocab_size=11)) == 11


def test_the_default_context_is_the_models_up_to_2048():
    assert context_for(Configured(n_positions=1024), None) == 1024
    assert context_for(Configured(n_positions=131072), None) == 2048
    assert context_for(Configured(n_positions=131072), None, full=True) == 131072
    assert context_for(nn.Linear(1, 1), 77) == 77


@pytest.mark.parametrize(
    ("model", "context", "message"),
    [
        (nn.Linear(1, 1), None, "the model does not say how many positions it has; pass context="),
        (Configured(n_positions=8), 9, "context 9 is longer than the model's 8 positions; use at most 8"),
        (Configured(n_positions=8), 0, "context must be a positive whole number of tokens, got 0"),
        (Configured(n_positions=8), 2.5, "context must be a positive whole number of tokens, got 2.5"),
        (Configured(n_positions=8), True, "context must be a positive whole number of tokens, got True"),
    ],
)
def test_an_impossible_context_is_refused(model, context, message):
    with pytest.raises(UsageError, match=message):
        context_for(model, context)


def test_a_token_outside_the_vocabulary_is_named():
    good, bad = torch.tensor([0, 4]), torch.tensor([1, 5])
    check_tokens([good], 5)
    check_tokens([bad], None)
    with pytest.raises(
        UsageError, match=r"document 1, token 1: id 5 is outside the vocabulary \(0 to 4\); use the"
    ):
        check_tokens([good, bad], 5)
    with pytest.raises(UsageError, match=r"document 0, token 0: id -1 is outside the vocabulary \(0 and up\)"):
        check_tokens([torch.tensor([-1])], None)
