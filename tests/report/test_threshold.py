from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import prune_, threshold
from secateur.errors import UsageError
from secateur.report import Cut, Stage, histogram, threshold_for, threshold_section
from secateur.report.threshold import thresholds

from .pages import stages, weights

singles = st.floats(0, 1e6, width=32)


@given(st.lists(st.floats(-100, 100, width=32), max_size=40), singles, st.sampled_from([1, 4, 32]))
def test_what_a_threshold_removes_lies_between_the_bounds_and_is_exact_at_the_stops(values, tau, bins):
    tensor = torch.tensor(values, dtype=torch.float32)
    held = histogram(tensor, bins=bins)
    true = int((tensor.abs() <= tau).sum())
    found = held.count_up_to(tau)
    assert found.low <= true <= found.high
    assert found.low <= found.estimate <= found.high
    for stop in thresholds([held])[:: max(1, bins // 2)]:
        assert held.count_up_to(stop) == (count := int((tensor.abs() <= stop).sum()), count, count)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30), st.integers(0, 30))
def test_a_threshold_equal_to_a_weight_removes_it(values, at):
    tensor = torch.tensor(values, dtype=torch.float32)
    tau = float(tensor.abs()[at % len(tensor)])
    found = histogram(tensor).count_up_to(tau)
    assert found.low <= int((tensor.abs() <= tau).sum()) <= found.high


def test_thresholds_that_are_none_and_those_beyond_everything():
    held = histogram(torch.tensor([0.0, -0.5, 2.0]))
    assert held.count_up_to(0) == (1, 1, 1)
    assert held.count_up_to(2.0) == held.count_up_to(1e300) == held.count_up_to(3e38) == (3, 3, 3)
    wide = histogram(torch.tensor([1e40, 1.0], dtype=torch.float64))
    assert wide.count_up_to(3e38).low == 1
    assert wide.count_up_to(1e41) == (2, 2, 2)
    for tau in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="expected a magnitude"):
            held.count_up_to(tau)


def model() -> nn.Module:
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 8))
    with torch.no_grad():
        network[2].weight.mul_(7)
    return network


def test_a_cut_counts_what_prune_cuts():
    """Layers of different scale: where a cut calls itself exact it is, and its bounds hold elsewhere."""
    dense = model()
    names = ["0.weight", "2.weight", "4.weight"]
    histograms = {name: histogram(dense.get_parameter(name)) for name in names}
    exact = 0
    for tau in thresholds(list(histograms.values()))[1::29]:
        cut = Cut.of(histograms, tau)
        if cut.total.low == 0:
            continue
        pruned = model()
        masks = prune_(pruned, recipe=threshold(tau), only="all")
        exact += cut.total.error == 0
        assert cut.total.low <= masks.zeros <= cut.total.high
        assert cut.total.error < 0.002 * cut.size
        assert cut.size == masks.size
        for name in names:
            found = cut.layers[name]
            assert found.low <= int((~masks[name]).sum()) <= found.high
            if tau > 2.0 ** histograms[name].exponent:
                assert found.error == 0
    assert exact > 5


def test_stops_are_exact_for_layers_of_like_scale_and_bounded_by_one_bin_for_others():
    random = torch.Generator().manual_seed(0)
    small, large = (torch.randn(4000, generator=random) * scale for scale in (0.02, 3.0))
    held = [histogram(small), histogram(large)]
    for tau in thresholds(held)[1:]:
        fine, coarse = (one.count_up_to(tau) for one in held)
        assert fine == ((true := int((small.abs() <= tau).sum())), true, true)
        assert coarse.low <= int((large.abs() <= tau).sum()) <= coarse.high
        assert coarse.error == 0 or tau < 2.0 ** held[1].exponent
        assert coarse.error <= max(held[1].magnitudes[: held[1].bins])


def test_the_threshold_for_a_sparsity_is_the_least_stop_that_reaches_it():
    histograms = {name: histogram(weight) for name, weight in weights().items()}
    both = torch.cat([weight.flatten() for weight in weights().values()])
    for sparsity in (0, 0.1, 0.5, 0.9, 1):
        tau = threshold_for(histograms, sparsity)
        stops = thresholds(list(histograms.values()))
        assert int((both.abs() <= tau).sum()) >= sparsity * both.numel()
        at = stops.index(tau)
        certain = sum(held.count_up_to(stops[at - 1]).low for held in histograms.values()) if at else 0
        assert at == 0 or certain < sparsity * both.numel()
    assert threshold_for({"a": histogram(torch.zeros(3))}, 0.5) == 0
    with pytest.raises(UsageError, match=r"sparsity is 1\.5"):
        threshold_for(histograms, 1.5)


def test_stops_are_ascending_single_numbers_below_the_edges():
    stops = np.array(thresholds([histogram(torch.randn(500)), histogram(torch.randn(500) * 1e-3, bins=8)]))
    assert (np.diff(stops) > 0).all()
    assert (stops.astype(np.float32) == stops).all()
    assert thresholds([]) == [0.0]


def test_sections_that_cannot_be():
    with pytest.raises(UsageError, match="a threshold needs the histograms of at least one stage"):
        threshold_section([])
    with pytest.raises(UsageError, match="a threshold needs the histograms"):
        threshold_section([Stage("empty", {})])
    with pytest.raises(UsageError, match="no stage is called 'befor'; nearest: before"):
        threshold_section(stages(weights()), stage="befor")
    with pytest.raises(UsageError, match="expected a magnitude"):
        threshold_section(stages(weights()), start=-1)
    assert "τ = 0.25 removes" in threshold_section(stages(weights()), start=0.25).body
    assert "mean activation |a|" in threshold_section(stages(weights()), kind="neurons").body
