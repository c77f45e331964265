"""One view of every layout: it inverts exactly, and its rows are what the matrix really multiplies."""

import pytest
import torch
from torch import nn

from secateur.core.matrix import layouts


def conv1d(columns: int, out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, columns)


CASES = {
    "linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2)), (2, 3, 8, 7)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "transposed": (lambda: conv1d(5, 7), (2, 4, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_times_matrices_is_the_forward_pass(name):
    build, shape = CASES[name]
    module, x = build(), torch.randn(shape)
    module.bias.data.normal_()
    (layout,) = layouts(module)
    matrices = layout.to_matrices(module.weight.detach())
    assert tuple(matrices.shape) == layout.shape
    outputs = [rows @ m.t() for rows, m in zip(layout.rows((x,), {}, None), matrices, strict=True)]
    ours = torch.cat(outputs, dim=1) + module.bias
    expected = module(x)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(ours, expected.reshape(ours.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*CASES, "embedding", "attention", "experts", "experts transposed"])
def test_the_view_inverts_exactly(name):
    module = {
        "embedding": lambda: nn.Embedding(7, 3),
        "attention": lambda: nn.MultiheadAttention(6, 2),
        "experts": lambda: Experts(False),
        "experts transposed": lambda: Experts(True),
    }.get(name, CASES.get(name, [None])[0])()
    for layout in layouts(module):
        weight = getattr(module, layout.name).detach()
        matrices = layout.to_matrices(weight)
        assert tuple(matrices.shape) == layout.shape
        assert torch.equal(layout.from_matrices(matrices), weight)
        assert layout.from_matrices(matrices).is_contiguous()


class Experts(nn.Module):
    """The shape of transformers' stacked experts."""

    has_gate, has_bias = True, False

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (3, 8, 5), (3, 5, 4)
        if is_transposed:
            up, down = (3, 5, 8), (3, 4, 5)
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_see_the_tokens_that_are_routed_to_them(is_transposed):
    module = Experts(is_transposed)
    hidden, chosen = torch.randn(6, 5), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [0, 1]])
    real = torch.tensor([True, True, False, True, True, True])
    up, down = layouts(module)
    seen = up.rows((hidden, chosen, torch.ones(6, 2)), {}, real)
    assert [rows.shape[0] for rows in seen] == [5, 5, 0]
    assert torch.equal(seen[0], hidden[real])
    weight = up.to_matrices(module.gate_up_proj.detach())[0]
    gate, value = (hidden[real] @ weight.t()).chunk(2, dim=-1)
    inner = down.rows((hidden, chosen, torch.ones(6, 2)), {}, real)[0]
    torch.testing.assert_close(inner, nn.functional.silu(gate) * value)


def test_the_real_mixtral_experts_are_known():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3)
    shapes = {layout.name: layout.shape for layout in layouts(MixtralExperts(config))}
    assert shapes == {"gate_up_proj": (3, 24, 8), "down_proj": (3, 8, 12)}


def test_attention_has_three_matrices_with_an_input_each():
    module = nn.MultiheadAttention(6, 2, batch_first=True)
    (layout,) = layouts(module)
    q, k, v = torch.randn(2, 3, 6), torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    assert layout.shape == (3, 6, 6)
    seen = layout.rows((q,), {"key": k, "value": v}, None)
    assert [torch.equal(rows, x.reshape(-1, 6)) for rows, x in zip(seen, (q, k, v), strict=True)] == [True] * 3


def test_a_convolution_leaves_padding_out():
    module = nn.Conv1d(1, 1, 1)
    (layout,) = layouts(module)
    x = torch.arange(8.0).reshape(2, 1, 4)
    real = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert layout.rows((x,), {}, real)[0].flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)), nn.LSTM(2, 2)])
def test_other_modules_hold_no_matrix(module):
    assert layouts(module) == ()
