"""Channels put in order for N:M: the model computes the same, more of the score is kept, nothing is half done."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import NM, channels, magnitude, permute_channels_, prune_, ria, sparsegpt, wanda
from secateur.errors import NumericError, UsageError

transformers = pytest.importorskip("transformers")
CONFIGS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, max_position_embeddings=32,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=64, num_local_experts=2,
        )
    ),
}  # fmt: skip


def uneven(model: nn.Module) -> nn.Module:
    """Columns that differ in loudness, as those of trained models do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.randn(parameter.shape, generator=generator).exp())
    return model.eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return uneven(nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Linear(24, 8)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.thorough
def test_the_model_computes_the_same_and_more_of_the_score_is_kept(kind):
    torch.manual_seed(0)
    model = uneven(CONFIGS[kind]())
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    dense = copy.deepcopy(model)
    recipe = replace(ria, pattern=NM(2, 4))
    found = permute_channels_(model, recipe, [{"input_ids": ids}])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(found.kept) == 2  # the feed-forward (of all experts) and the dimensions of the values
    assert all(after > before for before, after in found.kept.values())
    assert [why for _, why in found.left_out if why.startswith("all blocks share their order")]
    kept = []  # what prune_ then keeps of the weights that were put in order
    for each in (dense, model):
        masks = prune_(each, recipe=recipe, data=[{"input_ids": ids}], only="ffn")
        assert masks.sparsity == 0.5
        closing = [name for name in masks if "down" in name or "mlp.c_proj" in name]
        kept.append(sum(float(each.get_parameter(name).detach().abs().sum()) for name in closing))
    assert kept[1] > kept[0]


def test_biases_norms_and_their_buffers_follow():
    model = mlp()
    with torch.no_grad():
        model[1].running_mean.copy_(torch.randn(24))
        model[1].running_var.copy_(torch.rand(24) + 0.5)
        model[1].weight.copy_(torch.randn(24))
    x = torch.randn(50, 8)
    dense = copy.deepcopy(model)
    found = permute_channels_(model, replace(wanda, pattern=NM(1, 4)), [x])
    assert not torch.equal(model[1].running_mean, dense[1].running_mean)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    ((before, after),) = found.kept.values()
    assert after > before
    assert f"{after:.4f} is kept instead of {before:.4f}" in str(found)
    assert found.left_out == (("0.weight", "nothing in the model computes its inputs in another order"),)


def test_pruned_outputs_come_closer():
    """What the order is for: with Wanda and with an update alike."""
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    for recipe in (replace(wanda, pattern=NM(1, 4)), replace(sparsegpt, pattern=NM(1, 4))):
        errors = []
        for ordered in (False, True):
            model, dense = mlp(), mlp()
            if ordered:
                permute_channels_(model, recipe, [x], only="3")
            prune_(model, recipe=recipe, data=[x], only="3")
            with torch.no_grad():
                errors.append(float((model(x) - dense(x)).square().mean()))
        assert errors[1] < errors[0]


def test_the_same_seed_gives_the_same_bytes_and_mode_and_random_state_stay():
    model, again = mlp(), mlp()
    model.train()
    state = torch.get_rng_state()
    for each in (model, again):
        permute_channels_(
            each, replace(magnitude, pattern=NM(2, 4)), example=torch.randn(2, 8, generator=torch.Generator())
        )
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": wanda, "example": torch.zeros(2, 8)}, r"for N:M, such as NM\(2, 4\); got Weights\(\)"),
        ({"recipe": replace(magnitude, pattern=NM(2, 4))}, "pass example= or data="),
        ({"recipe": replace(wanda, pattern=NM(2, 4)), "example": torch.zeros(2, 8)}, "needs calibration data"),
        (
            {"recipe": replace(magnitude, pattern=NM(2, 5)), "example": torch.zeros(2, 8)},
            r"^0: 8 input columns",
        ),
    ],
)
def test_refusals_change_nothing(given, message):
    model, same = mlp(), mlp()
    with pytest.raises(UsageError, match=message):
        permute_channels_(model, **given)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True)
    )


def test_an_order_that_changes_the_outputs_is_put_back(monkeypatch):
    """Should the analysis ever be wrong, the model is as before."""
    model, same = mlp(), mlp()
    right = channels._reorder_

    def wrong(model, units, order, changed):
        right(model, units, order, changed)
        model[3].weight.data[0] += 1

    monkeypatch.setattr(channels, "_reorder_", wrong)
    with pytest.raises(NumericError, match="computes something else"):
        permute_channels_(model, replace(magnitude, pattern=NM(2, 4)), example=torch.randn(4, 8))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True)
    )


def test_an_axis_that_is_no_whole_groups_stays():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Heads()
    found = permute_channels_(model, replace(magnitude, pattern=NM(2, 4)), example=torch.randn(2, 5, 12))
    assert not found.kept
    assert any(why == "6 are no whole groups of 4" for _, why in found.left_out)
    assert str(found) == "no input channels were put in order"


def test_a_pattern_is_no_recipe():
    with pytest.raises(
        UsageError, match=r"recipe is NM\(n=2, m=4\); expected a Recipe such as secateur\.wanda"
    ):
        permute_channels_(nn.Linear(4, 4), NM(2, 4), [torch.ones(2, 4)])
