"""The study's table, as JSON, CSV, Markdown and report."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from secateur import report
from secateur.evaluate import Measurement
from secateur.folder import write_json, write_text

from .given import Given, Plan
from .job import PIECES, Row, Study

__all__ = ["as_markdown", "write_study"]

TASKS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def write_study(folder: Path, found: Study, given: Given, plan: Plan, *, pictures: bool = False) -> None:
    """Write study.json, results.csv, table.md, report.html, and with `pictures` study.png.

    Of a study that is not finished the report says so and the table has gaps.

    Raises:
        UsageError: pictures without matplotlib.
    """
    plain = {
        row.name: {p: {k: m.to_dict() for k, m in getattr(row, p).items()} for p in PIECES}
        for row in found.rows
    }
    lead = {key: m.to_dict() for key, m in found.lead.items()}
    write_json(folder / "study.json", {"model": found.model, "plan": vars(plan), "rows": plain, "lead-3": lead})
    columns, rows = table(found)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "table.md", as_markdown(found))
    charts = _charts(found, given)
    if pictures:
        report.figures.tradeoff(charts[0]).savefig(folder / "study.png", dpi=120)
    unfinished = "" if found.done == found.pieces else f"{found.done} of {found.pieces} parts are done."
    html = report.page(
        "The GPT-2 study",
        summary=f"{found.model}: pruned, merged and compressed, each before and after the same fine-tuning.",
        tradeoffs=charts,
        tables=[report.Table("All models", columns, rows, "Times are medians with the interquartile range.")],
        highlights=_tiles(found),
        notes=notes(found, given, plan),
        unfinished=unfinished,
    )
    report.write(folder / "report.html", html)


def table(found: Study) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows; None where nothing is measured (yet)."""
    tasks = [key for key in TASKS if any(key in row.before or key in row.after for row in found.rows)]
    columns = ["model", "parameters", "non-zeros"]
    columns += [f"{TASKS[key]}{when}" for key in tasks for when in ("", ", fine-tuned")]
    columns += ["reading 128 tokens, ms", "from", "to", "writing, ms", "from", "to"]
    rows: list[list[Any]] = []
    for row in found.rows:
        size = [row.speed.get(key) for key in ("parameters", "nonzeros")]
        judged = [held.get(key) for key in tasks for held in (row.before, row.after)]
        values = [None if m is None else m.value for m in size]
        values += [None if m is None else _short(m.value) for m in judged]
        rows.append([row.name, *values, *_time(row.speed.get("latency")), *_time(row.speed.get("generation"))])
    if found.lead:
        scores = [[_short(found.lead[key].value), None] if key in found.lead else [None, None] for key in tasks]
        rows.append(["Lead-3", None, None, *(cell for pair in scores for cell in pair), *[None] * 6])
    return columns, rows


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")


def _time(found: Measurement | None) -> list[float | None]:
    if found is None or found.spread is None:
        return [None, None, None]
    return [_short(found.value), _short(found.spread.low), _short(found.spread.high)]


def as_markdown(found: Study) -> str:
    """The table for a page of documentation: before and after in one cell, with an arrow between."""
    tasks = [key for key in TASKS if any(key in row.before for row in found.rows)]
    head = ["model", "parameters", "non-zeros", *(TASKS[key] for key in tasks), "reading, ms", "writing, ms"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found.rows:
        cells = [row.name, *(_millions(row.speed.get(key)) for key in ("parameters", "nonzeros"))]
        cells += [f"{_said(row.before.get(key))} → {_said(row.after.get(key))}" for key in tasks]
        cells += [_timed(row.speed.get(key)) for key in ("latency", "generation")]
        lines.append("| " + " | ".join(cells) + " |")
    if found.lead:
        cells = [
            "Lead-3",
            "",
            "",
            *(_said(found.lead[key]) if key in found.lead else "" for key in tasks),
            "",
            "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _millions(found: Measurement | None) -> str:
    return "–" if found is None else f"{found.value:,}"


def _said(found: Measurement | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:,.1f}" if found.name == "perplexity" else f"{found.value:.3f}"


def _timed(found: Measurement | None) -> str:
    value, low, high = _time(found)
    return "–" if value is None else f"{value:g} ({low:g} to {high:g})"


def _charts(found: Study, given: Given) -> list[report.Tradeoff]:
    def points(when: str, axis: str) -> list[report.Point]:
        return [
            report.Point(row.speed[axis].value, getattr(row, when)["perplexity"].value, name=row.name)
            for row in found.rows
            if axis in row.speed and "perplexity" in getattr(row, when)
        ]

    base = next((row for row in found.rows if row.name == "baseline"), Row("baseline"))
    reference = base.before["perplexity"].value if "perplexity" in base.before else None
    return [
        report.Tradeoff(
            f"Perplexity against {word}",
            label,
            f"perplexity on {given.text_name} (lower is better)",
            {"as made": points("before", axis), "fine-tuned": points("after", axis)},
            reference=reference,
            reference_name="baseline",
            x_percent=False,
            log_y=True,
            caption="A point is a model; its name is in the table and shows under the pointer.",
            better=("lower", "lower"),
        )
        for axis, word, label in (
            ("nonzeros", "non-zeros", "parameters that are not zero"),
            ("latency", "time", "ms to read 128 tokens"),
        )
    ]


def _tiles(found: Study) -> list[report.Highlight]:
    tiles = []
    for row in found.rows:
        if row.name in ("baseline", "smaller", "pruned", "merged_2", "compressed_2") and row.after:
            value = row.after["perplexity"].value
            tiles.append(report.Highlight(row.name, f"{value:,.1f}", "perplexity, fine-tuned"))
    return tiles


def notes(found: Study, given: Given, plan: Plan) -> list[str]:
    """What a reader has to know about the numbers."""
    said = [
        *found.notes,
        f"Perplexity: {len(given.text):,} tokens of {given.text_name}, windows that do not overlap; padding "
        "never counts.",
        f"Fine-tuning, the same for every row: one epoch of AdamW at {plan.lr:g}; the text is "
        f"{plan.train_tokens:,} tokens of {given.train_name}. Pruned weights stay zero.",
        f"Times: one row of 128 tokens read, and exactly {plan.new_tokens} tokens written after 32 with no early stop, "
        "in turns with the baseline.",
    ]
    if given.reviews is not None:
        said.append(
            f"Accuracy: {len(given.reviews.test)} reviews of {given.reviews.name}, cut to {plan.context // 2} tokens; "
            f"a linear head at the last real token, fitted on {len(given.reviews.train)} with the model frozen, "
            f"then the whole trained on {plan.tuned_reviews} of them. Two standard errors are about "
            f"{1 / len(given.reviews.test) ** 0.5:.2f}."
        )
    else:
        said.append("No reviews were given, so there is no accuracy.")
    if given.articles is not None:
        said.append(
            f"ROUGE: {len(given.articles.test)} articles of {given.articles.name}, cut so that the cue fits; the "
            f"prompt is cut off before scoring. Fine-tuned on {len(given.articles.train)} others. Lead-3 is the first "
            "three sentences of the whole article."
        )
    else:
        said.append("No articles were given, so there is no ROUGE.")
    return said
