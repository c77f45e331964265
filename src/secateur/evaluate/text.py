"""How close generated text comes to reference text: ROUGE-1, ROUGE-2 and ROUGE-L."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from secateur.errors import UsageError
from secateur.measurement import Condition, Measurement

__all__ = ["rouge"]

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    stem: bool = False,
    tokenize: Callable[[str], list[str]] | None = None,
    dataset: str = "",
) -> dict[str, Measurement]:
    """Mean F-measures of ROUGE-1, ROUGE-2 (shared n-grams) and ROUGE-L (longest common subsequence).

    Computed by Google's rouge-score package. ROUGE-L is over the whole text; newlines do not split it.

    Args:
        predictions: one text per example; an empty one scores 0.
        references: one text per example, or several, of which the best counts, separately for each kind.
        stem: strip English suffixes (Porter) before comparing, as many papers do.
        tokenize: text to words. The package's own keeps a-z and 0-9 only, so text in other scripts needs one.
        dataset: a name for the data, kept in the conditions.

    Returns:
        `rouge1`, `rouge2` and `rougeL`, fractions in [0, 1].

    Raises:
        UsageError: no examples, lists of different length, an example without a reference, a reference with
            no word that the tokenizer sees, `stem` together with `tokenize`, or rouge-score is missing.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), as in rouge-score.

    Example:
        >>> scores = rouge(["the cat sat"], [["the cat sat down", "a dog"]])
        >>> print(scores["rouge1"])
        rouge1 0.8571 (1 example, no stemming)
    """
    _check(predictions, references)
    if stem and tokenize is not None:
        raise UsageError("stem= belongs to the package's own tokenizer; stem inside tokenize= instead")
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise UsageError("ROUGE needs rouge-score: pip install 'secateur[metrics]'") from error
    tokenizer: Any = _Tokenizer(tokenize) if tokenize else DefaultTokenizer(stem)
    scorer = RougeScorer(list(KINDS), tokenizer=tokenizer)
    totals = dict.fromkeys(KINDS, 0.0)
    for number, (prediction, given) in enumerate(zip(predictions, references, strict=True)):
        options = [given] if isinstance(given, str) else list(given)
        for option in options:
            if not tokenizer.tokenize(option):
                raise UsageError(
                    f"example {number}: the tokenizer finds no word in the reference {option[:40]!r}; "
                    "pass tokenize= for scripts other than a-z"
                )
        scores = scorer.score_multi(options, prediction)
        for kind in KINDS:
            totals[kind] += float(scores[kind].fmeasure)
    conditions: dict[str, Condition] = {"dataset": dataset, "examples": len(predictions)}
    conditions["note"] = "own tokenizer" if tokenize else "Porter stemming" if stem else "no stemming"
    return {kind: Measurement(kind, totals[kind] / len(predictions), "1", conditions) for kind in KINDS}


class _Tokenizer:
    """A function in the form rouge-score asks for."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


def _check(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> None:
    for label, given in (("predictions", predictions), ("references", references)):
        if isinstance(given, str):
            raise UsageError(f"{label} must be a list of texts, got one text; put it into a list")
    if len(predictions) != len(references):
        raise UsageError(f"{len(predictions)} predictions and {len(references)} references; give one each")
    if not predictions:
        raise UsageError("there is no prediction to judge")
    for number, (prediction, given) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise UsageError(
                f"example {number}: the prediction must be a text, got {type(prediction).__name__}"
            )
        options = [given] if isinstance(given, str) else given
        if not options or not all(isinstance(option, str) for option in options):
            raise UsageError(f"example {number}: expected a reference text or a list of them, got {given!r}")
