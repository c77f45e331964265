"""What pruning did to quality, size and speed: every measurement of every variant, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .elements import Section, details, table
from .markup import Html, join, named, plain, shown, tag
from .numbers import change, count, number, percent, quantity

__all__ = ["Comparison", "compare", "measurement_section"]

_ACRONYMS = {
    "kl": "KL",
    "f1": "F1",
    "flops": "FLOPs",
    "macs": "MACs",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougel": "ROUGE-L",
    "rougelsum": "ROUGE-Lsum",
    "top1": "top-1",
    "nonzeros": "non-zeros",
    "nonzero": "non-zero",
}
_LESS_IS_BETTER = frozenset(
    {"perplexity", "loss", "kl", "divergence", "bits", "latency", "time", "memory", "bytes", "size"}
    | {"flops", "macs", "parameters", "nonzeros", "nonzero"}
)
_FRACTIONS = frozenset(
    {"accuracy", "f1", "rouge1", "rouge2", "rougel", "rougelsum", "agreement", "sparsity", "density"}
)
_MORE_IS_BETTER = (_FRACTIONS - {"density"}) | {"tokens", "throughput", "examples", "zeros"}
_MACHINE = frozenset({"cpu", "instructions", "cores", "torch", "accelerator", "device", "hardware", "dtype"})
"""Conditions that describe the machine: they stand below the table where all measurements share them."""

_OWN = frozenset({"model", "tensors", "of", "files"})
"""Conditions that describe the variant itself, not how it was measured: they differ and values compare all the same."""


@dataclass(frozen=True)
class Comparison:
    """One quantity, measured for several variants.

    Attributes:
        name: of the measurement, as stored.
        unit: of every value.
        telling: the conditions that tell this row from others of the same name.
        cells: one measurement for each variant in order; None where it was not measured.
    """

    name: str
    unit: str
    telling: Mapping[str, Any]
    cells: tuple[Mapping[str, Any] | None, ...]

    @property
    def title(self) -> str:
        """The name as people write it."""
        words = [_ACRONYMS.get(word, word) for word in _words(self.name)]
        return " ".join(words)[:1].upper() + " ".join(words)[1:]

    @property
    def is_fraction(self) -> bool:
        """Whether the values are read best in percent."""
        values = [cell["value"] for cell in self.cells if cell is not None]
        return (
            self.unit == "1"
            and bool(_FRACTIONS & set(_words(self.name)))
            and all(0 <= value <= 1 for value in values)
        )

    def text(self, at: int) -> str:
        """The value of variant `at` with its unit."""
        cell = self.cells[at]
        if cell is None:
            return "–"
        return percent(cell["value"]) if self.is_fraction else quantity(cell["value"], self.unit)

    def change(self, at: int) -> tuple[str, str]:
        """How variant `at` differs from the first, and whether that is `better`, `worse` or the `same`.

        It is the same where the spreads of the two overlap, and empty where nobody knows which way is better.
        """
        first, cell = self.cells[0], self.cells[at]
        if at == 0 or first is None or cell is None:
            return "", ""
        text = change(first["value"], cell["value"], points=self.is_fraction)
        if first["value"] == cell["value"]:
            return text, "same"
        one, two = first.get("spread"), cell.get("spread")
        if one and two and one["low"] <= two["high"] and two["low"] <= one["high"]:
            return f"≈ {text}", "same"
        words = set(_words(self.name))
        if words & _MORE_IS_BETTER:
            return text, "better" if cell["value"] > first["value"] else "worse"
        if words & _LESS_IS_BETTER:
            return text, "better" if cell["value"] < first["value"] else "worse"
        return text, ""

    @property
    def differing(self) -> list[str]:
        """Conditions that were not the same for all variants, so that the values do not compare strictly."""
        held = [cell["conditions"] for cell in self.cells if cell is not None]
        keys = dict.fromkeys(key for conditions in held for key in conditions if key not in _OWN)
        return [key for key in keys if len({_hashable(conditions.get(key)) for conditions in held}) > 1]


def compare(measurements: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Comparison]:
    """Find which measurement of one variant belongs beside which of another.

    Those of the same name and unit do. Where a variant has several of a name (perplexity on three texts), the
    conditions in which these differ tell them apart.

    Args:
        measurements: variant -> its measurements as plain mappings with `name`, `value`, `unit`, and
            optionally `conditions` and `spread` (`low`, `high`, `kind`, `repeats`).

    Raises:
        UsageError: a measurement lacks its name, value or unit.
    """
    columns = [[_checked(variant, entry) for entry in entries] for variant, entries in measurements.items()]
    names = dict.fromkeys((entry["name"], entry["unit"]) for entries in columns for entry in entries)
    rows = []
    for name, unit in names:
        groups = [[e for e in entries if (e["name"], e["unit"]) == (name, unit)] for entries in columns]
        keys = _telling_keys(groups)
        found: dict[Any, list[Mapping[str, Any] | None]] = {}
        for column, group in enumerate(groups):
            seen: dict[Any, int] = {}
            for entry in group:
                identity = tuple(_hashable(entry["conditions"].get(key)) for key in keys)
                seen[identity] = seen.get(identity, 0) + 1
                row = found.setdefault((identity, seen[identity]), [None] * len(columns))
                row[column] = entry
        for cells in found.values():
            one = next(cell for cell in cells if cell is not None)
            telling = {key: one["conditions"][key] for key in keys if key in one["conditions"]}
            rows.append(Comparison(name, unit, telling, tuple(cells)))
    return rows


def _telling_keys(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Conditions in which measurements of one name and one variant differ from each other."""
    keys: dict[str, None] = {}
    for group in groups:
        for key in dict.fromkeys(key for entry in group for key in entry["conditions"]):
            if len({_hashable(entry["conditions"].get(key)) for entry in group}) > 1:
                keys[key] = None
    return list(keys)


def _checked(variant: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    for field in ("name", "value", "unit"):
        if field not in entry:
            raise UsageError(
                f"a measurement of {variant!r} has no {field!r}: {dict(entry)!r:.200}. "
                f"Pass what to_dict() of a measurement returns."
            )
    return {"conditions": {}, "spread": None} | dict(entry)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _words(name: str) -> list[str]:
    return name.replace("_", " ").replace("/", " ").replace("-", "").lower().split()


def measurement_section(
    measurements: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    heading: str = "Measurements",
    anchor: str = "measurements",
) -> Section:
    """The table of measurements: the first variant as it is, the others with their change from it.

    Up to three variants stand side by side; more become rows, with the quantities side by side.

    Args:
        measurements: variant -> its measurements, as `compare` takes them; the first variant is the reference.
        heading: of the section.
        anchor: its name in links.
    """
    rows, variants = compare(measurements), list(measurements)
    built = _by_quantity(rows, variants) if len(variants) <= 3 else _by_variant(rows, variants)
    shared = _shared(rows)
    below = ", ".join(f"{shown(key)} {_said(value)}" for key, value in shared.items())
    lead = f"Changes are relative to “{shown(variants[0])}”. " if variants else ""
    lead += "▲ better, ▼ worse, ≈ too close to tell: the spreads of repeated measurements overlap."
    return Section(
        anchor,
        heading,
        join(
            tag("p", lead, class_="lead") if len(variants) > 1 else None,
            built,
            tag("p", Html(f"All measured with {plain(below)}."), class_="aside") if below else None,
            details("Exact values, spreads and conditions", _exact(rows, variants)),
        ),
    )


def _by_quantity(rows: Sequence[Comparison], variants: Sequence[str]) -> Html:
    shared = _shared(rows)
    lines = []
    for row in rows:
        cells = [tag("th", tag("b", shown(row.title)), _about(row, shared), scope="row")]
        for at in range(len(variants)):
            cells.append(_value(row, at, tag("span", _change(row, at), class_="narrow") if at else None))
            if at:
                cells.append(tag("td", _change(row, at), class_="change wide"))
        lines.append(tag("tr", *cells))
    heads: list[object] = ["Quantity"]
    for at, variant in enumerate(variants):
        heads.append(named(variant))
        if at:
            heads.append(tag("span", "Change", class_="wide"))
    numeric = [at for at in range(1, len(heads)) if at == 1 or at % 2 == 0]
    return table(heads, lines, label="Measurements", numeric=numeric)


def _by_variant(rows: Sequence[Comparison], variants: Sequence[str]) -> Html:
    shared = _shared(rows)
    lines = []
    for at, variant in enumerate(variants):
        cells = (_value(row, at, _change(row, at)) for row in rows)
        lines.append(tag("tr", tag("th", named(variant), scope="row"), *cells))
    heads = ["Variant", *(join(shown(row.title), _about(row, shared)) for row in rows)]
    return table(heads, lines, label="Measurements", numeric=range(1, len(heads)))


def _value(row: Comparison, at: int, below: Html | None = None) -> Html:
    cell = row.cells[at]
    value = None if cell is None else repr(cell["value"])
    return tag("td", row.text(at), below, class_="number", data_value=value, data_name=row.name)


def _change(row: Comparison, at: int) -> Html | None:
    text, verdict = row.change(at)
    if not text:
        return None
    sign = {"better": "▲ ", "worse": "▼ "}.get(verdict, "")
    spoken = tag("span", f" {verdict}", class_="unseen") if sign else None
    mark = tag("span", sign, aria_hidden="true") if sign else None
    return tag("span", mark, text, spoken, class_=f"delta {verdict}".strip())


def _about(row: Comparison, shared: Mapping[str, Any]) -> Html | None:
    """What tells the row from its neighbours, and a warning where its values were not taken alike."""
    one = next(cell for cell in row.cells if cell is not None)
    told = dict(row.telling)
    for key in ("protocol", "dataset", "task", "batch", "input", "threads"):
        if key in one["conditions"] and key not in shared and key not in row.differing:
            told.setdefault(key, one["conditions"][key])
    bare = {key for key, value in told.items() if isinstance(value, str) and key != "input"}
    if bare:
        told = {key: told[key] for key in told if key in bare}
    elif "input" in told:  # it says the batch too
        told.pop("batch", None)
    words = [_said(value) if key in bare else f"{shown(key)} {_said(value)}" for key, value in told.items()]
    parts = [tag("small", ", ".join(words))] if words else []
    if row.differing:
        parts.append(
            tag("small", "not the same for all: " + ", ".join(map(shown, row.differing)), class_="warning")
        )
    return join(*parts) if parts else None


def _shared(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Conditions of the machine that every measurement names and has in common."""
    held = [cell["conditions"] for row in rows for cell in row.cells if cell is not None]
    keys = [key for key in (held[0] if held else {}) if key in _MACHINE or key == "threads"]
    return {
        key: held[0][key]
        for key in keys
        if all(key in c and _hashable(c[key]) == _hashable(held[0][key]) for c in held)
    }


def _exact(rows: Sequence[Comparison], variants: Sequence[str]) -> Html:
    lines = []
    for row in rows:
        for variant, cell in zip(variants, row.cells, strict=True):
            if cell is None:
                continue
            spread, unit = cell["spread"], "" if row.unit == "1" else row.unit
            around = ""
            if spread:
                around = f"{number(spread['low'])} to {number(spread['high'])}"
                around += f" ({spread.get('kind', 'spread')} of {count(spread.get('repeats', 1))})"
            said = ", ".join(f"{shown(key)}: {_said(value)}" for key, value in cell["conditions"].items())
            lines.append(
                tag(
                    "tr",
                    tag("th", shown(row.title), scope="row"),
                    tag("td", named(variant)),
                    tag("td", repr(cell["value"]), class_="number"),
                    tag("td", shown(unit)),
                    tag("td", around),
                    tag("td", said, class_="long"),
                )
            )
    columns = ["Quantity", "Variant", "Value", "Unit", "Spread", "Conditions"]
    return table(columns, lines, label="Exact values and conditions", numeric=[2])


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else shown(value)
