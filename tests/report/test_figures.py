"""The same charts by matplotlib, and boards that take them."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from secateur.errors import UsageError
from secateur.report import Sensitivity, Stage, figures, histogram, log_to

from .pages import halved, heads, measured, pictures, rows, sensitivity, stages, weights

pytest.importorskip("matplotlib")


def drawn(figure) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=40)
    return held.getvalue()


def test_histograms_hold_every_weight_and_the_zeros_apart():
    layers = weights()
    figure = figures.histograms(stages(layers))
    assert len(drawn(figure)) > 1000
    plots = [axis for axis in figure.axes if axis.patches]
    assert len(plots) == 2
    for axis, weight in zip(plots, layers.values(), strict=True):
        before, after = (patch.get_data() for patch in axis.patches)
        assert before.values.sum() == weight.numel()
        assert after.values.sum() == int(torch.count_nonzero(halved(weight)))
        for at in range(len(before.values)):
            low, high = before.edges[at], before.edges[at + 1]
            inside = (
                (weight.double() >= low) & (weight.double() < high)
                if low >= 0
                else (weight > low) & (weight <= high)
            )
            assert before.values[at] == int((inside & (weight != 0)).sum())
    assert plots[0].get_title(loc="right") == "50.0 % zero (after)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    one = figures.histograms(stages(layers), ["blocks.0.attn.weight"])
    assert len([axis for axis in one.axes if axis.patches]) == 1
    with pytest.raises(UsageError, match="no stage has a layer 'blocks'"):
        figures.histograms(stages(layers), ["blocks"])
    with pytest.raises(UsageError, match="there is nothing to draw"):
        figures.histograms([])


@pytest.mark.thorough
def test_every_chart_has_its_figure():
    from secateur.report import Point, Tradeoff

    layers = weights()
    held = {name: histogram(weight) for name, weight in layers.items()}
    content = Tradeoff(
        "$x$ & <b>", "sparsity", "perplexity", {"a": [Point(0.3, 3, 2, 4), Point(0.5, 5)], "b": [Point(0.4, 9)]},
        reference=2.0, log_y=True, better=("higher", "lower"),
    )  # fmt: skip
    curve = figures.threshold_curve(held, 0.25, layer="blocks.0.attn.weight")
    stops, total = curve.axes[0].lines[0].get_data()
    both = torch.cat([weight.flatten() for weight in layers.values()])
    for at in range(0, len(stops), 97):
        assert total[at] == pytest.approx(float((both.abs() <= stops[at]).double().mean()), abs=1e-3)
    for figure in (
        figures.sparsity(rows(layers)),
        curve,
        figures.tradeoff(content),
        figures.heat_map(heads()),
        figures.sensitivity(sensitivity(layers)),
        figures.mask(next(iter(pictures(layers).values())), "$\\frac{"),
    ):
        assert len(drawn(figure)) > 1000
    assert figures.tradeoff(content).axes[0].get_title(loc="left") == r"\$x\$ & <b>"
    for call in (
        lambda: figures.threshold_curve(held, layer="blocks.0"),
        lambda: figures.sensitivity(sensitivity(layers), "blocks.0"),
    ):
        with pytest.raises(UsageError, match=r"no layer 'blocks\.0'; nearest"):
            call()
    assert figures.sensitivity(Sensitivity([0.5], {}, "q")).axes


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"which is not installed\. Run: pip install 'secateur\[figures\]'"):
        figures.heat_map(heads())


class Writer:
    """What TensorBoard's SummaryWriter takes."""

    def __init__(self):
        self.scalars, self.histograms, self.figures = {}, {}, {}

    def add_scalar(self, tag, value, global_step=None):
        self.scalars[tag] = (value, global_step)

    def add_histogram_raw(self, tag, **given):
        self.histograms[tag] = given

    def add_figure(self, tag, figure, global_step=None):
        self.figures[tag] = figure


def test_tensorboard_gets_scalars_histograms_and_figures():
    writer, layers = Writer(), weights()
    stage = Stage("after", {name: histogram(torch.relu(weight)) for name, weight in layers.items()})
    log_to(
        writer, step=3, measurements={"dense": measured(12.5, 9, 1.0)}, stage=stage, figures={"heads": "figure"}
    )
    assert writer.scalars["dense/perplexity"] == (12.5, 3)
    assert writer.figures == {"heads": "figure"}
    for name, weight in layers.items():
        given = writer.histograms[f"{name}/after"]
        values = torch.relu(weight).double()
        assert given["num"] == weight.numel() == sum(given["bucket_counts"])
        assert given["sum"] == pytest.approx(float(values.sum()))
        assert given["sum_squares"] == pytest.approx(float((values**2).sum()))
        assert len(given["bucket_limits"]) == len(given["bucket_counts"])
        below = np.cumsum(given["bucket_counts"])
        for at in range(0, len(below), 53):
            assert below[at] == int((values < given["bucket_limits"][at]).sum())


class Run:
    """What a run of wandb takes."""

    def log(self, sent, step=None):
        self.sent, self.step = sent, step


def test_weights_and_biases_get_the_same(monkeypatch):
    class Package:
        Image = staticmethod(lambda figure: ("image", figure))
        Histogram = staticmethod(lambda np_histogram: np_histogram)

    monkeypatch.setitem(sys.modules, "wandb", Package)
    run = Run()
    stage = Stage("before", {"a": histogram(weights()["blocks.1.ffn.up.weight"])})
    log_to(
        run, step=2, measurements={"dense": measured(12.5, 9, 1.0)}, stage=stage, figures={"heads": "figure"}
    )
    counts, edges = run.sent["a/before"]
    assert (run.step, run.sent["dense/nonzeros"], run.sent["heads"]) == (2, 9.0, ("image", "figure"))
    assert counts.sum() == 96 * 64
    assert len(counts) <= 512
    assert len(edges) == len(counts) + 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_to(run, measurements={"dense": measured(1.5, 9, 1.0)})  # scalars alone need no package
    assert (run.sent["dense/perplexity"], run.step) == (1.5, None)
    with pytest.raises(UsageError, match=r"the extra wandb: pip install 'secateur\[wandb\]'"):
        log_to(run, stage=stage)
    with pytest.raises(UsageError, match="dict is no board"):
        log_to({})
