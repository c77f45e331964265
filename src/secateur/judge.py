"""`secateur evaluate`: every measurement that a user may ask of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur import data, evaluate
from secateur.errors import UsageError
from secateur.evaluate import Measurement
from secateur.measure import Tell, Yardstick, measure
from secateur.model import Loaded
from secateur.request import spec_name
from secateur.sources import example_of, writes_text

__all__ = ["Wanted", "judge", "summarize"]


@dataclass(frozen=True)
class Wanted:
    """What `secateur evaluate` was asked for; see its options."""

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
    found: list[Measurement] = []
    text = _text(loaded, wanted)
    if text is not None:
        found += _perplexity(loaded, text, wanted, tell)
        if dense is not None:
            found += _against(loaded, dense, text, wanted, tell)
    elif dense is not None:
        raise UsageError("--reference compares predictions on text; this model reads none")
    labelled = data.read_batches(wanted.labelled, seed=wanted.seed) if wanted.labelled else None
    example = loaded.example
    if loaded.tokenizer is not None:
        example = example_of(loaded.model, data.stream(text or ["one two three"], loaded.tokenizer))
    elif example is None and labelled:
        example = labelled[0][0] if isinstance(labelled[0], tuple | list) else None
    named = spec_name(wanted.labelled) if wanted.labelled else ""
    found += measure(
        loaded.model, Yardstick(labelled=labelled, labelled_name=named, example=example, tell=tell)
    )
    if loaded.folder is not None:
        found.append(evaluate.disk_bytes(loaded.folder, "*.safetensors"))
    if wanted.speed and example is not None:
        found += _speed(loaded, example)
    if wanted.summaries:
        found += _rouge(loaded, wanted, tell)
    if wanted.tasks:
        scores = evaluate.harness(loaded.model, loaded.tokenizer, wanted.tasks.split(","), limit=wanted.limit)
        found += scores.values()
    return found


def _text(loaded: Loaded, wanted: Wanted) -> list[str] | None:
    if loaded.tokenizer is None or not writes_text(loaded.model):
        if wanted.data:
            raise UsageError("--data measures perplexity, which needs a causal language model with a tokenizer")
        return None
    return data.read_text(wanted.data or data.PYTHON_DOCS)


def _perplexity(loaded: Loaded, text: list[str], wanted: Wanted, tell: Tell) -> list[Measurement]:
    name = spec_name(wanted.data or data.PYTHON_DOCS)
    options: dict[str, Any] = {
        "context": wanted.context,
        "dataset": name,
        "progress": lambda done, total: tell("perplexity", done, total),
    }
    if wanted.protocol == "lm-eval":
        if wanted.stride or wanted.max_tokens:
            raise UsageError(
                "protocol lm-eval reads whole documents and has no stride; leave --stride and --max-tokens out"
            )
        return list(evaluate.loglikelihood_rolling(loaded.model, text, loaded.tokenizer, **options).values())
    ids = data.stream(text, loaded.tokenizer, model=loaded.model)[: wanted.max_tokens]
    if wanted.stride:
        options["stride"] = wanted.stride
    return [evaluate.perplexity(loaded.model, ids, protocol=wanted.protocol, **options)]


def _against(loaded: Loaded, dense: Loaded, text: list[str], wanted: Wanted, tell: Tell) -> list[Measurement]:
    ids = data.stream(text, loaded.tokenizer, model=loaded.model)[: wanted.max_tokens]
    found = evaluate.divergence(
        loaded.model,
        dense.model,
        ids,
        context=wanted.context,
        dataset=spec_name(wanted.data or data.PYTHON_DOCS),
        progress=lambda done, total: tell("comparison with the reference", done, total),
    )
    return list(found.values())


def _speed(loaded: Loaded, example: Any) -> list[Measurement]:
    """Latency and the memory it takes; for a language model also tokens read per second."""
    memory, speed = evaluate.peak_memory(lambda: evaluate.latency(loaded.model, example))
    found = [speed, memory]
    if isinstance(example, dict) and writes_text(loaded.model):
        found.append(evaluate.throughput(loaded.model, example["input_ids"]))
    return found


def _rouge(loaded: Loaded, wanted: Wanted, tell: Tell) -> list[Measurement]:
    """ROUGE of summaries that the model writes, beside the documents' first three sentences."""
    parts = (wanted.summaries or "").split(":")
    path, fields = parts[0], (parts[1:] + ["document", "summary"][len(parts) - 1 :])[:2]
    if loaded.tokenizer is None:
        raise UsageError("--summaries needs a model with a tokenizer")
    documents, references = (data.read_text(f"{path}:{name}")[: wanted.limit] for name in fields)
    if len(documents) != len(references):
        raise UsageError(f"{path}: {len(documents)} documents but {len(references)} summaries")
    written = []
    for done, document in enumerate(documents):
        written.append(summarize(loaded, document))
        tell("summaries", done + 1, len(documents))
    lead = [" ".join(document.replace("\n", " ").split(". ")[:3]) for document in documents]
    found = list(evaluate.rouge(written, references).values())
    baseline = evaluate.rouge(lead, references)
    return found + [Measurement(f"lead3_{name}", m.value, m.unit, m.conditions) for name, m in baseline.items()]


@torch.no_grad()
def summarize(loaded: Loaded, document: str, new_tokens: int = 64) -> str:
    """A greedy summary; of a causal model only what it wrote after the prompt, never the prompt itself."""
    model, tokenizer = loaded.model, loaded.tokenizer
    decoder_only = writes_text(model)
    room = (getattr(model.config, "max_position_embeddings", None) or 1024) - new_tokens - 8
    ids = tokenizer(document, truncation=True, max_length=max(8, room), return_tensors="pt").input_ids
    if decoder_only:
        cue = tokenizer("\nTL;DR:", add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([ids, cue], dim=1)
    ids = ids.to(next(model.parameters()).device)
    made: Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(made[0, ids.shape[1] if decoder_only else 0 :], skip_special_tokens=True).strip()
