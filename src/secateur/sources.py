"""Which data a run calibrates on and is judged by, from what the user gave or, failing that, from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur import data, mixes, own
from secateur.core.digest import digest
from secateur.core.forward import call, undisturbed
from secateur.errors import UsageError
from secateur.evaluate.corpus import context_for, positions
from secateur.measure import Tell, Yardstick
from secateur.model import Loaded
from secateur.request import spec_name

__all__ = [
    "Asked",
    "Calibration",
    "Sources",
    "calibration",
    "context_of",
    "digest",
    "example_of",
    "input_of",
    "sources",
    "split",
    "writes_text",
]

EXAMPLE_TOKENS = 128
CONTEXT = 2048  # tokens in a calibration window at most, unless the user says otherwise


class Asked(Protocol):
    """What a request says of data; `PruneRequest` and `DepthRequest` do."""

    @property
    def method(self) -> str | None: ...  # noqa: D102
    @property
    def data(self) -> str | None: ...  # noqa: D102
    @property
    def samples(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int | None: ...  # noqa: D102
    @property
    def evaluate(self) -> str | None: ...  # noqa: D102
    @property
    def labelled(self) -> str | None: ...  # noqa: D102
    @property
    def evaluate_tokens(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Calibration:
    """Data for the statistics.

    Attributes:
        name: for people.
        batches: gives them, which may take a while.
        tokens: in all of them; None where the inputs are no tokens.
        piece: one of them, or something of its form, to tell the time by.
    """

    name: str
    batches: Callable[[], Sequence[Any]]
    tokens: int | None = None
    piece: Any = None


@dataclass(frozen=True)
class Sources:
    """Calibration data (None where the score needs none), the yardstick, and remarks for the reader."""

    calibration: Calibration | None
    by: Yardstick
    notes: tuple[str, ...] = ()


def sources(asked: Asked, loaded: Loaded, *, needs_data: bool, tell: Tell, labels: bool = False) -> Sources:
    """Everything that a run reads beside the model.

    A causal language model is judged on `evaluate`, else on the held-out last fifth of `data`, else on
    Python's own documentation, which every machine has. Any model is judged on `labelled` where given. With `labels`
    calibration batches of the user's own keep theirs, for scores that need a loss.

    Raises:
        UsageError: the score needs data and there are none, or data of a kind that this model cannot use.
    """
    labelled = data.read_batches(asked.labelled, seed=asked.seed) if asked.labelled else None
    if loaded.tokenizer is None:
        for flag, given in (("--data", asked.data), ("--evaluate", asked.evaluate)):
            if given and (flag == "--evaluate" or not own.is_own(given)):
                raise UsageError(
                    f"{flag} {given}: this model has no tokenizer and reads no text; give batches with "
                    f"{'--labelled' if flag == '--evaluate' else flag} file.py:function"
                )
    if loaded.tokenizer is None or not writes_text(loaded.model):
        found = _without_perplexity(asked, loaded, labelled, needs_data, tell)
    else:
        found = _with_perplexity(asked, loaded, labelled, needs_data, tell)
    given = asked.data if asked.data and own.is_own(asked.data) else None
    whole = _own_batches(asked) if given else labelled
    if labels and found.calibration is not None and whole is not None and (given or not asked.data):
        ready = whole[: asked.samples]  # a score of gradients needs what the others do without
        found = replace(found, calibration=replace(found.calibration, batches=lambda: ready))
    return found


def calibration(asked: Asked, loaded: Loaded, tell: Tell) -> Calibration:
    """What `data` alone says, for a model that is not judged."""
    given = _own_batches(asked) if asked.data and own.is_own(asked.data) else None
    return _calibration(asked, loaded, given, None, tell)


def writes_text(model: nn.Module) -> bool:
    """Whether perplexity makes sense: a decoder that predicts the next token."""
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    return bool(can and can()) and not getattr(config, "is_encoder_decoder", False)


def example_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor] | None:
    """One input for latency and FLOPs: at most 128 tokens, batch 1; None for a model that wants more than tokens."""
    example = _inputs(model, ids[None, : min(EXAMPLE_TOKENS, positions(model) or EXAMPLE_TOKENS)])
    try:
        with undisturbed(model):
            call(model, {name: tensor.to(_device(model)) for name, tensor in example.items()})
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        return None  # a model of images and text, of sound ...
    return example


def input_of(batch: Any) -> Any:
    """The input in a batch `(input, labels)`, in a mapping with `labels`, or that is an input itself."""
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, Mapping) else batch


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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


def _without_perplexity(
    asked: Asked, loaded: Loaded, labelled: list[Any] | None, needs_data: bool, tell: Tell
) -> Sources:
    """Models of images, tables, sound; classifiers; encoder-decoders: judged by labelled batches alone."""
    if asked.evaluate:
        raise UsageError(
            "--evaluate measures perplexity, which only a causal language model has; judge this model with "
            "--labelled file.py:function"
        )
    given = _own_batches(asked) if asked.data and own.is_own(asked.data) else None
    notes = []
    calibration = None
    if needs_data:
        calibration = _calibration(asked, loaded, given, labelled, tell)
        if not asked.data:
            notes.append("No --data was given, so the batches of --labelled served for calibration as well.")
    elif asked.data and given is None:
        mixes.read_texts(asked.data)  # a name that is wrong is told even where the text is not needed
        notes.append(f"Method {asked.method} needs no data, so those of --data were not used.")
    example = loaded.example
    if example is None and (batches := labelled or given):
        example = input_of(batches[0])
    if example is None and loaded.tokenizer is not None:
        example = example_of(loaded.model, data.stream(["one two three"], loaded.tokenizer))
    if loaded.tokenizer is not None:
        notes.append("Not a causal language model, so perplexity was not measured.")
    if example is None:
        notes.append("No example input is known, so FLOPs and latency were not measured.")
    if labelled is None:
        notes.append("No labelled data were given (--labelled), so accuracy was not measured.")
    named = spec_name(asked.labelled) if asked.labelled else ""
    by = Yardstick(labelled=labelled, labelled_name=named, example=example, tell=tell)
    return Sources(calibration, by, tuple(notes))


def _with_perplexity(
    asked: Asked, loaded: Loaded, labelled: list[Any] | None, needs_data: bool, tell: Tell
) -> Sources:
    """Causal language models."""
    mine = bool(asked.data) and own.is_own(asked.data or "")
    given: list[Any] | None = None
    if asked.data:
        given = _own_batches(asked) if mine else mixes.read_texts(asked.data)
    held_out: Any = asked.evaluate or data.PYTHON_DOCS
    if given is not None and not mine and not asked.evaluate:
        given, held_out = mixes.cut_each(given, split)
        name = f"held-out fifth of {mixes.mix_name(asked.data or '')}"
    else:
        held_out, name = [(mixes.Share(held_out, 1.0), data.read_text(held_out))], spec_name(held_out)
    calibration = _calibration(asked, loaded, given, None, tell) if needs_data else None
    notes = []
    if needs_data and given is None:
        notes.append("No calibration text was given (--data), so text that the model itself writes is used.")
    ids = _judged(held_out, loaded, asked.evaluate_tokens)
    by = Yardstick(
        text=ids,
        text_name=name,
        labelled=labelled,
        labelled_name=spec_name(asked.labelled) if asked.labelled else "",
        example=example_of(loaded.model, ids),
        context=context_of(asked, loaded),
        tell=tell,
    )
    return Sources(calibration, by, tuple(notes))


def _judged(texts: Sequence[tuple[mixes.Share, Sequence[str]]], loaded: Loaded, most: int) -> Tensor:
    """The tokens to judge by: of each text of a mix the first, in its share."""
    rows = []
    for part, documents in texts:
        row = data.stream(documents, loaded.tokenizer, model=loaded.model)
        rows.append(row[: max(2, round(part.share * most))])
    return torch.cat(rows)


def _own_batches(asked: Asked) -> list[Any]:
    return data.read_batches(str(asked.data), seed=asked.seed, limit=asked.samples)


def context_of(asked: Asked, loaded: Loaded) -> int:
    """Tokens in a window of text: as asked, or what the model takes, at most 2048."""
    if asked.context is not None:
        return context_for(loaded.model, asked.context)
    return min(positions(loaded.model) or 512, CONTEXT)


def split(texts: list[str]) -> tuple[list[str], list[str]]:
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
    asked: Asked, loaded: Loaded, given: list[Any] | None, labelled: list[Any] | None, tell: Tell
) -> Calibration:
    """Batches of the user's own, windows of the given text, or text that the model will write itself."""
    model, tokenizer, context = loaded.model, loaded.tokenizer, context_of(asked, loaded)
    if asked.data and own.is_own(asked.data) and given is not None:
        inputs = [input_of(batch) for batch in given]
        return _ready(f"{len(inputs)} batches of {spec_name(asked.data)}", inputs)
    if asked.data:
        texts = given if given is not None else mixes.read_texts(asked.data)
        tell("calibration text", 0, 1)
        drawn, said = mixes.drawn_from(
            texts, tokenizer, context=context, samples=asked.samples, seed=asked.seed, model=model
        )
        tell("calibration text", 1, 1)
        ready = [_inputs(model, batch["input_ids"], attention_mask=batch["attention_mask"]) for batch in drawn]
        counted = sum(int(batch["attention_mask"].sum()) for batch in ready)
        return Calibration(f"{said}, at most {context} tokens each", lambda: ready, counted, ready[0])
    if labelled is not None:
        taken = [input_of(batch) for batch in labelled[: asked.samples]]
        return _ready(f"{len(taken)} batches of {spec_name(asked.labelled or '')}", taken)
    if tokenizer is None or not writes_text(model):
        kind = "file.py:function (it returns an iterable of inputs)" if tokenizer is None else "TEXT"
        raise UsageError(
            f"method {asked.method} needs calibration data, and this model writes no text of its own; give "
            f"--data {kind}"
        )
    shorter = min(context, 256)

    def write() -> list[Any]:
        return data.self_generated(model, tokenizer, context=shorter, samples=asked.samples, seed=asked.seed)

    return Calibration(
        f"{asked.samples} texts of {shorter} tokens that the model writes itself",
        write,
        asked.samples * shorter,
        _inputs(model, torch.zeros(min(4, asked.samples), shorter, dtype=torch.long)),
    )


def _ready(name: str, inputs: list[Any]) -> Calibration:
    """Batches that are there already; tokens are counted where they are told by their name."""
    ids = [batch["input_ids"] for batch in inputs if isinstance(batch, Mapping) and "input_ids" in batch]
    tokens = sum(each.numel() for each in ids) if ids and len(ids) == len(inputs) else None
    return Calibration(name, lambda: inputs, tokens, inputs[0] if inputs else None)
