"""Pages for the tests: one like a real run, one whose every name is hostile."""

from __future__ import annotations

import torch

from secateur.report import (
    HeatMap,
    Histogram,
    LayerRow,
    Picture,
    Point,
    Sensitivity,
    Stage,
    Table,
    Tradeoff,
    histogram,
    page,
    picture,
)

HOSTILE = [
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "<a href=\"javascript:document.title='taken'\">weights</a><b>bold</b><br>two<sub>lines</sub>",
    "<!-- --!><svg onload=document.title='taken'>",
    "'\" onmouseover=document.title='taken' autofocus onfocus=document.title='taken' x='",
    "line\u2028separator\u2029 and \u202eright to left\x00\x07 and a lone \ud800 surrogate",
    "%{customdata} %{x|%Y} $\\href{javascript:alert(1)}{x}$ &lt;i&gt;twice&lt;/i&gt;",
    "w" * 5000,
    "层.重み.слой.שכבה.🌿",
    "__proto__",
]


def weights() -> dict[str, torch.Tensor]:
    """Two layers of different scale, as a trained model may have them."""
    random = torch.Generator().manual_seed(3)
    return {
        "blocks.0.attn.weight": torch.randn(48, 64, generator=random) * 0.02,
        "blocks.1.ffn.up.weight": torch.randn(96, 64, generator=random) * 0.5,
    }


def halved(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight.abs() < weight.abs().median(), 0.0, weight)


def stages(layers: dict[str, torch.Tensor]) -> list[Stage]:
    return [
        Stage("before", {name: histogram(weight) for name, weight in layers.items()}),
        Stage("after", {name: histogram(halved(weight)) for name, weight in layers.items()}),
    ]


def rows(layers: dict[str, torch.Tensor]) -> list[LayerRow]:
    return [
        LayerRow(name, tuple(w.shape), name.split(".")[2], w.numel(), int((halved(w) == 0).sum()), lost=0.125)
        for name, w in layers.items()
    ]


def measured(perplexity: float, nonzeros: int, latency: float) -> list[dict]:
    around = {"low": latency - 1, "high": latency + 1, "kind": "interquartile", "repeats": 20}
    return [
        {
            "name": "perplexity",
            "value": perplexity,
            "unit": "1",
            "conditions": {"dataset": "stories", "threads": 2},
        },
        {"name": "nonzeros", "value": nonzeros, "unit": "1", "conditions": {"threads": 2}},
        {"name": "latency", "value": latency, "unit": "ms", "conditions": {"threads": 2}, "spread": around},
    ]


def pictures(layers: dict[str, torch.Tensor]) -> dict[str, Picture]:
    return {name: picture(halved(weight) != 0) for name, weight in layers.items()}


def neurons() -> dict[str, torch.Tensor]:
    """Mean absolute activations of two layers' neurons, some of them dead."""
    random = torch.Generator().manual_seed(4)
    return {
        "blocks.0.ffn.act": torch.rand(64, generator=random) ** 3,
        "blocks.1.ffn.act": (torch.rand(96, generator=random) - 0.25).clamp_min(0),
    }


def heads() -> HeatMap:
    return HeatMap(
        "Importance of each head",
        ["blocks.0.attn", "blocks.1.attn"],
        ["0", "1", "2", "3"],
        [[0.125, 4.0, None, 1.0], [3.5, 2.0, 0.5, 1.5]],
        "gradient at the gate",
        marked=frozenset({(0, 0), (1, 2)}),
    )


def sensitivity(layers: dict[str, torch.Tensor]) -> Sensitivity:
    first, second = layers
    return Sensitivity(
        [0.3, 0.5, 0.7], {first: [0.01, 0.02, None], second: [0.02, 0.125, 2.0]}, "KL divergence, nats"
    )


def usual() -> str:
    layers = weights()
    return page(
        "toy model",
        summary="Magnitude pruning set half of the weights of toy model to zero.",
        measurements={"before": measured(12.5, 9216, 10.0), "after": measured(15.0, 4608, 10.5)},
        layers=rows(layers),
        stages=stages(layers),
        tradeoffs=[
            Tradeoff(
                "Quality against sparsity",
                "sparsity",
                "perplexity",
                {"magnitude": [Point(0.3, 13.0), Point(0.5, 15.0, 14.0, 16.5)], "Wanda": [Point(0.5, 14.0)]},
                reference=12.5,
                log_y=True,
                better=("higher", "lower"),
            )
        ],
        tau=0.25,
        pictures=pictures(layers),
        sensitivity=sensitivity(layers),
        heat_maps=[heads()],
        activations=[Stage("trained", {name: histogram(values) for name, values in neurons().items()})],
        lambda_=0.125,
        unfinished="2 of 3 points are done.",
        tables=[Table("Recipe", ["part", "choice"], [["score", "magnitude"], ["sparsity", 0.5]])],
        notes=["Nothing was retrained."],
    )


def hostile() -> str:
    """Every text of a page that can come from a model, a file or a user, made of hostile names."""
    counted: Histogram = histogram(halved(weights()["blocks.0.attn.weight"]))
    first = HOSTILE[0]
    measurements = {
        name: [
            {"name": name, "value": 1.5 + at, "unit": name, "conditions": {name: other, other: 3.0}}
            for other in HOSTILE[:2]
        ]
        for at, name in enumerate(HOSTILE)
    }
    return page(
        first,
        summary=" ".join(HOSTILE),
        measurements=measurements,
        layers=[LayerRow(name, (2, 5), name, 10, at, name, at / 20) for at, name in enumerate(HOSTILE)],
        pictures=dict.fromkeys(HOSTILE, picture(torch.ones(2, 3, dtype=torch.bool))),
        sensitivity=Sensitivity(
            [0.5], {name: [at] for at, name in enumerate(HOSTILE)}, first, first, caption=first
        ),
        heat_maps=[
            HeatMap(
                first,
                HOSTILE,
                HOSTILE,
                [[at] * len(HOSTILE) for at in range(len(HOSTILE))],
                HOSTILE[1],
                HOSTILE[1],
                HOSTILE[2],
                frozenset({(0, 1)}),
                HOSTILE[1],
                HOSTILE[3],
            )
        ],
        activations=[Stage(name, dict.fromkeys(HOSTILE, counted)) for name in HOSTILE[:2]],
        unfinished=" ".join(HOSTILE),
        stages=[Stage(name, dict.fromkeys(HOSTILE, counted)) for name in HOSTILE[:3]],
        tradeoffs=[
            Tradeoff(
                name,
                name,
                name,
                {other: [Point(0.1, 2.0, name=other), Point(0.5, 4.0, name=name)] for other in HOSTILE},
                reference=2.0,
                reference_name=name,
                caption=name,
            )
            for name in HOSTILE[:3]
        ],
        tables=[Table(first, HOSTILE, [HOSTILE, HOSTILE], first)],
        notes=HOSTILE,
    )
