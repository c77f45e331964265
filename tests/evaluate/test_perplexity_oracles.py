"""Perplexity against the evaluation harness itself and against the published algorithm, both to 1e-4."""

import math
from copy import deepcopy

import pytest
import torch

from secateur.evaluate import loglikelihood_rolling, perplexity

TEXT = (
    "The cat sat on the mat ; it was a « grand » day .\n\nThen the dog came in , and said : who is there ? "
    "Nobody answered , so he went out again .  "
)


def documented(model, ids, context, stride):
    """The sliding windows of Hugging Face's page, with the model's own loss for every window.

    The page multiplies that loss with the labels minus one, in every window; the first value returned here
    does so too, the second weights with what the loss is a mean of.
    """
    published, exact = [0.0, 0], [0.0, 0]
    before = 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        kept = int((labels != -100).sum())
        judged = int((labels[:, 1:] != -100).sum())
        if judged:
            for sums, weight in ((published, kept - 1), (exact, judged)):
                sums[0] += loss * weight
                sums[1] += weight
        before = end
        if end == ids.shape[1]:
            break
    return math.exp(published[0] / published[1]), math.exp(exact[0] / exact[1])


@pytest.mark.parametrize("context", [32, 9])
def test_stride_is_the_documented_algorithm(gpt2, context):
    ids = torch.randint(257, (1, 211))
    for stride in (context // 2, 3, context):
        _, expected = documented(gpt2, ids, context, stride)
        protocol = {"protocol": "windows"} if stride == context else {"protocol": "stride", "stride": stride}
        measured = perplexity(gpt2, ids[0], context=context, **protocol)
        assert measured.value == pytest.approx(expected, rel=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("protocol", ["windows", "stride"])
def test_a_real_model_on_real_text_is_as_documented(stories, protocol):
    model, tokenizer, texts = stories
    text = "\n\n".join(texts[:6])
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    assert ids.shape[1] > 1500
    published, exact = documented(model, ids, 512, 512 if protocol == "windows" else 256)
    measured = perplexity(model, text, tokenizer=tokenizer, protocol=protocol)
    assert measured.value == pytest.approx(exact, rel=1e-4)
    # The page's weights move the figure by far less than the protocol does.
    assert measured.value == pytest.approx(published, rel=2e-3)


def harness_figures(model, tokenizer, documents):
    """Word and byte perplexity and bits per byte by lm-evaluation-harness's own classes."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'secateur[harness]'")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    # The package gives the tokenizer a padding token: not this one.
    harness = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=2)
    requests = [Instance("loglikelihood_rolling", {"page": text}, (text,), 0) for text in documents]
    losses = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    rows = [process_results({"page": text}, (loss,)) for text, loss in zip(documents, losses, strict=True)]
    column = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "word_perplexity": weighted_perplexity(column["word_perplexity"]),
        "byte_perplexity": weighted_perplexity(column["byte_perplexity"]),
        "bits_per_byte": bits_per_byte(column["bits_per_byte"]),
    }


def assert_same_figures(model, tokenizer, documents):
    expected = harness_figures(model, tokenizer, documents)
    measured = loglikelihood_rolling(model, documents, tokenizer)
    assert {name: m.value for name, m in measured.items()} == pytest.approx(expected, rel=1e-4)
    word = perplexity(model, documents, tokenizer=tokenizer, protocol="lm-eval")
    assert word == measured["word_perplexity"]


def test_word_and_byte_level_are_the_harness_s(gpt2, byte_tokenizer):
    """A tokenizer without special tokens, texts shorter and longer than the 32 positions."""
    assert_same_figures(gpt2, byte_tokenizer, [TEXT, TEXT[:32], TEXT[:33], TEXT[:64], TEXT[:65], "a"])


def test_a_text_that_begins_with_the_prefix_is_treated_as_the_harness_does(gpt2, byte_tokenizer):
    assert_same_figures(gpt2, byte_tokenizer, ["<|endoftext|>" + TEXT])


def test_a_tokenizer_that_adds_special_tokens_is_treated_as_the_harness_does(gpt2, byte_tokenizer):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    end = "<|endoftext|>"
    inner.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end)
    assert tokenizer("a")["input_ids"][0] == 256
    assert_same_figures(gpt2, tokenizer, [TEXT, end + TEXT])


@pytest.mark.shared
def test_a_real_model_on_real_text_is_as_the_harness_says(stories):
    model, tokenizer, texts = stories
    assert_same_figures(model, tokenizer, texts[:6])


def test_the_rolling_loss_is_the_plain_sum_over_the_text(gpt2, byte_tokenizer):
    """Independent of the harness: one token at a time, each with the longest context its window gives it."""
    ids = [256, *byte_tokenizer(TEXT[:80])["input_ids"]]  # one token per byte
    loss, context = 0.0, 32
    length = len(ids) - 1
    assert length == 82
    for start in range(0, length, context):
        stop = min(start + context, length)
        first = max(0, stop - context)
        with torch.no_grad():
            scores = gpt2(torch.tensor([ids[first:stop]])).logits[0].double().log_softmax(dim=-1)
        loss -= sum(scores[at - first, ids[at + 1]].item() for at in range(start, stop))
    measured = loglikelihood_rolling(gpt2, TEXT[:80], byte_tokenizer)
    assert measured["bits_per_byte"].value == pytest.approx(loss / length / math.log(2), rel=1e-5)
