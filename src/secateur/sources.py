"""Which data a run calibrates on and is judged by, from what the user gave or, failing that, from the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur import data, own
from secateur.documents import PYTHON_DOCS
from secateur.errors import UsageError
from secateur.evaluate.corpus import positions
from secateur.measure import Tell, Yardstick
from secateur.model import Loaded
from secateur.request import PruneRequest, spec_name

__all__ = ["Sources", "example_of", "sources", "writes_text"]

EXAMPLE_TOKENS = 128


@dataclass(frozen=True)
class Sources:
    """Calibration batches (None where the score needs none), the yardstick, and remarks for the reader."""

    calibration: Sequence[Any] | None
    by: Yardstick
    notes: tuple[str, ...] = ()


def sources(asked: PruneRequest, loaded: Loaded, *, needs_data: bool, tell: Tell) -> Sources:
    """Everything that a run reads beside the model.

    A causal language model is judged on `evaluate`, else on the held-out last fifth of `data`, else on
    Python's own documentation, which every machine has. Any model is judged on `labelled` where given.

    Raises:
        UsageError: the score needs data and there are none.
    """
    labelled = data.read_batches(asked.labelled, seed=asked.seed) if asked.labelled else None
    if loaded.tokenizer is None or (asked.data and own.is_own(asked.data)):
        return _from_batches(asked, loaded, labelled, needs_data, tell)
    return _from_text(asked, loaded, labelled, needs_data, tell)


def writes_text(model: nn.Module) -> bool:
    """Whether perplexity makes sense: a decoder that predicts the next token."""
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    return bool(can and can()) and not getattr(config, "is_encoder_decoder", False)


def example_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """One input of at most 128 tokens, batch 1, for latency and FLOPs."""
    return _inputs(model, ids[None, :EXAMPLE_TOKENS])


def _inputs(model: nn.Module, ids: Tensor, **rest: Tensor) -> dict[str, Tensor]:
    """Keyword inputs for ids `(batch, tokens)`; an encoder-decoder reads them on both sides."""
    shift = getattr(model, "_shift_right", None) or getattr(
        model, "prepare_decoder_input_ids_from_labels", None
    )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and shift is not None:
        rest = {**rest, "decoder_input_ids": shift(ids)}
        if "attention_mask" in rest:
            rest["decoder_attention_mask"] = rest["attention_mask"]
    return {"input_ids": ids, **rest}


def _from_batches(
    asked: PruneRequest, loaded: Loaded, labelled: list[Any] | None, needs_data: bool, tell: Tell
) -> Sources:
    """A model of the user's own: batches come from functions of theirs."""
    batches = data.read_batches(asked.data, seed=asked.seed, limit=asked.samples) if asked.data else labelled
    if needs_data and not batches:
        raise UsageError(
            f"method {asked.method} needs calibration data; give batches with --data file.py:function (it returns an "
            "iterable of inputs)"
        )
    example = loaded.example
    if example is None and batches:
        first = batches[0]
        example = first[0] if isinstance(first, tuple | list) else first
        example = {k: v for k, v in example.items() if k != "labels"} if isinstance(example, dict) else example
    notes = (
        [] if example is not None else ["No example input is known, so FLOPs and latency were not measured."]
    )
    if labelled is None:
        notes.append("No labelled data were given (--labelled), so accuracy was not measured.")
    named = spec_name(asked.labelled) if asked.labelled else ""
    by = Yardstick(labelled=labelled, labelled_name=named, example=example, tell=tell)
    return Sources(batches if needs_data else None, by, tuple(notes))


def _from_text(
    asked: PruneRequest, loaded: Loaded, labelled: list[Any] | None, needs_data: bool, tell: Tell
) -> Sources:
    model, notes = loaded.model, []
    given = data.read_text(asked.data) if asked.data else None
    context = asked.context or min(positions(model) or 512, 2048)
    held_out, name = None, ""
    if asked.evaluate:
        held_out, name = data.read_text(asked.evaluate), spec_name(asked.evaluate)
    elif given is not None:
        given, held_out = _split(given)
        name = f"held-out fifth of {spec_name(asked.data or '')}"
    else:
        held_out, name = data.read_text(PYTHON_DOCS), PYTHON_DOCS
    ids = data.stream(held_out, loaded.tokenizer, model=model)[: asked.evaluate_tokens]
    calibration = None
    if needs_data:
        calibration = _calibration(asked, loaded, given, context, tell)
        if given is None:
            notes.append(
                "No calibration text was given (--data), so text that the model itself wrote was used."
            )
    text = ids if writes_text(model) else None
    if text is None:
        notes.append("Not a causal language model, so perplexity was not measured.")
    by = Yardstick(
        text=text,
        text_name=name if text is not None else "",
        labelled=labelled,
        labelled_name=spec_name(asked.labelled) if asked.labelled else "",
        example=example_of(model, ids),
        context=context,
        tell=tell,
    )
    return Sources(calibration, by, tuple(notes))


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Documents to calibrate on and documents to judge by; one long document is cut at a blank."""
    if len(texts) >= 5:
        cut = len(texts) - len(texts) // 5
        return texts[:cut], texts[cut:]
    whole = "\n".join(texts)
    cut = whole.find(" ", len(whole) * 4 // 5)
    if cut <= 0:
        raise UsageError(
            "the text is too short to calibrate on and to judge by; give more, or another one with --evaluate"
        )
    return [whole[:cut]], [whole[cut:]]


def _calibration(
    asked: PruneRequest, loaded: Loaded, texts: list[str] | None, context: int, tell: Tell
) -> list[dict[str, Tensor]]:
    """Windows of the given text, or of text that the model samples from itself."""
    model, tokenizer = loaded.model, loaded.tokenizer
    tell("calibration text", 0, 1)
    if texts is not None:
        drawn = data.tokens(
            texts, tokenizer, context=context, samples=asked.samples, seed=asked.seed, model=model
        )
    elif writes_text(model):
        drawn = data.self_generated(
            model, tokenizer, context=min(context, 256), samples=asked.samples, seed=asked.seed
        )
    else:
        raise UsageError(
            f"method {asked.method} needs calibration data, and this model writes no text of its own; give --data TEXT"
        )
    tell("calibration text", 1, 1)
    return [_inputs(model, batch["input_ids"], attention_mask=batch["attention_mask"]) for batch in drawn]
