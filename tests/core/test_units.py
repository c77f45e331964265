"""The axis analysis against eager models: what is pruned equals what is masked, or is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.units import analyse, masked_program, pruned_program

BENCH = str(Path(__file__).resolve().parents[2] / "bench")


@pytest.fixture(scope="module")
def bench():
    """The measuring script of the architecture table."""
    sys.path.insert(0, BENCH)
    try:
        import architectures

        yield architectures
    finally:
        sys.path.remove(BENCH)


FEW = [
    pytest.param("resnet-option-a", marks=pytest.mark.thorough),
    pytest.param("densenet", marks=pytest.mark.thorough),
    "vgg-flatten",
    "shufflenet",
    pytest.param("c2f-yolo", marks=pytest.mark.thorough),
    "decoder",
    pytest.param("lstm-2-bidirectional", marks=pytest.mark.thorough),
    pytest.param("gru", marks=pytest.mark.thorough),
]
HF = ["gpt2", "llama-gqa-tied", "phi3"]


@pytest.mark.parametrize("name", FEW)
def test_pruned_equals_masked(bench, name: str) -> None:
    row = bench.Row(name)
    bench.measure(row, 0)
    assert row.verdict == "equal", row
    assert row.axes >= 2
    assert row.removed > 0.2


@pytest.mark.parametrize("name", HF)
@pytest.mark.thorough
def test_pruned_equals_masked_on_transformers(bench, name: str) -> None:
    row = bench.Row(name)
    bench.measure(row, 0)
    assert row.verdict == "equal", row
    assert row.removed > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_every_architecture_is_equal_or_refused_by_name(bench, seed: int) -> None:
    import zoo

    for name in zoo.names():
        row = bench.Row(name)
        bench.measure(row, seed)
        assert row.verdict == "equal", row


class Net(nn.Module):
    """Submodules, and a function for the forward."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.computation = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.computation(self, *args)


X = torch.randn(2, 5, 7, dtype=torch.float64)
IMAGE = torch.randn(2, 3, 9, 9, dtype=torch.float64)
A, B = nn.Linear(7, 12), nn.Linear(12, 3)


def linear(inputs: int, outputs: int, **options: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def write_inside(s: Net, x: Tensor) -> Tensor:
    y = s.a(x)
    y[..., :4].add_(1)
    return y.sum(-1)


PRUNABLE = {
    "relu before a sum": (Net(lambda s, x: s.a(x).relu().sum(-1), a=linear(7, 12)), X, [12]),
    "one zero factor is enough": (Net(lambda s, x: s.a(x) @ s.a(x).exp().mT, a=linear(7, 12)), X, [12]),
    "sigmoid before a linear layer": (Net(lambda s, x: s.b(s.a(x).sigmoid()), a=A, b=B), X, [12]),
    "unwrapped parameter": (
        Net(lambda s, x: s.b((x @ s.w).relu() * s.c), b=B,
            w=nn.Parameter(torch.randn(7, 12)), c=nn.Parameter(torch.randn(12))), X, [12],
    ),
    "normalised to length one": (Net(lambda s, x: s.b(F.normalize(s.a(x), dim=-1)), a=A, b=B), X, [12]),
    "weight used twice": (Net(lambda s, x: s.b(s.h(s.h(s.a(x)))), a=A, h=linear(12, 12), b=B), X, [12]),
    "weight and its transpose": (Net(lambda s, x: s.a(x).relu() @ s.a.weight, a=A), X, [12]),
    "gated halves": (Net(lambda s, x: s.b(F.glu(s.a(x))), a=linear(7, 24), b=B), X, [12]),
    "interleaved pairs": (
        Net(lambda s, x: s.b(s.a(x)[..., ::2] * s.a(x)[..., 1::2]), a=linear(7, 6), b=linear(3, 3)), X, [3],
    ),
    "overlapping slices": (Net(lambda s, x: s.b(s.a(x)[..., :8] + s.a(x)[..., 4:]), a=A, b=linear(8, 3)), X, [4]),
    "written inside, partly": (Net(write_inside, a=linear(7, 12)), X, [8]),
    "positions made in the forward": (
        Net(lambda s, x: s.b(s.a(x) * torch.arange(1, 13)), a=A, b=B), X, [12],
    ),
    "squeeze and excite": (
        Net(
            lambda s, x: s.d((y := s.c(x)) * s.g(s.f(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]),
            c=nn.Conv2d(3, 12, 3), f=linear(12, 5), g=linear(5, 12), d=nn.Conv2d(12, 4, 1),
        ), IMAGE, [5, 12],
    ),
    "depthwise with a multiplier": (
        Net(lambda s, x: s.d(s.g(s.c(x))), c=nn.Conv2d(3, 6, 3), g=nn.Conv2d(6, 12, 3, groups=6),
            d=nn.Conv2d(12, 4, 1)), IMAGE, [2, 6],
    ),
    "grouped transposed convolution": (
        Net(
            lambda s, x: s.d(s.g(s.c(x))),
            c=nn.Conv2d(3, 6, 3), g=nn.ConvTranspose2d(6, 12, 2, 2, groups=3), d=nn.Conv2d(12, 4, 1),
        ), IMAGE, [2, 3, 4],
    ),
    "grouped-query attention": (
        Net(
            lambda s, x: s.o(
                F.scaled_dot_product_attention(
                    s.q(x).view(2, 5, 6, 4).transpose(1, 2), s.k(x).view(2, 5, 2, 4).transpose(1, 2),
                    s.v(x).view(2, 5, 2, 4).transpose(1, 2), enable_gqa=True,
                ).transpose(1, 2).flatten(2)
            ), q=linear(7, 24), k=linear(7, 8), v=linear(7, 8), o=linear(24, 3),
        ), X, [2, 3, 4, 4],
    ),
    "multi-head attention module": (
        Net(lambda s, x: s.b(s.m(y := s.a(x), y, y)[0]), a=A, m=nn.MultiheadAttention(12, 3, batch_first=True), b=B),
        X, [3, 4, 12, 12],
    ),
    "no_grad region": (Net(lambda s, x: s.b(torch.no_grad()(s.a)(x).relu()), a=A, b=B), X, [12]),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNABLE)
def test_axes_found_and_equal_to_the_eager_model(bench, name: str) -> None:
    model, x, sizes = PRUNABLE[name]
    model = model.double().eval()
    analysis = analyse(model, (x,))
    assert sorted(units.size for units in analysis.units) == sizes, analysis.units
    assert not analysis.unruled
    for seed in range(3):
        keep = bench.keep_at_random(analysis, torch.Generator().manual_seed(seed), exact_only=True)
        pruned, masked = pruned_program(analysis, keep)(x), bench.zeroed(model, analysis, keep)(x)
        torch.testing.assert_close(pruned, masked, rtol=1e-9, atol=1e-9)
        keep = bench.keep_at_random(analysis, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            pruned_program(analysis, keep)(x), masked_program(analysis, keep)(x), rtol=1e-9, atol=1e-9
        )


SUMMED = "summed over where masked units are not zero"
REFUSED = {
    "sigmoid before a sum": (Net(lambda s, x: s.a(x).sigmoid().sum(-1), a=linear(7, 12)), X, SUMMED),
    "constant before a sum": (Net(lambda s, x: (s.a(x) + 1).sum(-1), a=linear(7, 12)), X, SUMMED),
    "both factors not zero": (Net(lambda s, x: s.a(x).exp() @ s.a(x).exp().mT, a=linear(7, 12)), X, SUMMED),
    "written inside": (
        Net(lambda s, x: (y := s.a(x), y.view(2, 5, 3, 4).add_(1), y.sum(-1))[2], a=linear(7, 12)), X, SUMMED,
    ),
    "batch norm without weights": (
        Net(lambda s, x: s.n(s.c(x)).sum(1), c=nn.Conv2d(3, 12, 3), n=nn.BatchNorm2d(12, affine=False)), IMAGE, SUMMED,
    ),
    "softmax": (Net(lambda s, x: s.b(s.a(x).softmax(-1)), a=A, b=B), X, "softmax over it (aten.softmax)"),
    "sort": (Net(lambda s, x: s.b(s.a(x).sort(-1)[0]), a=A, b=B), X, "sort over it (aten.sort)"),
    "cumulative sum": (Net(lambda s, x: s.b(s.a(x).cumsum(-1)), a=A, b=B), X, "cumsum over it (aten.cumsum)"),
    "maximum": (Net(lambda s, x: s.a(x).amax(-1), a=linear(7, 12)), X, "amax over it (aten.amax)"),
    "division of zeros": (
        Net(lambda s, x: s.b(s.a(x) / s.c(x)), a=A, b=B, c=linear(7, 12)), X, "masked units divide by zero",
    ),
    "mixed heads": (
        Net(lambda s, x: s.b(s.a(x).view(2, 5, 4, 6).flatten(2) + s.c(x).view(2, 5, 6, 4).flatten(2)), a=linear(7, 24),
            b=linear(24, 3), c=linear(7, 24)), X, None,
    ),
    "transposed heads": (
        Net(lambda s, x: s.b(s.a(x).view(2, 5, 4, 6).mT.flatten(2) + s.a(x)), a=linear(7, 24), b=linear(24, 3)), X,
        "cannot be aligned (aten.add)",
    ),
    "chosen by index": (
        Net(lambda s, x: s.b(s.a(x)[..., [0, 2, 5]]), a=A, b=linear(3, 3)), X, "positions are chosen by index",
    ),
    "rolled": (Net(lambda s, x: s.b(s.a(x).roll(1, -1)), a=A, b=B), X, "positions change places (aten.roll)"),
    "operator without a rule": (
        Net(lambda s, x: s.b(torch.fft.fft(s.a(x)).real), a=A, b=B), X, "no rule for this operator (aten.fft_fft)",
    ),
    "weight norm": (
        Net(lambda s, x: s.b(s.a(x)), a=nn.utils.parametrizations.weight_norm(linear(7, 12)), b=B), X,
        "a masked slice has no direction: bake the weight norm in before pruning",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_frozen_with_its_reason(name: str) -> None:
    model, x, text = REFUSED[name]
    model = model.double().eval()
    analysis = analyse(model, (x,))
    assert not [units for units in analysis.units if units.size in (12, 24)]
    if text is not None:
        assert any(text in str(frozen.reason) for frozen in analysis.frozen), [
            str(f.reason) for f in analysis.frozen
        ]
    torch.testing.assert_close(analysis.program(x), model(x), rtol=0, atol=0)
