"""Norms after units went: the algebra of RMS norms, tested where epsilon matters, and statistics of batch norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.errors import UsageError
from secateur.recover.norms import recalibrate_, rescale_norms_, rms_norm


class Offset(nn.Module):
    """Gemma's: multiplied by 1 + w."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width)), eps

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class Llama(Offset):
    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.variance_epsilon = eps
        del self.eps

    def forward(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())


def torchs(width: int, eps: float | None) -> nn.RMSNorm:
    norm = nn.RMSNorm(width, eps)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("make", [Offset, Llama, torchs])
@pytest.mark.parametrize("eps", [1e-6, 0.7])
def test_over_the_survivors_it_computes_what_it_computes_with_zeros(make, eps):
    """x w / sqrt(S / D + e) = x w' / sqrt(S / D' + e'), w' = w sqrt(D / D'), e' = e D / D'."""
    masked = nn.Sequential(nn.Linear(5, 12), make(12, eps), nn.Linear(12, 3))
    kept = torch.tensor([0, 2, 3, 7, 11])
    mask = torch.zeros(12, dtype=torch.bool)
    mask[kept] = True
    small = nn.Sequential(nn.Linear(5, 5), make(5, eps), nn.Linear(5, 3))
    with torch.no_grad():
        masked[0].weight[~mask], masked[0].bias[~mask], masked[1].weight[~mask] = 0.0, 0.0, 0.0
        for mine, its in (
            (small[0].weight, masked[0].weight[kept]),
            (small[0].bias, masked[0].bias[kept]),
            (small[1].weight, masked[1].weight[kept]),
            (small[2].weight, masked[2].weight[:, kept]),
            (small[2].bias, masked[2].bias),
        ):
            mine.copy_(its)
        x = torch.randn(7, 5) * 0.3
        assert not torch.allclose(small(x), masked(x), rtol=1e-2)
        masks = Masks({"0.weight": mask[:, None].expand(12, 5), "1.weight": mask})
        assert rescale_norms_(small, masked, masks) == ("1",)
        torch.testing.assert_close(small(x), masked(x))


def test_norms_are_told_by_what_they_compute():
    assert rms_norm(Offset(9, 1e-5)) == "offset"
    assert rms_norm(Llama(9, 1e-5).to(torch.bfloat16)) == "plain"
    assert rms_norm(torchs(9, None)) == "plain"
    for other in (
        nn.LayerNorm(9),
        nn.LayerNorm(9, bias=False),
        nn.Linear(9, 9),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.PReLU(9),
    ):
        assert rms_norm(other) is None, other


def test_widths_that_do_not_fit_are_told():
    norm = nn.Sequential(torchs(6, 1e-6))
    masks = Masks({"0.weight": torch.tensor([True] * 4 + [False] * 2)})
    with pytest.raises(
        UsageError, match=r"0: the masks leave 4 of 6 features, but the shrunk model has shape \(6,\)"
    ):
        rescale_norms_(norm, norm, masks)
    with pytest.raises(UsageError, match="has shape None"):
        rescale_norms_(nn.Sequential(), norm, masks)
    assert rescale_norms_(norm, norm, Masks({"0.weight": torch.ones(6, dtype=torch.bool)})) == ()


def test_batch_norms_get_the_statistics_of_what_reaches_them():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).eval()
    model[1].running_mean.fill_(9)
    batches = [torch.randn(8, 2, 6, 6) + 1 for _ in range(3)]
    state, momentum = torch.get_rng_state(), model[1].momentum
    assert recalibrate_(model, batches) is model
    with torch.no_grad():
        outs = [model[0](x) for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outs]).mean(0))
    assert not model[1].training
    assert model[1].momentum == momentum
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(
        UsageError, match="data holds no batch; the statistics of batch norms need at least one"
    ):
        recalibrate_(model, [])
    with pytest.raises(UsageError, match="data is one batch"):
        recalibrate_(model, {"x": batches[0]})
    recalibrate_(nn.Linear(2, 2), [])
