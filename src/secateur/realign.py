"""The whole job of `secateur align`: embed texts by two models, fit a map, judge it, store it with the checkpoint."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import __version__, align, data, own
from secateur import model as models
from secateur.align import Advice, Affine, Embeddings
from secateur.embedding import encode, encode_batches, pooling_of, write_modules
from secateur.errors import UsageError, nearest
from secateur.evaluate import Measurement
from secateur.folder import write_json, write_text
from secateur.measure import Tell
from secateur.request import spec_name

__all__ = ["FITS", "Aligned", "Wanted", "fit", "fit_and_judge", "write_aligned"]

FITS = ("ridge", "procrustes", "procrustes-rigid", "cca")


@dataclass(frozen=True)
class Wanted:
    """What `secateur align` was asked for; see its options."""

    data: tuple[str, ...]
    fit: str = "ridge"
    texts: int = 4000
    held_out: int = 500
    pooling: str | None = None
    context: int = 256
    neighbours: int = 10
    least: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UsageError(f"--fit {self.fit!r} is not known; {nearest(self.fit, FITS)}")
        if not self.data:
            raise UsageError("--data is missing; give texts of the kind that will be searched")


@dataclass(frozen=True)
class Aligned:
    """A map, and what held-out texts say about it.

    Attributes:
        map: from the pruned model's vectors to the original's; of texts, both of length 1.
        advice: the gate's verdict.
        pairs: how many texts the map was fitted on.
        pooling: how tokens became a vector; None for a model that gives vectors itself.
        example: one batch of a model of the user's own, None for texts.
    """

    map: Affine
    advice: Advice
    pairs: int
    pooling: str | None
    example: Any = None

    def measurements(self, wanted: Wanted) -> dict[str, list[Measurement]]:
        """overlap@k of each way, by the name of the way."""
        advice = self.advice
        conditions: dict[str, str | int | float | bool] = {
            "queries": advice.queries,
            "k": advice.k,
            "pairs": self.pairs,
            "fit": wanted.fit,
            "seed": wanted.seed,
        }
        values = {"no map": advice.raw, "map": advice.mapped, "new index": advice.reindexed}
        name = f"overlap_at_{advice.k}"
        return {
            way: [Measurement(name, value, "1", conditions)]
            for way, value in values.items()
            if value is not None
        }


def fit(name: str, source: Embeddings, target: Embeddings) -> Affine:
    """A map by the name of its method, one of `FITS`."""
    if name == "ridge":
        return align.ridge(source, target)
    if name == "cca":
        return align.cca(source, target).across
    return align.procrustes(source, target, scale=name == "procrustes")


def fit_and_judge(pruned: models.Loaded, original: models.Loaded, wanted: Wanted, tell: Tell) -> Aligned:
    """Fit a map on some of the data and judge it on the rest.

    Raises:
        UsageError: data of a kind that one of the models does not take, or too few.
    """
    batches = own.is_own(wanted.data[0])
    embed = _embed_batches if batches else _embed_texts
    source, target, pooling, example = embed(pruned, original, wanted, tell)
    many = len(source)
    held = min(wanted.held_out, many // 5)
    if held <= wanted.neighbours:
        raise UsageError(
            f"{many} different texts leave {held} to be held out, too few for {wanted.neighbours} neighbours; give more"
        )
    tell("fitting the map", 0, 1)
    found = fit(wanted.fit, source[held:], target[held:])
    tell("fitting the map", 1, 1)
    advice = align.advise(found, source[:held], target[:held], k=wanted.neighbours, least=wanted.least)
    return Aligned(found, advice, many - held, pooling, example)


def write_aligned(
    pruned: models.Loaded,
    original: models.Loaded,
    aligned: Aligned,
    wanted: Wanted,
    folder: Path,
    *,
    fold: bool,
) -> str:
    """Write the pruned model with its map, and say in one line where the map went.

    A model of texts becomes a folder of sentence-transformers whose module Dense is the map. In a model of the user's
    own the map is folded into the last linear layer where that is exact. `run/map.safetensors` holds it in any case.
    """
    (folder / "run").mkdir(exist_ok=True)
    model, where = pruned.model, "in run/map.safetensors, for align.load"
    if aligned.pooling is None and fold:
        model = copy.deepcopy(pruned.model)
        try:
            where = f"folded into {align.fold_(model, aligned.map, aligned.example)}, which is dense now"
        except UsageError as error:
            model, where = pruned.model, f"{where}; {error}"
    kind = pruned.stored_dtype if pruned.kind == "transformers" else None
    models.save(model, pruned.tokenizer, folder, source=pruned.folder, dtype=kind)
    align.save(aligned.map, folder / "run" / "map.safetensors")
    if aligned.pooling is not None:
        write_modules(folder, aligned.map, pooling=aligned.pooling, context=wanted.context)
        where = "the module 3_Dense of sentence-transformers"
    told = {
        "secateur": __version__,
        "pruned": {"name": spec_name(pruned.spec), "sha256": pruned.fingerprint},
        "original": {"name": spec_name(original.spec), "sha256": original.fingerprint},
        "map": {"width": list(aligned.map.matrix.shape), **aligned.map.settings, "stored": where},
        "pooling": aligned.pooling,
        "advice": aligned.advice.verdict,
        "gain": aligned.advice.gain,
        "standard error": aligned.advice.error,
        "measurements": {
            way: [m.to_dict() for m in found] for way, found in aligned.measurements(wanted).items()
        },
    }
    write_json(folder / "run" / "align.json", told)
    write_text(folder / "README.md", _card(pruned, original, aligned, where))
    return where


def _card(pruned: models.Loaded, original: models.Loaded, aligned: Aligned, where: str) -> str:
    names = [" ".join(spec_name(each.spec).replace("`", "'").split()) for each in (pruned, original)]
    return (
        f"# `{names[0]}`, aligned to `{names[1]}`\n\nIts vectors live in the space of `{names[1]}` and search an index "
        f"that it built. The map is stored as: {' '.join(where.split())}.\n\n{aligned.advice}.\n\nMade by secateur "
        f"{__version__}; conditions are in `run/align.json`.\n"
    )


Embedded = tuple[Embeddings, Embeddings, str | None, Any]


def _embed_texts(pruned: models.Loaded, original: models.Loaded, wanted: Wanted, tell: Tell) -> Embedded:
    texts = list(dict.fromkeys(text.strip() for spec in wanted.data for text in data.read_text(spec)))
    random.Random(wanted.seed).shuffle(texts)
    texts = texts[: wanted.texts + wanted.held_out]
    pooling = wanted.pooling or pooling_of(original.folder) or pooling_of(pruned.folder) or "mean"
    rows = [
        encode(
            side.model,
            side.tokenizer,
            texts,
            pooling=pooling,
            context=wanted.context,
            tell=tell,
            label=f"embedding by the {name} model",
        )
        for name, side in (("pruned", pruned), ("original", original))
    ]
    return *_labelled(pruned, original, rows, normalize=True), pooling, None


def _embed_batches(pruned: models.Loaded, original: models.Loaded, wanted: Wanted, tell: Tell) -> Embedded:
    if len(wanted.data) > 1:
        raise UsageError("--data takes one file.py:function, which gives all batches")
    batches = data.read_batches(wanted.data[0], seed=wanted.seed)
    rows = [
        encode_batches(side.model, batches, label=f"embedding by the {name} model", tell=tell)
        for name, side in (("pruned", pruned), ("original", original))
    ]
    order = list(range(len(rows[0])))
    random.Random(wanted.seed).shuffle(order)
    order = order[: wanted.texts + wanted.held_out]
    first = batches[0][0] if isinstance(batches[0], tuple | list) else batches[0]
    return *_labelled(pruned, original, [side[order] for side in rows], normalize=False), None, first


def _labelled(
    pruned: models.Loaded, original: models.Loaded, rows: Sequence[torch.Tensor], *, normalize: bool
) -> tuple[Embeddings, Embeddings]:
    """Vectors with the names of their models; of length 1 where only their directions count."""
    if pruned.fingerprint == original.fingerprint:
        raise UsageError("both models have the same weights, so there is nothing to align")
    names = [f"{spec_name(side.spec)} {side.fingerprint[:12]}" for side in (pruned, original)]
    source, target = (Embeddings(values, name) for values, name in zip(rows, names, strict=True))
    return (source.normalized(), target.normalized()) if normalize else (source, target)
