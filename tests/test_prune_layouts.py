"""prune_ on what is stored otherwise than nn.Linear: transposed, grouped, packed, stacked, tied, in half precision."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import (
    NM,
    Blocks,
    Columns,
    Rows,
    global_magnitude,
    magnitude,
    per_row,
    plan,
    prune_,
    random,
    ria,
    sparsity,
    undo_,
    wanda,
)
from secateur.errors import UsageError

ROW_MAGNITUDE = replace(magnitude, allocate=per_row)


@pytest.fixture(scope="module")
def gpt2_built():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    for parameter in model.parameters():  # biases too, so that nothing is zero by chance
        nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture
def gpt2(gpt2_built):
    return deepcopy(gpt2_built)


def tokens(batch: int = 4, length: int = 9, vocabulary: int = 48) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Of every row the `count` smallest, by a stable sort."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


@pytest.mark.parametrize("recipe", [magnitude, wanda, ria, random, ROW_MAGNITUDE], ids=str)
def test_gpt2_is_really_pruned_where_it_keeps_its_matrices(gpt2, recipe):
    """Trap 5: they are Conv1D; the only nn.Linear is lm_head, tied to the embedding."""
    before = {name: p.detach().clone() for name, p in gpt2.named_parameters()}
    masks = prune_(gpt2, 0.5, recipe, data=[tokens()])
    names = {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in
             ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    assert set(masks) == names
    for name, parameter in gpt2.named_parameters():
        if name in names:
            assert int((parameter == 0).sum()) == parameter.numel() / 2
            assert torch.equal(parameter == 0, ~masks[name])
        else:
            assert torch.equal(parameter, before[name])
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


@pytest.mark.parametrize(
    ("only", "parts"),
    [("attention", ("attn.c_attn", "attn.c_proj")), ("ffn", ("mlp.c_fc", "mlp.c_proj"))],
)
def test_a_role_of_gpt2_is_pruned_and_the_other_is_not(gpt2, only, parts):
    masks = prune_(gpt2, 0.75, only=only)
    assert {name.split(".", 3)[3].removesuffix(".weight") for name in masks} == set(parts)
    assert masks.sparsity == 0.75
    for name, count in sparsity(gpt2).layers.items():
        assert count.sparsity == (0.75 if name in masks else 0.0)


def test_a_row_of_gpt2_is_an_output_neuron_although_it_is_stored_as_a_column(gpt2):
    weight = gpt2.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (in, out)
    x = torch.randn(3, 5, 16)
    mask = prune_(gpt2, 0.5, ROW_MAGNITUDE)["transformer.h.0.mlp.c_fc.weight"]
    assert mask.shape == (16, 64)
    assert torch.equal(~mask.t(), lowest(weight.t().abs(), 8))
    layer = nn.Linear(16, 64)  # the same computation, stored the other way round
    layer.weight.data, layer.bias.data = weight.t().contiguous(), gpt2.transformer.h[0].mlp.c_fc.bias.detach()
    assert torch.equal(prune_(layer, 0.5, ROW_MAGNITUDE)["weight"], mask.t())
    torch.testing.assert_close(gpt2.transformer.h[0].mlp.c_fc(x), layer(x))


@pytest.mark.parametrize("pattern", [NM(2, 4), Blocks(4, 1), Rows(), Columns()], ids=repr)
def test_every_pattern_lies_along_the_inputs_of_a_transposed_layer(pattern):
    from transformers.pytorch_utils import Conv1D

    transposed, linear = Conv1D(12, 8), nn.Linear(8, 12)
    linear.weight.data = transposed.weight.detach().t().contiguous()
    recipe = replace(magnitude, pattern=pattern)
    ours, theirs = prune_(transposed, 0.5, recipe)["weight"], prune_(linear, 0.5, recipe)["weight"]
    assert torch.equal(ours.t(), theirs)
    assert int(ours.sum()) == 48


def test_wanda_of_gpt2_uses_the_inputs_of_each_layer(gpt2):
    seen = {}
    layer = gpt2.transformer.h[1].mlp.c_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].reshape(-1, 64)))
    with torch.no_grad():
        gpt2.eval()(tokens())
    handle.remove()
    scores = layer.weight.detach().t().abs() * seen["x"].norm(dim=0)
    mask = prune_(gpt2, 0.5, wanda, data=[tokens()])["transformer.h.1.mlp.c_proj.weight"]
    assert torch.equal(~mask.t(), lowest(scores, 32))


def test_a_tied_tensor_is_refused_unless_both_its_names_are_given(gpt2):
    state = deepcopy(gpt2.state_dict())
    with pytest.raises(UsageError, match=r"transformer\.wte\.weight \(embedding\).*pruning it changes both"):
        prune_(gpt2, 0.5, only="lm_head")
    assert all(torch.equal(value, state[name]) for name, value in gpt2.state_dict().items())
    masks = prune_(gpt2, 0.5, only=["lm_head", "transformer.wte"])
    assert len(masks) == 1
    assert int((gpt2.lm_head.weight == 0).sum()) == 48 * 16 / 2
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_the_number_of_nonzeros_is_exact_with_tied_tensors_biases_and_zeros(gpt2):
    gpt2.transformer.h[0].attn.c_attn.weight.data[:, :5] = 0
    gpt2.transformer.h[1].mlp.c_fc.bias.data[::2] = 0
    gpt2.transformer.wte.weight.data[3] = 0
    start = sparsity(gpt2).model.nonzeros
    for nonzero in (start, start - 1, 4_000, 3_001):
        prune_(gpt2, nonzero=nonzero, recipe=global_magnitude)
        assert sparsity(gpt2).model.nonzeros == nonzero
        assert sum(int(torch.count_nonzero(p)) for p in gpt2.parameters()) == nonzero


def test_the_number_of_nonzeros_counts_shared_memory_once():
    """Two parameter objects on the same memory are one tensor."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert sparsity(model).model.size == 44
    prune_(model, nonzero=30, recipe=global_magnitude, only=["0", "1"])
    assert sparsity(model).model.nonzeros == 30
    assert torch.equal(model[0].weight, model[1].weight)
    assert int(torch.count_nonzero(model[2].weight)) == 16  # untouched


def test_the_number_of_nonzeros_with_a_tensor_whose_first_name_is_no_layer():
    model = Wrapped(nn.Linear(4, 4, bias=False))
    model.register_parameter("extra", nn.Parameter(torch.ones(3)))
    bare = nn.Module()
    bare.table = model.inner.weight
    bare.rest = model
    prune_(bare, nonzero=8, recipe=global_magnitude, only=["table", "rest.inner"])
    assert int(torch.count_nonzero(bare.table)) == 5
    assert sparsity(bare).model.nonzeros == 8


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_pruned_filter_by_filter(groups):
    module, x = nn.Conv2d(8, 4, 3, groups=groups, padding=1), torch.randn(2, 8, 5, 5)
    weight = module.weight.detach().clone()
    masks = prune_(module, 0.5, wanda, data=[x])
    norms = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 8 * 9).norm(dim=0)
    width = 8 // groups * 9
    for filter_ in range(4):
        group = filter_ // (4 // groups)
        scores = weight[filter_].reshape(1, -1).abs() * norms[group * width : (group + 1) * width]
        assert torch.equal(~masks["weight"][filter_].reshape(1, -1), lowest(scores, width // 2))


@pytest.mark.parametrize("shape", [(4, 8, 3), (4, 6, 3, 2), (4, 6, 2, 2, 2)])
def test_convolutions_of_every_dimension(shape):
    build = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    module = build(shape[1], shape[0], shape[2:])
    masks = prune_(module, 0.25, ROW_MAGNITUDE)
    assert masks["weight"].shape == shape
    assert masks["weight"].flatten(1).sum(1).tolist() == [0.75 * masks["weight"][0].numel()] * 4


def test_a_convolution_in_another_memory_format():
    plain = nn.Conv2d(4, 6, 3)
    last = deepcopy(plain).to(memory_format=torch.channels_last)
    assert prune_(plain, 0.5, global_magnitude) == prune_(last, 0.5, global_magnitude)
    assert torch.equal(plain.weight, last.weight)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_is_a_view():
    layer, plain = nn.Linear(6, 4), nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(6, 4).t())
    plain.weight.data = layer.weight.detach().clone(memory_format=torch.contiguous_format)
    assert not layer.weight.is_contiguous()
    assert prune_(layer, 0.5) == prune_(plain, 0.5)
    assert torch.equal(layer.weight, plain.weight)


def test_query_key_and_value_are_three_matrices():
    """Their scores are taken over their own inputs and their own rows and columns."""
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8) * 3, torch.randn(2, 5, 8)
    weights = module.in_proj_weight.detach().clone().reshape(3, 8, 8)
    masks = prune_(Wrapped(module), 0.5, wanda, data=[{"query": q, "key": k, "value": v}])
    mask = masks["inner.in_proj_weight"].reshape(3, 8, 8)
    for part, x in enumerate((q, k, v)):
        scores = weights[part].abs() * x.reshape(-1, 8).norm(dim=0)
        assert torch.equal(~mask[part], lowest(scores, 4))
    assert masks["inner.out_proj.weight"].sum(1).tolist() == [4] * 8


class Wrapped(nn.Module):
    """A model around one module."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def test_experts_of_mixtral_are_scored_by_the_tokens_that_reach_them():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, head_dim=4)  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    experts = model.model.layers[0].mlp.experts
    seen = {}
    handle = experts.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0], chosen=args[1]))
    with torch.no_grad():
        model(tokens(vocabulary=32))
    handle.remove()
    weights = experts.gate_up_proj.detach().clone()
    masks = prune_(model, 0.5, wanda, data=[tokens(vocabulary=32)])
    mask = masks["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(3):
        rows = seen["hidden"].reshape(-1, 8)[(seen["chosen"] == expert).any(-1)]
        assert torch.equal(~mask[expert], lowest(weights[expert].abs() * rows.norm(dim=0), 4))
    assert masks.sparsity == 0.5
    assert not any("gate.weight" in name or "lm_head" in name or "embed" in name for name in masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = prune_(model, 0.5, wanda, data=[torch.randn(6, 16, dtype=dtype)], keep_originals=True)
    assert masks.zeros == 144
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype == dtype
        assert torch.equal(weight == 0, ~mask)
        assert not bool(torch.signbit(weight[~mask]).any())
        assert torch.equal(weight[mask], before[name][mask])
    undo_(model, masks)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_many_equal_weights_of_low_precision_are_cut_exactly():
    """Trap 2, where ties are the rule: bfloat16 has few values."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    assert model[0].weight.unique().numel() < 0.5 * 64 * 64
    for amount in (0.29, 0.5, 0.877):
        assert prune_(deepcopy(model), amount, global_magnitude).zeros == round(8192 * amount)


def test_an_embedding_is_pruned_only_by_name(gpt2):
    assert all(
        "wte" not in layer.name and "wpe" not in layer.name for layer in plan(gpt2, 0.5, only="all").layers
    )
    masks = prune_(gpt2, 0.5, only="transformer.wpe")
    assert list(masks) == ["transformer.wpe.weight"]
    assert int((gpt2.transformer.wpe.weight == 0).sum()) == 8 * 16
