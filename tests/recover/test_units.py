"""What removed units did, taken over by those that stay: against torch's least squares, and on whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.masks import Masks
from secateur.core.units import analyse
from secateur.errors import NumericError, UsageError
from secateur.recover.units import mend_units_, take_over


def problem(out: int, inputs: int, gone: int, seed: int, tokens: int = 60):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix + 2
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    mask = torch.zeros(inputs, dtype=torch.bool)
    mask[torch.randperm(inputs, generator=generator)[:gone]] = True
    return x, weight, mask


def moments(x):
    return x.t() @ x, x.mean(0), torch.tensor(float(len(x)), dtype=torch.float64)


@given(st.integers(1, 4), st.integers(2, 8), st.booleans(), st.integers(0, 10**6), st.data())
def test_without_damping_it_is_ordinary_least_squares(out, inputs, has_bias, seed, data):
    gone = data.draw(st.integers(1, inputs - 1))
    x, weight, mask = problem(out, inputs, gone, seed)
    found = take_over(weight, mask, *moments(x), has_bias, damping=1e-12)
    design = torch.cat([x[:, ~mask], torch.ones(len(x), 1, dtype=x.dtype)], 1) if has_bias else x[:, ~mask]
    expected = torch.linalg.lstsq(design, x @ weight.t()).solution
    torch.testing.assert_close(x @ found.weight.t() + found.shift, design @ expected, rtol=1e-5, atol=1e-5)
    assert bool((found.weight[:, mask] == 0).all())
    assert has_bias or bool((found.shift == 0).all())


@given(st.integers(2, 8), st.booleans(), st.sampled_from([1e-6, 0.01, 1.0, 100.0]), st.integers(0, 10**6))
def test_never_worse_than_the_mask_and_the_errors_are_true(inputs, has_bias, damping, seed):
    x, weight, mask = problem(3, inputs, max(1, inputs // 3), seed)
    y = x @ weight.t()
    for how in ("least-squares", "bias"):
        found = take_over(weight, mask, *moments(x), has_bias, how, damping)
        after = (x @ found.weight.t() + found.shift - y).square().sum(1).mean()
        before = (x @ (weight * ~mask).t() - y).square().sum(1).mean()
        scale = float(y.square().sum(1).mean())
        assert abs(found.after - float(after)) < 1e-8 * scale
        assert abs(found.before - float(before)) < 1e-8 * scale
        assert found.after <= found.before + 1e-9 * scale


def masks_of(model, x, **keep) -> Masks:
    analysis = analyse(model, (x,))
    (units,) = [units for units in analysis.units if units.kind == keep["kind"]][:1]
    return analysis.masks({units.name: keep["kept"]})


def test_a_unit_that_never_changes_goes_into_the_bias():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 3)), torch.randn(40, 5)
    model[0].weight.data[2] = 0  # computes sigmoid(bias)
    with torch.no_grad():
        before = model(x)
    masks = masks_of(model, x, kind="feed-forward unit", kept=[0, 1, 3, 4, 5])
    report = mend_units_(model, masks, [x], how="bias")
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    assert bool((model[2].weight[:, 2] == 0).all())
    assert bool((model[0].weight[2] == 0).all())
    assert model[0].bias[2] == 0
    (layer,) = report.layers
    assert (layer.name, layer.columns, layer.bias) == ("2.weight", 1, True)
    assert layer.after < 1e-6 < layer.before  # moments are summed in float32
    assert str(report).startswith("2.weight: 1 inputs gone, relative squared error ")


@pytest.mark.parametrize("bias", [True, False])
def test_units_that_others_can_say_cost_nothing(bias):
    """Half of the neurons are multiples of the others; on new data, too, nothing is lost."""
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias)), torch.randn(200, 5)
    model[0].weight.data[4:] = 2 * model[0].weight.data[:4]
    model[0].bias.data[4:] = 2 * model[0].bias.data[:4]
    new = torch.randn(20, 5)
    with torch.no_grad():
        before = model(new)
    mend_units_(model, masks_of(model, x, kind="feed-forward unit", kept=range(4)), [x], damping=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(new), before, rtol=1e-3, atol=1e-4)
    assert bool((model[0].weight[4:] == 0).all())


def test_channels_of_convolutions_are_mended_with_all_their_taps():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2)).eval()
    x = torch.randn(4, 2, 9, 9)
    model[0].weight.data[3:] = model[0].weight.data[:3]
    model[0].bias.data[3:] = model[0].bias.data[:3]
    with torch.no_grad():
        before = model(x)
    mend_units_(model, masks_of(model, x, kind="channel", kept=[0, 1, 2]), [x[:2], x[2:]], damping=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
    assert bool((model[2].weight[:, 3:] == 0).all())


def test_layers_are_mended_on_inputs_that_come_from_mended_layers():
    """The second reader's bias has to make up for what the first, mended by its bias alone, still gets wrong."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(100, 5)
    analysis = analyse(model, (x,))
    masks = analysis.masks({units.name: range(4) for units in analysis.units})
    with torch.no_grad():
        h = model[1](model[0](x))
        shifted = torch.relu(
            h[:, :4] @ model[2].weight[:, :4].t()
            + h[:, 4:].mean(0) @ model[2].weight[:, 4:].t()
            + model[2].bias
        )
        expected = model[4].bias + shifted[:, 4:].mean(0) @ model[4].weight[:, 4:].t()
    report = mend_units_(model, masks, [x], how="bias")
    torch.testing.assert_close(model[4].bias.detach(), expected)
    assert [layer.name for layer in report.layers] == ["2.weight", "4.weight"]


def test_a_transposed_layer_and_one_without_bias():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(3, 53, (8, 12))
    analysis = analyse(model, (ids,), {"use_cache": False}, output="logits")
    keep = {
        units.name: range(units.size // 2)
        for units in analysis.units
        if units.kind in ("head", "feed-forward unit")
    }
    report = mend_units_(model, analysis.masks(keep), [ids])
    assert [layer.name.split(".", 3)[3] for layer in report.layers] == [
        "attn.c_proj.weight",
        "mlp.c_proj.weight",
    ] * 2
    assert all(layer.after < layer.before for layer in report.layers)
    weights = dict(model.named_parameters())
    for name, mask in analysis.masks(keep).items():
        assert bool((weights[name][~mask] == 0).all())


def test_words_and_nothing_changed_on_an_error():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 5)
    masks = masks_of(model, x, kind="feed-forward unit", kept=range(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match="how='fold' is not known; expected 'least-squares' or 'bias'"):
        mend_units_(model, masks, [x], how="fold")
    with pytest.raises(UsageError, match="data holds no batch"):
        mend_units_(model, masks, [])
    with pytest.raises(NumericError, match=r"2\.weight: NaN or Inf among its input activations"):
        mend_units_(model, masks, [x * float("inf")])
    with pytest.raises(UsageError, match="these masks remove no input of any layer"):
        mend_units_(model, Masks({"0.weight": masks["0.weight"]}), [x])
    ones, one, gone = torch.ones(1, 3), torch.tensor(1.0), torch.tensor([True, False, False])
    with pytest.raises(NumericError, match="NaN or Inf in the second moment"):
        take_over(ones, gone, torch.full((3, 3), float("nan")), torch.zeros(3), one, False)
    absurd = torch.tensor([[1.0, 0, 0], [0, 1, 1e9], [0, 1e9, 1]])  # no moment of anything
    with pytest.raises(NumericError, match="cannot be factorised"):
        take_over(ones, gone, absurd, torch.zeros(3), one, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
