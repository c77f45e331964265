"""Calibration: padding and batching do not matter, any number of samples will do, and nothing else is touched."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import (
    Recipe,
    activation,
    global_magnitude,
    globally,
    hold_,
    magnitude,
    prune_,
    random,
    ria,
    sparsegpt,
    sparsity,
    taylor,
    threshold,
    undo_,
    wanda,
    wanda_l1,
)
from secateur.errors import UsageError

WITH_DATA = {
    "wanda": wanda,
    "wanda l1": wanda_l1,
    "ria": ria,
    "activation": activation,
    "taylor": taylor,
    "global wanda": replace(wanda, allocate=globally),
}


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def texts(count: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    return [torch.randint(0, 48, (length,), generator=generator) for length in lengths]


def padded(group: list[torch.Tensor], extra: int, filler: int) -> dict[str, torch.Tensor]:
    width = max(map(len, group)) + extra
    ids = torch.full((len(group), width), filler)
    mask = torch.zeros(len(group), width, dtype=torch.long)
    for row, text in enumerate(group):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", WITH_DATA)
def test_padding_and_batching_do_not_change_a_mask(gpt2, name):
    """Trap 10: statistics are over real tokens, summed in squares, whatever the batches."""
    alone = prune_(deepcopy(gpt2), 0.5, WITH_DATA[name], data=[{"input_ids": text[None]} for text in texts()])
    for size, extra, filler in ((7, 0, 0), (3, 2, 47), (2, 3, 5)):
        groups = [texts()[i : i + size] for i in range(0, 7, size)]
        data = [padded(group, extra, filler) for group in groups]
        assert prune_(deepcopy(gpt2), 0.5, WITH_DATA[name], data=data) == alone


def test_padding_that_is_counted_would_change_the_masks(gpt2):
    """The test above can fail: the same batch without its attention mask gives other masks."""
    batch = padded(texts(), 3, 47)
    assert prune_(deepcopy(gpt2), 0.5, wanda, data=[batch]) != prune_(
        deepcopy(gpt2), 0.5, wanda, data=[{"input_ids": batch["input_ids"]}]
    )


@pytest.mark.parametrize("samples", [1, 127, 129, 300])
def test_any_number_of_samples_counts_in_full(samples):
    """The published code holds exactly 128."""
    layer, x = nn.Linear(8, 5), torch.randn(samples, 3, 8) * torch.linspace(0.1, 2, samples)[:, None, None]
    scores = layer.weight.detach().abs() * x.double().reshape(-1, 8).norm(dim=0).float()
    expected = torch.zeros(5, 8, dtype=torch.bool).scatter(1, scores.argsort(1)[:, 4:], True)
    masks = prune_(layer, 0.5, wanda, data=(sample[None] for sample in x))
    assert torch.equal(masks["weight"], expected)


def test_data_may_come_from_a_generator_and_in_any_form():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(9, 6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(9)), batch_size=4)
    forms = [[x], iter([x]), (part for part in x.split(2)), [(x, torch.zeros(9))], [{"input": x}], loader]
    masks = [prune_(deepcopy(model), 0.5, wanda, data=form) for form in forms]
    assert all(each == masks[0] for each in masks)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "recipe", [ria, replace(wanda, allocate=globally), threshold(0.5, relative=True)], ids=str
)
def test_one_thread_and_two_give_the_same_masks(recipe, threads):
    # large enough for torch to split the work
    layer = nn.TransformerEncoderLayer(192, 4, 384, batch_first=True)
    data = [torch.randn(4, 48, 192)]
    results = []
    for count in (1, 2):
        threads(count)
        amount = None if getattr(recipe.allocate, "decides", False) else 0.5
        results.append(prune_(deepcopy(layer), amount, recipe, data=data))
    assert results[0] == results[1]


def hooks_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_the_model_is_left_as_it_was_but_for_its_zeros():
    class Noisy(nn.Module):
        """Draws random numbers in evaluation mode, too."""

        def __init__(self):
            super().__init__()
            self.a, self.drop, self.norm, self.b = (
                nn.Linear(4, 6),
                nn.Dropout(),
                nn.BatchNorm1d(6),
                nn.Linear(6, 3),
            )

        def forward(self, x):
            return self.b(self.norm(self.drop(self.a(x + torch.randn_like(x)))))

    model = Noisy()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.b(torch.randn(2, 6)).sum().backward()
    handle = model.a.register_forward_hook(lambda *_: None)
    modes = [module.training for module in model.modules()]
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    identities = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    keys, hooks = list(model.state_dict()), hooks_of(model)
    state, linear, grad_mode = torch.get_rng_state(), nn.functional.linear, torch.is_grad_enabled()
    for recipe in (magnitude, random, wanda, ria):
        prune_(model, 0.5, recipe, data=[torch.ones(5, 4)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == keys
    assert hooks_of(model) == hooks
    assert nn.functional.linear is linear
    assert torch.is_grad_enabled() is grad_mode
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        same = parameter.grad is None if grads[name] is None else torch.equal(parameter.grad, grads[name])
        assert same, name
    handle.remove()


def test_a_score_sees_one_matrix_and_its_statistics_by_name():
    calls = []

    def loud(weight, input_activation, input_norm):
        calls.append((tuple(weight.shape), tuple(input_norm.shape), tuple(input_activation.shape)))
        return weight.abs() + 0 * input_norm * input_activation

    module = nn.Conv2d(4, 6, 2, groups=2)
    prune_(module, 0.5, Recipe(loud), data=[torch.randn(1, 4, 3, 3)])
    assert set(calls) == {((3, 8), (8,), (8,))}


def test_a_score_may_return_any_floating_type():
    layers = [nn.Linear(8, 8) for _ in range(4)]
    for layer in layers:
        layer.weight.data = layers[0].weight.detach().clone()
    scale = nn.Parameter(torch.ones(8))
    scores = [
        lambda w: w.abs(),
        lambda w: w.abs().double(),
        lambda w: w.abs() * scale,
        lambda w: w.abs().t().t(),
    ]
    recipes = [replace(global_magnitude, score=score) for score in scores]
    masks = [prune_(layer, 0.5, recipe) for layer, recipe in zip(layers, recipes, strict=True)]
    assert all(each == masks[0] for each in masks)


def test_the_loss_decides_what_a_gradient_says():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    first = prune_(deepcopy(model), 0.5, taylor, data=[(x, y)], loss=nn.MSELoss())
    weight = model[2].weight.detach().clone().requires_grad_()
    loss = nn.functional.mse_loss(torch.relu(model[0](x)) @ weight.t() + model[2].bias, y)
    (gradient,) = torch.autograd.grad(loss, weight)
    scores = (weight * gradient).abs().detach()
    assert torch.equal(first["2.weight"], scores > scores.flatten().kthvalue(9).values)
    with pytest.raises(UsageError, match="needs calibration data for grad; pass data="):
        prune_(model, 0.5, taylor)
    with pytest.raises(UsageError, match="pass loss="):
        prune_(model, 0.5, taylor, data=[(x, y)])


def test_gradients_of_the_dense_model_go_with_an_update():
    from secateur.recipes import wanda_mended

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    data = [(torch.randn(20, 4), torch.randint(0, 3, (20,)))]
    plain = prune_(deepcopy(model), 0.5, taylor, data=data)
    mended = prune_(model, 0.5, replace(taylor, update=wanda_mended.update), data=data)
    assert mended == plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("recipe", [wanda, sparsegpt, taylor], ids=["wanda", "sparsegpt", "taylor"])
def test_compiled_models_and_compiled_parts_are_pruned_as_they_are_written(recipe):
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    whole, part = deepcopy(plain), deepcopy(plain)
    outer = torch.compile(whole, backend="eager")
    part[0] = torch.compile(part[0], backend="eager")
    data = [(torch.randn(9, 6), torch.arange(9) % 4)]
    for model in (outer, part):
        model(data[0][0])  # compiled before anything is pruned
    expected = prune_(plain, 0.5, recipe, data=data)
    masks = prune_(outer, 0.5, recipe, data=data, keep_originals=True)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert [mask.sum() for mask in prune_(part, 0.5, recipe, data=data).values()] == [
        mask.sum() for mask in expected.values()
    ]
    with hold_(outer, masks, torch.optim.SGD(outer.parameters(), 0.1)):
        assert sparsity(outer).prunable == sparsity(plain).prunable
    assert masks.apply_(outer) is outer
    assert undo_(outer, masks) is outer
    assert sparsity(whole).prunable.zeros == 0
