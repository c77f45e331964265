"""`secateur evaluate`: every measurement that a user may ask of one model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur import data, evaluate
from secateur.errors import UsageError, nearest
from secateur.evaluate import PROTOCOLS, Measurement
from secateur.evaluate.corpus import positions
from secateur.measure import Tell, Yardstick, answers, measure, running_on, same_answers, weight_files
from secateur.model import Loaded
from secateur.request import spec_name
from secateur.sources import example_of, input_of, writes_text

__all__ = ["Wanted", "judge", "lead", "summarize"]

NEW_TOKENS = 64  # of a summary


@dataclass(frozen=True)
class Wanted:
    """What `secateur evaluate` was asked for; see its options.

    Raises:
        UsageError: an unknown protocol, or an option that belongs to another one.
    """

    data: str | None = None
    protocol: str = "windows"
    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    labelled: str | None = None
    summaries: str | None = None
    tasks: str | None = None
    limit: int | None = None
    speed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"--protocol {self.protocol!r} is not known; {nearest(self.protocol, PROTOCOLS)}")
        if self.stride is not None and self.protocol != "stride":
            raise UsageError(f"--stride belongs to --protocol stride, got {self.protocol}")
        if self.max_tokens is not None and self.protocol == "lm-eval":
            raise UsageError("--protocol lm-eval reads whole documents; leave --max-tokens out")

    @property
    def text(self) -> str:
        """The text to measure perplexity on."""
        return self.data or data.PYTHON_DOCS


def judge(loaded: Loaded, dense: Loaded | None, wanted: Wanted, tell: Tell) -> list[Measurement]:
    """Measure a model.

    Args:
        loaded: the model.
        dense: a model to compare predictions with, or None.
        wanted: what to measure.
        tell: progress.

    Raises:
        UsageError: something was asked that this model or these data cannot answer.
    """
    reads = loaded.tokenizer is not None and writes_text(loaded.model)
    if wanted.data and not reads:
        raise UsageError("--data measures perplexity, which needs a causal language model with a tokenizer")
    if dense is not None and not reads and not wanted.labelled:
        raise UsageError(
            "--reference compares predictions: on text, which this model does not write, or on --labelled"
        )
    if dense is not None and reads and not writes_text(dense.model):
        raise UsageError("--reference is no causal language model, so predictions of text cannot be compared")
    pairs = _pairs(loaded, wanted) if wanted.summaries else None
    found: list[Measurement] = []
    example = loaded.example
    if reads:
        text = data.read_text(wanted.text)
        ids = data.stream(text, loaded.tokenizer, model=loaded.model)[: wanted.max_tokens]
        found += _perplexity(loaded, text, ids, wanted, tell)
        found += _against(loaded, dense, ids, wanted, tell) if dense is not None else []
        example = example_of(loaded.model, ids)
    labelled = data.read_batches(wanted.labelled, seed=wanted.seed) if wanted.labelled else None
    if example is None and labelled:
        example = input_of(labelled[0])
    if example is None and loaded.tokenizer is not None:
        example = example_of(loaded.model, data.stream(["one two three"], loaded.tokenizer))
    named = spec_name(wanted.labelled) if wanted.labelled else ""
    by = Yardstick(labelled=labelled, labelled_name=named, example=example, tell=tell)
    said = answers(loaded.model, by)
    if loaded.dense is None:
        found += measure(loaded.model, by, said)
    else:  # a packed model is counted by its dense twin; what it holds in memory is its own
        counted = measure(loaded.dense, by, said)
        found += [evaluate.state_bytes(loaded.model) if m.name == "state_bytes" else m for m in counted]
    if dense is not None and not reads:
        found += same_answers(said, answers(dense.model, by))
    found += weight_files(loaded.weights) if loaded.weights is not None else []
    if wanted.speed and example is not None:
        found += _speed(loaded, example, tell)
    if pairs is not None:
        found += _rouge(loaded, *pairs, spec_name(str(wanted.summaries)), tell)
    if wanted.tasks:
        tasks = [name.strip() for name in wanted.tasks.split(",") if name.strip()]
        found += evaluate.harness(loaded.model, loaded.tokenizer, tasks, limit=wanted.limit).values()
    return found


def _perplexity(loaded: Loaded, text: list[str], ids: Tensor, wanted: Wanted, tell: Tell) -> list[Measurement]:
    options: dict[str, Any] = {
        "context": wanted.context,
        "dataset": spec_name(wanted.text),
        "progress": lambda done, total: tell("perplexity", done, total),
    }
    if wanted.protocol == "lm-eval":
        return list(evaluate.loglikelihood_rolling(loaded.model, text, loaded.tokenizer, **options).values())
    if wanted.stride:
        options["stride"] = wanted.stride
    return [evaluate.perplexity(loaded.model, ids, protocol=wanted.protocol, **options)]


def _against(loaded: Loaded, dense: Loaded, ids: Tensor, wanted: Wanted, tell: Tell) -> list[Measurement]:
    found = evaluate.divergence(
        loaded.model,
        dense.model,
        ids,
        context=wanted.context,
        dataset=spec_name(wanted.text),
        progress=lambda done, total: tell("comparison with the reference", done, total),
    )
    return list(found.values())


def _speed(loaded: Loaded, example: Any, tell: Tell) -> list[Measurement]:
    """Latency and the memory it takes; for a language model also tokens read per second."""
    tell("latency", 0, 1)
    with running_on("the example input"):
        memory, speed = evaluate.peak_memory(lambda: evaluate.latency(loaded.model, example))
    found = [speed, memory]
    if isinstance(example, dict) and writes_text(loaded.model):
        found.append(evaluate.throughput(loaded.model, example["input_ids"]))
    tell("latency", 1, 1)
    return found


def _pairs(loaded: Loaded, wanted: Wanted) -> tuple[list[str], list[str]]:
    """Documents and the summaries that people wrote of them."""
    path, *fields = (wanted.summaries or "").split(":")
    if len(fields) > 2:
        raise UsageError(f"--summaries {wanted.summaries}: expected FILE:document:summary, two fields at most")
    if loaded.tokenizer is None or not hasattr(loaded.model, "generate"):
        raise UsageError("--summaries needs a model that writes text, with its tokenizer")
    fields = [*fields, *("document", "summary")[len(fields) :]]
    documents, references = (data.read_text(f"{path}:{name}") for name in fields)
    if len(documents) != len(references):
        raise UsageError(
            f"{path}: {len(documents)} rows have a {fields[0]} and {len(references)} a {fields[1]}; each needs both"
        )
    return documents[: wanted.limit], references[: wanted.limit]


def _rouge(
    loaded: Loaded, documents: list[str], references: list[str], name: str, tell: Tell
) -> list[Measurement]:
    """ROUGE of summaries that the model writes, beside the documents' first three sentences."""
    written = []
    for done, document in enumerate(documents):
        tell("summaries", done, len(documents))
        written.append(summarize(loaded, document))
    tell("summaries", len(documents), len(documents))
    found = evaluate.rouge(written, references, dataset=name)
    said = {"method": f"greedy, at most {NEW_TOKENS} new tokens"}
    measured = [Measurement(m.name, m.value, m.unit, {**m.conditions, **said}) for m in found.values()]
    baseline = evaluate.rouge([lead(document) for document in documents], references, dataset=name)
    return measured + [
        Measurement(f"lead3_{kind}", m.value, m.unit, m.conditions) for kind, m in baseline.items()
    ]


def lead(document: str, sentences: int = 3) -> str:
    """The first sentences of a document, the baseline that summaries have to beat.

    Example:
        >>> lead("One. Two! Three? Four.")
        'One. Two! Three?'
    """
    ends = [found.end() for found in re.finditer(r"[.!?]+[\"')\]]*(?=\s|$)", document)]
    return document[: ends[sentences - 1]] if len(ends) >= sentences else document


@torch.no_grad()
def summarize(loaded: Loaded, document: str, new_tokens: int = NEW_TOKENS) -> str:
    """A greedy summary; of a causal model only what it wrote after the prompt, never the prompt itself.

    The document is cut so that prompt and summary fit into the model's positions.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    decoder_only = writes_text(model)
    cue = tokenizer("\nTL;DR:", add_special_tokens=False)["input_ids"] if decoder_only else []
    places = positions(model) or 1024
    new_tokens = min(new_tokens, places // 2)
    room = places - len(cue) - (new_tokens if decoder_only else 0)
    if room < 2:
        raise UsageError(f"a model of {places} positions has no room for a document and its summary")
    ids = torch.tensor([tokenizer(document, truncation=True, max_length=room)["input_ids"] + cue])
    ids = ids.to(next(model.parameters()).device)
    end = tokenizer.eos_token_id
    made: Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    )
    return tokenizer.decode(made[0, ids.shape[1] if decoder_only else 0 :], skip_special_tokens=True).strip()
