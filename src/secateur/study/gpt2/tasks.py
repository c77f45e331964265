"""What every row is asked: to predict text, to tell reviews apart, to write summaries, and to do it in time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur import evaluate
from secateur.core.forward import undisturbed
from secateur.core.masks import Masks
from secateur.evaluate import Measurement
from secateur.evaluate.corpus import positions
from secateur.measure import Tell
from secateur.recover import finetune_

from .classifier import Classifier, fitted
from .given import Articles, Given, Plan, Reviews, article_batches, lead, prompt, review_batches
from .variants import Made

READ = 128  # tokens of the timed forward pass, fewer where the model takes no more

__all__ = ["Tasks", "lead_scores", "speed", "written"]


class Tasks:
    """What one model is asked, before and after fine-tuning.

    Args:
        made: the model; not changed.
        given: the data.
        plan: sizes and settings.
        tokenizer: the model's.
        tell: progress.
    """

    def __init__(self, made: Made, given: Given, plan: Plan, tokenizer: Any, tell: Tell) -> None:
        self.made, self.given, self.plan, self.tokenizer, self.tell = made, given, plan, tokenizer, tell

    def before(self) -> dict[str, Measurement]:
        """Perplexity, accuracy of a head fitted on the model as it is, and summaries that it was never shown."""
        found = {"perplexity": _perplexity(self.made.model, self.given)}
        if self.given.reviews is not None:
            found["accuracy"] = self._accuracy(self.classifier, self.given.reviews)
        if self.given.articles is not None:
            found |= self._summaries(self.made.model, self.given.articles)
        return found

    def after(self) -> dict[str, Measurement]:
        """The same after the same fine-tuning, on each task's own training part."""
        found = {"perplexity": _perplexity(self._tuned(self.given.train), self.given)}
        if self.given.reviews is not None:
            found["accuracy"] = self._accuracy(self._tuned_classifier(self.given.reviews), self.given.reviews)
        if self.given.articles is not None:
            shown = article_batches(self.given.articles.train, self.tokenizer, self.plan)
            found |= self._summaries(self._tuned(shown), self.given.articles)
        return found

    @cached_property
    def classifier(self) -> Classifier:
        """The model with a head fitted on it."""
        assert self.given.reviews is not None
        shown = review_batches(self.given.reviews.train, self.tokenizer, self.plan.context // 2, 32)
        return fitted(self.made.model, shown, self.given.reviews.classes)

    def _tuned_classifier(self, reviews: Reviews) -> nn.Module:
        """The whole trained on from that head."""
        model, masks = copy.deepcopy(self.classifier), None
        if self.made.masks is not None:
            masks = Masks({f"model.{name}": mask for name, mask in self.made.masks.items()})
        rows = reviews.train[: self.plan.tuned_reviews]
        shown = review_batches(rows, self.tokenizer, self.plan.context // 2, self.plan.batch)
        self._tune_(model, [_pair(batch) for batch in shown], masks, "single-label")
        return model

    def _tuned(self, batches: list[Any]) -> nn.Module:
        model = copy.deepcopy(self.made.model)
        self._tune_(model, batches, self.made.masks, "language-model")
        return model

    def _tune_(self, model: nn.Module, batches: list[Any], masks: Masks | None, loss: str) -> None:
        plan = self.plan
        finetune_(model, batches, masks, loss=loss, epochs=1, lr=plan.lr, seed=plan.seed, tell=self.tell)

    def _accuracy(self, model: nn.Module, reviews: Reviews) -> Measurement:
        judged = review_batches(reviews.test, self.tokenizer, self.plan.context // 2, 32)
        return evaluate.accuracy(model, [_pair(batch) for batch in judged], dataset=reviews.name)

    def _summaries(self, model: nn.Module, articles: Articles) -> dict[str, Measurement]:
        said = written(model, [document for document, _ in articles.test], self.plan, self.tokenizer)
        return evaluate.rouge(said, [summary for _, summary in articles.test], dataset=articles.name)


def _pair(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]


def _perplexity(model: nn.Module, given: Given) -> Measurement:
    return evaluate.perplexity(model, given.text, dataset=given.text_name)


def lead_scores(articles: Articles) -> dict[str, Measurement]:
    """ROUGE of the first three sentences of each article."""
    return evaluate.rouge(
        [lead(document) for document, _ in articles.test],
        [summary for _, summary in articles.test],
        dataset=articles.name,
    )


def written(model: Any, documents: Sequence[str], plan: Plan, tokenizer: Any) -> list[str]:
    """A summary for each document, greedily; the prompt is cut off, and so is all from the first line end on."""
    found = []
    with undisturbed(model):
        for start in range(0, len(documents), plan.batch):
            rows = [prompt(document, tokenizer, plan) for document in documents[start : start + plan.batch]]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # padded where reading begins
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            said = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=plan.new_tokens, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            new = said[:, width:]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            found += [text.strip().split("\n")[0] for text in texts]
    return found


class _Writing(nn.Module):
    """Greedy generation of exactly so many tokens, so that it can be timed like a forward pass."""

    def __init__(self, model: Any, tokens: int, end: int) -> None:
        super().__init__()
        self.model, self.tokens, self.end = model, tokens, end

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.tokens,
            min_new_tokens=self.tokens, do_sample=False, pad_token_id=self.end,
        )  # fmt: skip


def speed(base: nn.Module, made: Made, given: Given, plan: Plan, tokenizer: Any) -> dict[str, Measurement]:
    """Size, and times measured in turns with the baseline: reading 128 tokens, and writing exactly so many after 32."""
    most = positions(base) or READ
    ids = given.text[None, : min(READ, most)]
    model = made.model
    found = {
        "parameters": evaluate.parameters(model),
        "nonzeros": evaluate.nonzeros(model),
    }
    pair = evaluate.paired_latency({"baseline": base, "this": model}, ids, repeats=plan.repeats)
    found |= {"latency": pair.latency["this"], "speedup": pair.speedup["this"]}
    writing = {
        name: _Writing(each, plan.new_tokens, tokenizer.eos_token_id)
        for name, each in (("baseline", base), ("this", model))
    }
    start, repeats = ids[:, : min(32, most - plan.new_tokens)], max(2, plan.repeats // 3)
    pair = evaluate.paired_latency(writing, start, repeats=repeats, warmup=1)
    return found | {"generation": pair.latency["this"], "generation speedup": pair.speedup["this"]}
