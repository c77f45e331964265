import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.evaluate import rouge

sentences = st.lists(
    st.sampled_from(["the", "cat", "cats", "sat", "on", "a", "mat", "dog"]), min_size=1, max_size=8
).map(" ".join)


def f_measure(shared, predicted, true):
    return 2 * shared / (predicted + true) if shared else 0.0


def overlap(prediction, reference, n):
    """Shared n-grams, each as often as it occurs in both, by removing them one by one."""
    ours, theirs = (
        [words[at : at + n] for at in range(len(words) - n + 1)] for words in (prediction, reference)
    )
    left, shared = list(theirs), 0
    for gram in ours:
        if gram in left:
            left.remove(gram)
            shared += 1
    return f_measure(shared, len(ours), len(theirs))


def common(a, b):
    """Longest common subsequence by plain recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


def by_hand(prediction, reference):
    p, r = prediction.split(), reference.split()
    longest = f_measure(common(p, r), len(p), len(r))
    return {"rouge1": overlap(p, r, 1), "rouge2": overlap(p, r, 2), "rougeL": longest}


@given(st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_rouge_is_what_its_definition_says_and_the_best_reference_counts(examples):
    predictions, references = zip(*examples, strict=True)
    found = rouge(predictions, references)
    for kind in ("rouge1", "rouge2", "rougeL"):
        best = [max(by_hand(p, r)[kind] for r in several) for p, several in examples]
        assert found[kind].value == pytest.approx(sum(best) / len(best))
        assert found[kind].conditions["examples"] == len(examples)


def test_stemming_is_off_unless_asked_for_and_always_said():
    plain, stemmed = rouge(["cats"], ["cat"]), rouge(["cats"], ["cat"], stem=True)
    # The package stems words of more than three letters only.
    assert (plain["rouge1"].value, stemmed["rouge1"].value) == (0.0, 1.0)
    assert plain["rouge1"].conditions["note"] == "no stemming"
    assert stemmed["rouge1"].conditions["note"] == "Porter stemming"


def test_an_empty_prediction_scores_zero():
    assert rouge(["", "a b"], ["a b", "a b"])["rougeL"].value == 0.5


def test_other_scripts_need_a_tokenizer():
    with pytest.raises(
        UsageError, match="example 0: the tokenizer finds no word in the reference '猫が座った'; pass"
    ):
        rouge(["猫が座った"], ["猫が座った"])
    found = rouge(["猫が座った"], ["猫が走った"], tokenize=list, dataset="cats")
    assert found["rouge1"].value == pytest.approx(4 / 5)
    assert dict(found["rouge1"].conditions) == {"dataset": "cats", "examples": 1, "note": "own tokenizer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", ["a"]), "predictions must be a list of texts, got one text; put it into a list"),
        ((["a"], "a"), "references must be a list of texts, got one text; put it into a list"),
        ((["a"], []), "1 predictions and 0 references; give one each"),
        (([], []), "there is no prediction to judge"),
        (([3], ["a"]), "example 0: the prediction must be a text, got int"),
        ((["a"], [[]]), r"example 0: expected a reference text or a list of them, got \[\]"),
        ((["a"], [[3]]), r"example 0: expected a reference text or a list of them, got \[3\]"),
        ((["a"], [" "]), "example 0: the tokenizer finds no word in the reference ' '"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UsageError, match=message):
        rouge(*arguments)


def test_stemming_and_an_own_tokenizer_exclude_each_other():
    with pytest.raises(UsageError, match="stem= belongs to the package's own tokenizer"):
        rouge(["a"], ["a"], stem=True, tokenize=re.compile(r"\w+").findall)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UsageError, match=r"ROUGE needs rouge-score: pip install 'secateur\[metrics\]'"):
        rouge(["a"], ["a"])
