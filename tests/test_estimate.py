"""The warning that method best takes long: counted from one forward pass, and silent where nobody waits."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import NM, alps, plan
from secateur.estimate import Estimate, estimate, in_words, warning


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.h[1](self.h[0](x))


@pytest.mark.parametrize(
    ("sparsity", "recipe", "tried", "epochs"),
    [(0.5, alps, 3, 10), (0.7, alps, 6, 15), (None, replace(alps, pattern=NM(2, 4)), 1, 10)],
)
def test_what_best_makes_of_a_forward_pass(monkeypatch, sparsity, recipe, tried, epochs):
    model = Slow()
    todo = plan(model, sparsity, recipe)
    ticks = iter([0.0, 5.0, 10.0, 11.0])  # the second pass takes a second
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    found = estimate(model, torch.zeros(4, 8), 3200, todo)
    assert model.calls == 2
    assert found.speed == 32
    assert found.wanda == 100.0
    solving = 1 + (2 * 60 * 8**3 + 50 * 8**3) / (8 * 8 * 3200)
    assert found.alps == pytest.approx(100 * solving)
    assert found.best == pytest.approx(100 * (tried * (solving + 8) + 3 * epochs + 2))


def test_the_words():
    assert warning(Estimate(59.0, 3.0, 1.0, 1000, 10)) is None
    assert warning(Estimate(1800.0, 40.0, 1.0, 1234.5, 32768)) == (
        "Method best may take about 30 minutes here, judged by a short forward pass (1,234 tokens a second) and 32,768 "
        "tokens of calibration. Faster: --method alps, about 40 seconds, or --method wanda, about 1 second; fewer "
        "--samples save in proportion."
    )
    assert [in_words(x) for x in (3, 89, 95, 5401)] == ["3 seconds", "90 seconds", "2 minutes", "1.5 hours"]
