"""How much quality each layer's sparsity costs, when that layer alone is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .elements import Section, chooser, details, figure, plural, shorten, table
from .markup import Html, join, named, shown, tag
from .numbers import number, percent

__all__ = ["Sensitivity", "sensitivity_section"]


@dataclass(frozen=True)
class Sensitivity:
    """A curve for each layer: quality against the sparsity of that layer alone.

    Attributes:
        sparsities: where it was measured, ascending.
        layers: layer -> a value at each sparsity; None where it was not measured (yet).
        quantity: what the values are, with their unit; less is better.
        title: of the section.
        reference: the value of the dense model, None where there is none (a divergence from it is 0).
        caption: a sentence on what the chart says.
    """

    sparsities: Sequence[float]
    layers: Mapping[str, Sequence[float | None]]
    quantity: str
    title: str = "Sensitivity of each layer"
    reference: float | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        if list(self.sparsities) != sorted(set(self.sparsities)) or not self.sparsities:
            raise UsageError(f"sparsities are {list(self.sparsities)}, expected ascending numbers")
        for name, values in self.layers.items():
            if len(values) != len(self.sparsities):
                raise UsageError(f"{name}: {len(values)} values for {len(self.sparsities)} sparsities")

    def ranked(self) -> list[str]:
        """Layers by their worst known value, the most sensitive first."""

        def worst(name: str) -> float:
            return max((value for value in self.layers[name] if value is not None), default=float("-inf"))

        return sorted(self.layers, key=lambda name: -worst(name))


def sensitivity_section(content: Sensitivity, *, anchor: str = "sensitivity") -> Section:
    """The curves, one of them picked out, and the table of layers, the most sensitive first."""
    names = content.ranked()
    data = {
        "names": [shown(name) for name in names],
        "short": shorten(names),
        "sparsities": list(content.sparsities),
        "values": [[None if v is None else float(f"{v:.5g}") for v in content.layers[name]] for name in names],
        "quantity": shown(content.quantity),
        "reference": content.reference,
    }
    controls = tag(
        "div",
        chooser(anchor, names),
        tag("label", tag("input", type="checkbox", data_option="log"), " Logarithmic axis"),
        class_="controls",
    )
    missing = sum(value is None for values in content.layers.values() for value in values)
    lead = content.caption or (
        "Each curve prunes one layer and leaves all others dense. The chosen layer stands out; layers are in "
        "order, the most sensitive first."
    )
    body = join(
        tag("p", lead, class_="lead"),
        tag("p", f"Not measured yet: {plural(missing, 'point')}.", class_="aside") if missing else None,
        figure(
            anchor,
            "curves",
            data,
            label=f"Curves: {content.quantity} against sparsity, a layer each",
            before=controls,
        ),
        details("Values as a table", _values(content, names)),
    )
    return Section(anchor, content.title, body)


def _values(content: Sensitivity, names: Sequence[str]) -> Html:
    known = [v for values in content.layers.values() for v in values if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    rows = []
    for name in names:
        cells = (
            tag(
                "td",
                "–" if value is None else number(value),
                class_="number heat",
                data_value=None if value is None else repr(value),
                style=f"--part:{(value - low) / (high - low):.3f}"
                if value is not None and high > low
                else None,
            )
            for value in content.layers[name]
        )
        rows.append(tag("tr", tag("th", named(name), scope="row", class_="name"), *cells))
    columns = ["Layer", *(percent(sparsity) for sparsity in content.sparsities)]
    return table(
        columns, rows, label=f"{content.quantity} by layer and sparsity", numeric=range(1, len(columns))
    )
