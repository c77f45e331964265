"""How the weights of each layer changed: histograms of all stages laid over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .elements import Section, chooser, details, figure, shorten, swatch, table
from .histogram import Histogram
from .markup import Html, join, named, shown, tag
from .numbers import count, number, percent

__all__ = ["Stage", "histogram_section"]


@dataclass(frozen=True)
class Stage:
    """What the weights of every layer were at one moment, for instance before pruning.

    Attributes:
        name: what the moment is called.
        histograms: layer name -> `secateur.report.Histogram`.
    """

    name: str
    histograms: Mapping[str, Histogram]


def histogram_section(
    stages: Sequence[Stage], *, heading: str = "Weights of each layer", anchor: str = "weights"
) -> Section:
    """Histograms of one layer at a time, its stages laid over each other, with the exact zeros marked.

    A thumbnail of every layer gives the overview; the page's address keeps the chosen layer.
    """
    names = list(dict.fromkeys(name for stage in stages for name in stage.histograms))
    data = {
        "names": [shown(name) for name in names],
        "short": shorten(names),
        "stages": [shown(stage.name) for stage in stages],
        "histograms": [
            [stage.histograms[name].to_dict() if name in stage.histograms else None for name in names]
            for stage in stages
        ],
    }
    ticks = [
        tag(
            "label",
            tag("input", type="checkbox", data_stage=at, checked=True),
            swatch(at),
            " ",
            named(stage.name),
        )
        for at, stage in enumerate(stages)
    ]
    controls = tag(
        "div",
        chooser(anchor, names),
        tag("fieldset", tag("legend", "Stages", class_="unseen"), *ticks),
        tag("label", tag("input", type="checkbox", data_option="log"), " Logarithmic counts"),
        tag("label", tag("input", type="checkbox", data_option="whole"), " Whole range"),
        class_="controls",
    )
    lead = tag(
        "p",
        "How many weights lie at which value. Exact zeros are kept out of the bins and stand as a spike at 0, "
        "as high as their share of the layer.",
        class_="lead",
    )
    body = join(
        lead,
        figure(anchor, "histogram", data, label="Histogram of one layer's weights by stage", before=controls),
        tag("div", class_="readout", id=f"{anchor}-readout", aria_live="polite"),
        details("Counts of each bin", tag("div", id=f"{anchor}-bins")),
        tag("div", class_="thumbnails", id=f"{anchor}-thumbnails", aria_hidden="true"),
        details("All layers and stages as a table", _stage_table(stages, names)),
    )
    return Section(anchor, heading, body)


def _stage_table(stages: Sequence[Stage], names: Sequence[str]) -> Html:
    rows = []
    for name in names:
        for stage in stages:
            counted = stage.histograms.get(name)
            if counted is None:
                continue
            share = counted.zeros / counted.n if counted.n else 0.0
            rows.append(
                tag(
                    "tr",
                    tag("th", named(name), scope="row", class_="name"),
                    tag("td", named(stage.name)),
                    tag("td", count(counted.n), class_="number", data_value=counted.n),
                    tag("td", count(counted.zeros), class_="number", data_value=counted.zeros),
                    tag("td", percent(share), class_="number"),
                    *(
                        tag("td", number(value), class_="number", data_value=repr(value))
                        for value in (counted.mean, counted.std, counted.min, counted.max)
                    ),
                )
            )
    columns = ["Layer", "Stage", "Weights", "Exact zeros", "Share", "Mean", "Std", "Min", "Max"]
    return table(columns, rows, label="Weights of all layers and stages", numeric=range(2, 9))
