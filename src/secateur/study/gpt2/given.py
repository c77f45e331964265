"""What the study is carried out on: text, reviews with their labels, and articles with their summaries."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import data
from secateur.core.digest import digest
from secateur.documents import PYTHON_DOCS, read_text
from secateur.errors import InputError, UsageError, nearest
from secateur.evaluate.corpus import positions
from secateur.request import spec_name

__all__ = ["Articles", "Given", "Plan", "Reviews", "Sources", "lead", "read"]

Batch = dict[str, Tensor]
IGNORED = -100  # labels that no loss counts
CUE = "\nTL;DR:"
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+")


@dataclass(frozen=True)
class Plan:
    """How large the study is, and how every row of it is fine-tuned; the same for all.

    Attributes:
        groups: the n of merged_n and compressed_n; those above the model's depth are left out.
        nonzero: weights that the pruned model keeps; None for the fraction of GPT-2's 104.69 million of 124.44.
        tokens: of the text that perplexity is measured on.
        train_tokens: of the text that is fine-tuned on.
        context: tokens in a window that is trained on, and the most of a review or of an article with its summary.
        reviews, judged_reviews: to fit the classifier on, and to judge it by.
        tuned_reviews: of the first, how many the whole model is fine-tuned on.
        articles, judged_articles: to fine-tune on, and to judge by.
        new_tokens: of a summary, at most; and of the timed generation, exactly.
        lr: peak rate of each fine-tuning (one epoch of AdamW, cosine).
        batch: windows, reviews or articles in a step.
        repeats: of the timing.
        seed: of every choice.
    """

    groups: tuple[int, ...] = (2, 4, 6, 8, 10)
    nonzero: int | None = None
    tokens: int = 16_384
    train_tokens: int = 32_768
    context: int = 256
    reviews: int = 400
    judged_reviews: int = 300
    tuned_reviews: int = 160
    articles: int = 64
    judged_articles: int = 40
    new_tokens: int = 32
    lr: float = 3e-4
    batch: int = 8
    repeats: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        counts = [v for k, v in vars(self).items() if isinstance(v, int) and k not in ("seed", "nonzero")]
        if min(counts) < 1 or not 0 < self.lr < float("inf") or self.repeats < 2:
            raise UsageError(f"{self}: expected counts of at least 1, at least 2 repeats and a rate above 0")
        if any(n < 2 for n in self.groups) or len(set(self.groups)) != len(self.groups):
            raise UsageError(f"groups of {self.groups} blocks: expected different numbers of at least 2")
        if self.tuned_reviews > self.reviews:
            raise UsageError(f"{self.tuned_reviews} reviews to fine-tune on, of {self.reviews}")


@dataclass(frozen=True)
class Sources:
    """Where the data lie.

    Attributes:
        text: that perplexity is measured on; None for the last fifth of Python's documentation.
        train: that is fine-tuned on; None for the rest of it.
        reviews: two files, to fit on and to judge by, with `text` and `label`; None leaves the column out.
        summaries: one file, `FILE:document:summary`; None leaves the columns out.
    """

    text: str | None = None
    train: str | None = None
    reviews: tuple[str, str] | None = None
    summaries: str | None = None


@dataclass(frozen=True)
class Reviews:
    """Texts with their classes, 0 to `classes` - 1."""

    name: str
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: int


@dataclass(frozen=True)
class Articles:
    """Documents with their summaries."""

    name: str
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]


@dataclass(frozen=True)
class Given:
    """What was read, in tokens of the model where that does not depend on the row."""

    text_name: str
    train_name: str
    text: Tensor
    train: list[Batch]
    reviews: Reviews | None
    articles: Articles | None

    def identity(self) -> dict[str, str]:
        """What the results depend on, for a resume."""
        return {
            "text": digest([self.text]),
            "training text": digest(self.train),
            "reviews": _mark(self.reviews),
            "summaries": _mark(self.articles),
        }


def _mark(held: Any) -> str:
    from hashlib import sha256

    return sha256(repr(held).encode("utf-8", "surrogatepass")).hexdigest()


def read(sources: Sources, plan: Plan, tokenizer: Any, model: Any) -> Given:
    """Read everything, choose at random by the plan's seed, and keep what is judged apart from what is trained on.

    Raises:
        UsageError: a file, field or column that is not there, or less text, reviews or articles than the plan wants.
        InputError: a file that is not what its name says.
    """
    most = positions(model)
    if most is not None and plan.context > most:
        raise UsageError(f"windows of {plan.context} tokens, and the model takes {most}; give --context {most}")
    judged, known, name, train_name = _texts(sources)
    text = data.stream(judged, tokenizer, model=model)[: plan.tokens]
    samples = max(1, plan.train_tokens // plan.context)
    train = data.tokens(
        known, tokenizer, context=plan.context, samples=samples, seed=plan.seed, batch=plan.batch, model=model
    )
    return Given(name, train_name, text, train, _reviews(sources, plan), _articles(sources, plan))


def _texts(sources: Sources) -> tuple[list[str], list[str], str, str]:
    if sources.text is not None and sources.train is not None:
        judged, known = read_text(sources.text), read_text(sources.train)
        if set(judged) & set(known):
            raise UsageError(
                f"{sources.text} and {sources.train} share a document; what is judged must not be trained on"
            )
        return judged, known, spec_name(sources.text), spec_name(sources.train)
    if sources.text is not None or sources.train is not None:
        raise UsageError("--text and --train go together: one is measured on, the other fine-tuned on")
    topics = read_text(PYTHON_DOCS)
    random.Random(0).shuffle(topics)
    cut = len(topics) * 4 // 5
    return topics[cut:], topics[:cut], f"{PYTHON_DOCS}, a fifth", f"{PYTHON_DOCS}, the rest"


def _reviews(sources: Sources, plan: Plan) -> Reviews | None:
    if sources.reviews is None:
        return None
    known, judged = (
        [(_plain(text), str(label)) for text, label in _rows(path, "text", "label")] for path in sources.reviews
    )
    seen = {text for text, _ in judged}
    known = [row for row in dict.fromkeys(known) if row[0] not in seen]
    labels = sorted({label for _, label in known})
    odd = sorted({label for _, label in judged} - set(labels))
    if odd or not 2 <= len(labels) <= 100:
        raise UsageError(
            f"{' and '.join(sources.reviews)}: labels {', '.join((odd or labels)[:5])}: expected 2 to 100 classes, the "
            "same in both files"
        )
    number = {label: at for at, label in enumerate(labels)}
    train, test = (
        [(text, number[label]) for text, label in _drawn(rows, many, plan.seed, "reviews")]
        for rows, many in ((known, plan.reviews), (list(dict.fromkeys(judged)), plan.judged_reviews))
    )
    return Reviews(spec_name(sources.reviews[1]), train, test, len(labels))


def _articles(sources: Sources, plan: Plan) -> Articles | None:
    if sources.summaries is None:
        return None
    path, *fields = (
        sources.summaries.rsplit(":", 2) if sources.summaries.count(":") > 1 else [sources.summaries]
    )
    document, summary = fields or ("document", "summary")
    rows = [
        (str(text), said) for text, said in _rows(path, document, summary)
        if isinstance(said, str) and re.search(r"\w", said) and str(text).strip()
    ]  # fmt: skip
    unlike = list({text: (text, said) for text, said in rows}.values())
    drawn = _drawn(unlike, plan.articles + plan.judged_articles, plan.seed, "articles with a summary")
    return Articles(spec_name(path), drawn[plan.judged_articles :], drawn[: plan.judged_articles])


def _drawn(rows: list[Any], many: int, seed: int, what: str) -> list[Any]:
    if len(rows) < many:
        raise UsageError(f"{many} {what} are asked for and {len(rows)} are there; ask for fewer")
    return random.Random(seed).sample(rows, many)


def _plain(text: Any) -> str:
    return re.sub(r"\s*<br\s*/?>\s*", "\n", str(text))


def _rows(path: str, *fields: str) -> Iterator[tuple[Any, ...]]:
    """The named fields of every row of a .parquet or .jsonl file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"{path}: no such file")
    if file.suffix == ".jsonl":
        return _jsonl(file, fields)
    if file.suffix != ".parquet":
        raise UsageError(f"{path}: {file.suffix!r} is no table that is read; expected .parquet or .jsonl")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: Parquet needs the extra parquet: pip install 'secateur[parquet]'."
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            missing = next((field for field in fields if field not in names), None)
            if missing is None:
                columns = [table.read(columns=[field]).column(0).to_pylist() for field in fields]
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error
    if missing is not None:
        raise UsageError(f"{path}: no column {missing!r}; {nearest(missing, names)}")
    return zip(*columns, strict=True)


def _jsonl(file: Path, fields: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: not readable as JSON ({str(error)[:100]})") from None
        missing = next((field for field in fields if not isinstance(row, dict) or field not in row), None)
        if missing is not None:
            raise UsageError(f"{file}, line {number}: no field {missing!r}")
        yield tuple(row[field] for field in fields)


def lead(document: str, sentences: int = 3) -> str:
    """The first sentences of a document, the summary that is hard to beat.

    Example:
        >>> lead("It rained. We stayed in! Why? Because. It did.")
        'It rained. We stayed in! Why?'
    """
    return " ".join(_SENTENCE.split(" ".join(document.split()))[:sentences])


def review_batches(rows: list[tuple[str, int]], tokenizer: Any, context: int, batch: int) -> list[Batch]:
    """Reviews as tokens, cut to the context, padded on the right, with their classes as labels."""
    found = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids = [tokenizer(text)["input_ids"][:context] or [0] for text, _ in part]
        found.append(_padded(ids) | {"labels": torch.tensor([label for _, label in part])})
    return found


def article_batches(rows: list[tuple[str, str]], tokenizer: Any, plan: Plan) -> list[Batch]:
    """Article, cue, summary and end as tokens; only the summary and the end are labels."""
    found = []
    for start in range(0, len(rows), plan.batch):
        ids, labels = [], []
        for document, summary in rows[start : start + plan.batch]:
            head = prompt(document, tokenizer, plan)
            tail = tokenizer(" " + " ".join(summary.split()))["input_ids"][: plan.new_tokens - 1]
            tail += [tokenizer.eos_token_id]
            ids.append(head + tail)
            labels.append([IGNORED] * len(head) + tail)
        found.append(_padded(ids) | {"labels": _padded(labels, IGNORED)["input_ids"]})
    return found


def prompt(document: str, tokenizer: Any, plan: Plan) -> list[int]:
    """The article, cut at its end so that the cue and a summary still fit into the context, and the cue."""
    cue = tokenizer(CUE)["input_ids"]
    room = max(1, plan.context - len(cue) - plan.new_tokens)
    return [*tokenizer(" ".join(document.split()))["input_ids"][:room], *cue]


def _padded(rows: list[list[int]], fill: int = 0) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
