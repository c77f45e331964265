"""Which layers paid: sparsity of each, as bars and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .elements import Section, details, figure, legend, plural, shorten, table
from .markup import Html, join, named, shown, tag
from .numbers import count, percent

__all__ = ["LayerRow", "sparsity_section"]


@dataclass(frozen=True)
class LayerRow:
    """One prunable layer: what it is and how many of its weights are zero.

    Attributes:
        name: the layer's or parameter's name in the model.
        shape: of its weight.
        role: `attention`, `ffn` or whatever groups layers; may be empty.
        weights: how many it has.
        zeros: how many of them are 0.
        lost: what pruning took from it as a fraction in [0, 1], of whatever `sparsity_section` calls `lost`; None where
            nobody measured.
        note: anything to be said of this layer alone.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    weights: int
    zeros: int
    note: str = ""
    lost: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.zeros <= self.weights:
            raise UsageError(f"{self.name}: {self.zeros} zeros among {self.weights} weights. Count them again.")

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the layer's weights; 0 of no weights."""
        return self.zeros / self.weights if self.weights else 0.0


def sparsity_section(
    layers: Sequence[LayerRow],
    *,
    heading: str = "Sparsity of each layer",
    anchor: str = "sparsity",
    lost: str = "squared weights lost",
) -> Section:
    """Bars of each layer's sparsity, a mark at what it lost, and the table of layers with shapes and exact counts.

    Args:
        layers: in the order in which they are shown.
        heading: of the section.
        anchor: its name in links.
        lost: what `LayerRow.lost` is a fraction of.
    """
    weights, zeros = sum(layer.weights for layer in layers), sum(layer.zeros for layer in layers)
    roles = list(dict.fromkeys(layer.role for layer in layers))
    data = {
        "names": [shown(layer.name) for layer in layers],
        "short": shorten([layer.name for layer in layers]),
        "roles": [roles.index(layer.role) for layer in layers],
        "role_names": [shown(role or "other") for role in roles],
        "weights": [layer.weights for layer in layers],
        "zeros": [layer.zeros for layer in layers],
        "lost": [layer.lost for layer in layers] if any(layer.lost is not None for layer in layers) else None,
        "lost_name": shown(lost),
        "total": zeros / weights if weights else 0.0,
    }
    lead = tag(
        "p",
        f"{count(zeros)} of {count(weights)} weights in {plural(len(layers), 'layer')} are zero: "
        f"{percent(zeros / weights if weights else 0.0)}. The dashed line marks this total.",
        class_="lead",
    )
    measured = any(layer.lost is not None for layer in layers)
    chart = figure(anchor, "bars", data, label=f"Bars: sparsity of each of {len(layers)} layers", tall=True)
    key = None
    if len(roles) > 1 or measured:
        mark = (
            tag("li", tag("span", "◆", class_="diamond", aria_hidden="true"), f" {lost}") if measured else None
        )
        key = legend([role or "other" for role in roles], "bar", label="Roles", more=mark)
    return Section(
        anchor, heading, join(lead, key, chart, details("Layers as a table", _layer_table(layers, lost)))
    )


def _layer_table(layers: Sequence[LayerRow], lost: str) -> Html:
    measured = any(layer.lost is not None for layer in layers)
    noted = any(layer.note for layer in layers)
    rows = []
    for layer in layers:
        bar = tag("span", class_="bar", style=f"--part:{layer.sparsity:.4f}", aria_hidden="true")
        rows.append(
            tag(
                "tr",
                tag("th", named(layer.name), scope="row", class_="name"),
                tag("td", shown(layer.role)),
                tag("td", " × ".join(map(str, layer.shape)), class_="number"),
                tag("td", count(layer.weights), class_="number", data_value=layer.weights),
                tag("td", count(layer.zeros), class_="number", data_value=layer.zeros),
                tag("td", count(layer.weights - layer.zeros), class_="number"),
                tag("td", percent(layer.sparsity), bar, class_="number", data_value=repr(layer.sparsity)),
                tag(
                    "td",
                    "–" if layer.lost is None else percent(layer.lost),
                    class_="number",
                    data_value=layer.lost,
                )
                if measured
                else None,
                tag("td", shown(layer.note)) if noted else None,
            )
        )
    columns = ["Layer", "Role", "Shape", "Weights", "Zeros", "Non-zeros", "Sparsity"]
    columns += [lost.capitalize()] * measured + ["Note"] * noted
    return table(columns, rows, label="Layers", numeric=range(2, 7 + measured))
