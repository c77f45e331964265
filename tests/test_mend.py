"""prune_ with weight updates: exact counts on every layout, the pruned stream, errors, threads, experts."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur import NM, Blocks, Recipe, per_row, prune_, undo_
from secateur.core.shrinkage import ENOUGH
from secateur.core.where import layers
from secateur.errors import NumericError, UsageError
from secateur.mend import mend_
from secateur.recipes import METHODS, alps, sparsegpt, wanda, wanda_mended
from secateur.recover import ADMM, ALPS, LeastSquares, SparseGPT, Swaps, loss
from secateur.score import magnitude

MENDING = {
    name: recipe
    for name, recipe in METHODS.items()
    if isinstance(recipe.update, LeastSquares | SparseGPT | ADMM | ALPS)
}
mending = pytest.mark.parametrize("recipe", MENDING.values(), ids=MENDING)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def data(*shape: int, batches: int = 3) -> list[torch.Tensor]:
    return [torch.randn(*shape) @ (torch.eye(shape[-1]) + 0.5) for _ in range(batches)]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@mending
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.83, 1.0])
def test_the_asked_sparsity_exactly(recipe, sparsity):
    model = network()
    masks = prune_(model, sparsity, recipe, data=data(20, 8))
    size = 8 * 12 * 2 + 32
    assert masks.zeros == round(size * sparsity)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()


@mending
def test_sparsity_zero_changes_no_bit(recipe):
    model = network()
    before = bits(model)
    prune_(model, 0.0, recipe, data=data(20, 8))
    assert unchanged(model, before)


@mending
def test_originals_can_be_put_back(recipe):
    model = network()
    before = bits(model)
    masks = prune_(model, 0.5, recipe, data=data(20, 8), keep_originals=True)
    assert not unchanged(model, before)
    undo_(model, masks)
    assert unchanged(model, before)


@mending
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 2)])
def test_n_of_m(recipe, pattern):
    model = network()
    for mask in prune_(model, recipe=replace(recipe, pattern=pattern), data=data(20, 8)).values():
        assert (mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()


@pytest.mark.parametrize("recipe", [replace(r, allocate=per_row) for r in MENDING.values()], ids=MENDING)
def test_rows_of_their_own(recipe):
    for mask in prune_(network(), 0.5, recipe, data=data(20, 8)).values():
        assert (mask.sum(1) * 2 == mask.shape[1]).all()


class Grouped(nn.Module):
    """A grouped convolution and a packed attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.attention(x, x, x)[0]


@mending
def test_parts_are_mended_each_for_itself(recipe):
    model = Grouped()
    masks = prune_(model, 0.5, recipe, data=data(5, 7, 8))
    assert list(masks) == ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    for name, parts in (("conv.weight", 2), ("attention.in_proj_weight", 3), ("attention.out_proj.weight", 1)):
        kept = masks[name].reshape(parts, -1).sum(1)
        assert (kept * 2 * parts == masks[name].numel()).all()
        assert not model.get_parameter(name)[~masks[name]].any()


@mending
def test_mending_helps_what_comes_out(recipe):
    """Held-out data; the model's own output error, against the same masks without an update."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    calibration, fresh = data(100, 16), data(200, 16)[0]
    bare, mended = deepcopy(model), deepcopy(model)
    masks = prune_(mended, 0.6, recipe, data=calibration)
    masks.apply_(bare)
    with torch.no_grad():
        dense = model(fresh)
        assert (mended(fresh) - dense).norm() < 0.8 * (bare(fresh) - dense).norm()


def test_the_second_layer_is_fitted_to_the_pruned_stream():
    """Its update gets the moment of what the pruned first layer gives, and its fit is best for exactly that."""
    seen = []

    class Spy(LeastSquares):
        def __call__(self, weight, choose, second_moment):
            seen.append((weight.clone(), second_moment.clone()))
            return super().__call__(weight, choose, second_moment)

    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)), torch.randn(50, 6)
    dense = torch.relu(model[0](x)).detach()
    masks = prune_(model, 0.5, replace(wanda, update=Spy(steps=50)), data=[x])
    sparse = torch.relu(model[0](x)).detach()
    weight, moment = seen[1]
    torch.testing.assert_close(moment, sparse.t() @ sparse)
    assert loss(model[2].weight.detach(), weight, sparse.t() @ sparse) <= loss(
        weight * masks["2.weight"], weight, moment
    )
    assert not torch.allclose(moment, dense.t() @ dense, rtol=0.01)


def test_padding_and_batching_change_nothing():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x, attention_mask=None):
            return self.b(torch.relu(self.a(x)))

    model = Tokens()
    texts = [torch.randn(n, 6) for n in (3, 5, 2, 9, 9, 4)]
    apart = [{"x": t[None], "attention_mask": torch.ones(1, len(t))} for t in texts]
    x, mask = torch.full((6, 11, 6), 50.0), torch.zeros(6, 11)
    for row, text in enumerate(texts):
        x[row, : len(text)], mask[row, : len(text)] = text, 1
    together = [{"x": x[:4], "attention_mask": mask[:4]}, {"x": x[4:], "attention_mask": mask[4:]}]
    one, other = deepcopy(model), deepcopy(model)
    assert prune_(one, 0.5, sparsegpt, data=apart) == prune_(other, 0.5, sparsegpt, data=together)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


@mending
def test_half_precision_models(recipe):
    model = network().bfloat16()
    full = deepcopy(model).float()
    batches = [batch.bfloat16() for batch in data(30, 8)]
    masks = prune_(model, 0.5, recipe, data=batches)
    assert masks.sparsity == 0.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    prune_(full, 0.5, recipe, data=[batch.float() for batch in batches])
    torch.testing.assert_close(model[0].weight.float(), full[0].weight, rtol=0.01, atol=0.01)


def test_fewer_tokens_than_inputs_and_the_damping_told(caplog):
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
    chosen = layers(model)
    counts = {layer.name: torch.tensor([layer.size // 2]) for layer in chosen}
    recipe = Recipe(magnitude, update=SparseGPT())
    with caplog.at_level("INFO", logger="secateur.mend"):
        found = mend_(
            model,
            chosen,
            recipe,
            counts,
            ["second_moment"],
            [torch.randn(3, 32)],
            lambda layer, part, known: layer.weight,
        )
    assert found.damping == {"0.weight": 0.01, "1.weight": 0.01}
    assert caplog.messages == [f"{name}: damping 0.01 of the mean diagonal" for name in counts]
    assert found.masks["0.weight"].sum() == 128


@pytest.mark.parametrize("place", [0, 2])
def test_nan_activations_name_the_layer_and_change_nothing(place):
    model = network()
    model[place].bias.data[0] = float("nan")
    before = bits(model)
    with pytest.raises(NumericError, match=rf"{place + 2}.weight: NaN or Inf among its input"):
        prune_(model, 0.5, alps, data=data(9, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "weight" in k)


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        (
            lambda w, c, second_moment: (w * float("nan"), c()),
            NumericError,
            "2.weight: the weight update gave NaN",
        ),
        (
            lambda w, c, second_moment: (w[:1], c()),
            UsageError,
            r"2.weight: update .* of shape \(8, 12\), got \(1, 12\)",
        ),
        (lambda w, c, second_moment: (w, c(w / 0)), NumericError, "2.weight: NaN or Inf among the scores"),
        (lambda w, c, second_moment: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_an_update_that_goes_wrong_leaves_every_weight_as_it_was(update, error, message):
    def first_fine(weight, choose, second_moment):
        good = LeastSquares()(weight, choose, second_moment)
        return good if weight.shape == (12, 8) else update(weight, choose, second_moment)

    model = network()
    before = bits(model)
    with pytest.raises(error, match=message):
        prune_(model, 0.5, replace(wanda, update=first_fine), data=data(9, 8))
    assert unchanged(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_unknown_statistic_and_a_pattern_that_does_not_fit():
    with pytest.raises(
        UsageError, match="asks for 'second_momnt', which is no known statistic; nearest: second_moment"
    ):
        prune_(network(), 0.5, replace(wanda, update=lambda w, c, second_momnt: (w, c())), data=data(4, 8))
    with pytest.raises(UsageError, match="swaps trade single weights"):
        prune_(network(), 0.5, Recipe(magnitude, Blocks(2, 2), update=Swaps()), data=data(4, 8))


def test_swaps_in_a_recipe():
    model, batches = network(), data(30, 8)
    plain = deepcopy(model)
    swapped = prune_(model, 0.5, replace(wanda, update=Swaps()), data=batches)
    mended = prune_(plain, 0.5, wanda_mended, data=batches)
    assert swapped.zeros == mended.zeros
    assert swapped != mended


THREADS = """
import sys, torch
from torch import nn
from secateur import prune_
from secateur.recipes import METHODS
for name in sys.argv[1:]:
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96))
        prune_(model, 0.6, METHODS[name], data=[torch.randn(200, 96) @ (torch.eye(96) + 0.1) for _ in range(3)])
        assert torch.get_num_threads() == threads
        found.append(b"".join(value.numpy().tobytes() for value in model.state_dict().values()))
    print(name, found[0] == found[1] == found[2])
"""


@pytest.mark.thorough
def test_the_same_bytes_at_1_2_and_4_threads():
    """In a process of its own, because the tests run on one thread."""
    names = ["wanda", *MENDING]
    told = subprocess.run([sys.executable, "-c", THREADS, *names], capture_output=True, text=True, timeout=300)
    assert told.stdout.split("\n")[:-1] == [f"{name} True" for name in names], told.stderr


def mixtral(experts: int = 4, hidden: int = 16):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=experts, num_experts_per_tok=2, vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def starve(model, expert: int) -> None:
    """The routers never choose this expert."""
    for block in model.model.layers:
        gate = next(module for path, module in block.named_modules() if path.endswith("gate"))
        gate.weight.data[expert] = 0
        # all others are drawn away from zero by the first input, which is made large
        gate.weight.data[:, 0] = torch.where(torch.arange(len(gate.weight)) == expert, -50.0, 0.0)
        norm = block.post_attention_layernorm
        norm.weight.data[0] = 0.0
        norm.register_forward_hook(lambda m, args, out: out + torch.eye(out.shape[-1])[0])


@mending
@pytest.mark.thorough
def test_experts_of_mixtral_are_exact_each_for_itself(recipe):
    model = mixtral()
    tokens = [{"input_ids": torch.randint(0, 32, (4, 12))}]
    masks = prune_(model, 0.5, recipe, data=tokens)
    stacked = {name: mask for name, mask in masks.items() if mask.dim() == 3}
    assert len(stacked) == 4
    for name, mask in stacked.items():
        assert (mask.flatten(1).sum(1) * 2 == mask[0].numel()).all()
        assert not model.get_parameter(name)[~mask].any()


def test_an_expert_without_tokens_leans_on_the_layer():
    """The expert that the router never chooses is fitted to the mean token of its layer, not zeroed."""
    model, moments = mixtral(), {}
    starve(model, 3)
    chosen = []
    for block in model.model.layers:
        block.mlp.experts.register_forward_pre_hook(lambda m, args: chosen.append(args[1]))
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    class Spy(LeastSquares):
        def __call__(self, weight, choose, second_moment):
            moments.setdefault(tuple(weight.shape), []).append(second_moment.clone())
            return super().__call__(weight, choose, second_moment)

    tokens = [{"input_ids": torch.randint(0, 32, (4, 12))}]
    masks = prune_(model, 0.5, replace(wanda, update=Spy()), data=tokens, only="*experts*")
    assert len(chosen) == 2
    assert not any((index == 3).any() for index in chosen)
    for layer in range(2):
        parts = torch.stack(moments[48, 16][4 * layer : 4 * layer + 4])
        traces = parts.diagonal(dim1=1, dim2=2).sum(1)
        assert (traces > 0).all()
        assert torch.linalg.matrix_rank(parts[3]) > 1
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        weight, mask = model.state_dict()[name][3], masks[name][3]
        assert weight[mask].all()
        # on the layer's mean the fit beats the mask alone
        assert loss(weight, dense[name][3], parts[3]) < loss(dense[name][3] * mask, dense[name][3], parts[3])


def test_how_far_an_expert_leans():
    from secateur.core.matrix import Layout
    from secateur.core.shrinkage import lean_on_the_layer
    from secateur.core.statistics import Sums

    layout = Layout("w", (3, 1, 2), torch.clone, torch.clone, None)
    layer = SimpleNamespace(name="experts", module=nn.Identity(), layout=layout)
    enough = ENOUGH * 2
    parts = [torch.randn(2 * enough, 2), torch.randn(enough // 4, 2), torch.zeros(0, 2)]
    sums = Sums(["second_moment", "input_norm", "input_activation"], layer)
    sums.add(parts)
    lean_on_the_layer(sums)
    found = sums.values()
    every = torch.cat(parts)
    mean = every.t() @ every / len(every)
    torch.testing.assert_close(found["second_moment"][0], parts[0].t() @ parts[0])  # stands on its own
    own = parts[1].t() @ parts[1]
    torch.testing.assert_close(found["second_moment"][1], 0.25 * own + 0.75 * len(parts[1]) * mean)
    torch.testing.assert_close(found["second_moment"][2], mean)
    for statistic in found["second_moment"], found["input_norm"].square()[:, :, None] * torch.eye(2):
        torch.testing.assert_close(statistic.diagonal(dim1=1, dim2=2), found["input_norm"].square())
    torch.testing.assert_close(found["input_activation"][2], every.abs().mean(0))


def test_parts_with_equally_many_tokens_do_not_lean():
    conv = nn.Conv1d(4, 4, 1, groups=2)
    seen = []

    def spy(weight, choose, second_moment):
        seen.append(second_moment)
        return weight, choose()

    x = torch.randn(1, 4, 3)
    prune_(conv, 0.5, Recipe(magnitude, update=spy), data=[x])
    rows = x[0].t()
    torch.testing.assert_close(seen[1], rows[:, 2:].t() @ rows[:, 2:])
