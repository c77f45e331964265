"""Masked low-rank adapters: nothing changes before training, zeros stay, and a merge changes no output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.core.where import layers
from secateur.errors import UsageError
from secateur.prune import prune_
from secateur.recover import finetune_, lora_, merge_

from .problems import batches, classifier


def convolutions():
    parts = [
        nn.Conv2d(1, 6, 3, groups=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(96, 3),
    ]
    return nn.Sequential(*parts)


def images():
    return [(torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))) for _ in range(3)]


def gpt2():
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_head=2, n_layer=1, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config)


def sentences():
    ids = torch.randint(0, 40, (4, 10))
    return [{"input_ids": ids}]


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        given = model(**batch) if isinstance(batch, dict) else model(batch[0])
    return getattr(given, "logits", given)


@pytest.mark.parametrize(("build", "data"), [(classifier, batches), (convolutions, images), (gpt2, sentences)])
def test_a_merge_keeps_every_zero_and_every_output(build, data):
    model, data = build(), data()
    masks = prune_(model, 0.6)
    names, batch = list(model.state_dict()), data[0]
    before = outputs(model, batch)
    adapters = lora_(model, masks, rank=2)
    assert torch.equal(outputs(model, batch), before)  # B starts at zero
    frozen = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".original")}
    assert len(frozen) == len(masks) == len(adapters.names)
    finetune_(model, data, epochs=4, lr=0.05)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trained = outputs(model, batch)
    assert not torch.allclose(trained, before)
    assert merge_(model, adapters) is model
    assert torch.equal(outputs(model, batch), trained)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].view(torch.int32).any()
        assert weight[mask].all()
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_trained():
    model = classifier()
    masks = prune_(model, 0.5)
    adapters = lora_(model, masks, rank=3, vectors=False)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert adapters.size == sum(trained.values()) == 3 * (8 + 24) + 3 * (24 + 3)
    merge_(model, adapters)
    model[0].requires_grad_(False)
    adapters = lora_(model, masks, rank=3)
    vectors = 24 + 2 * 24 + 3
    assert adapters.size == 3 * (8 + 24) + 3 * (24 + 3) + vectors
    merge_(model, adapters)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]


def test_the_change_has_the_rank_and_the_scale_that_were_asked_for():
    layer = nn.Linear(12, 10, bias=False)
    before = layer.weight.detach().clone()
    adapters = lora_(layer, rank=2, alpha=6.0)
    adapter = layer.parametrizations.weight[0]
    with torch.no_grad():
        adapter.b.normal_()
        expected = before + 3 * (adapter.b[0] @ adapter.a[0])
    merge_(layer, adapters)
    assert torch.allclose(layer.weight, expected, atol=1e-6)
    assert torch.linalg.matrix_rank(layer.weight - before) == 2


def test_the_seed_decides_and_the_generator_is_left_alone():
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        layer = nn.Linear(6, 4)
        torch.set_rng_state(state)
        lora_(layer, rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(layer.parametrizations.weight[0].a.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_half_precision_weights_stay_half():
    layer = nn.Linear(6, 4).bfloat16()
    adapters = lora_(layer, rank=2)
    assert layer(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    assert merge_(layer, adapters).weight.dtype == torch.bfloat16


def test_a_merge_by_hand_would_lose_the_zeros():
    """The reason for the mask: without it the sum is dense."""
    model = classifier()
    masks = prune_(model, 0.5)
    adapters = lora_(model, only=[layer.path for layer in layers(model)])
    finetune_(model, batches(), epochs=1, lr=0.01)
    merge_(model, adapters)
    assert model[0].weight[~masks["0.weight"]].any()


def test_what_is_refused():
    model = classifier()
    masks = prune_(model, 0.5)
    for rank, alpha in ((0, 1.0), (2, 0.0), (2, float("inf"))):
        with pytest.raises(UsageError, match="expected a rank of at least 1 and an alpha above 0"):
            lora_(model, masks, rank=rank, alpha=alpha)
    with pytest.raises(UsageError, match="these masks belong to another model"):
        lora_(nn.Linear(2, 2), masks)
    with pytest.raises(UsageError, match="there is no layer to adapt"):
        lora_(model, Masks({}))
    adapters = lora_(model, masks)
    with pytest.raises(UsageError, match="the model has adapters already; merge_ them first"):
        lora_(model, masks)
    with pytest.raises(
        UsageError, match=r"0\.weight: there is no adapter on it; merge_ needs the model and the"
    ):
        merge_(classifier(), adapters)
    merge_(model, adapters)
    with pytest.raises(UsageError, match="there is no adapter on it"):
        merge_(model, adapters)


def test_tied_weights_are_not_untied():
    model = gpt2()
    with pytest.raises(
        UsageError, match=r"transformer\.wte\.weight: this weight is also lm_head\.weight; an adapter"
    ):
        lora_(model, only=["*wte", "*lm_head"])
