"""Coupled units through prune_: exact counts, whole units, nothing of width zero, on real architectures."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import (
    Masks,
    Recipe,
    Threshold,
    activation,
    globally,
    magnitude,
    per_layer,
    plan,
    prune_,
    score,
    taylor,
    undo_,
    wanda,
    wanda_mended,
)
from secateur.allocate import Normalised
from secateur.core.example import analysis_of
from secateur.core.unit_masks import keep_of
from secateur.core.units import pruned_program
from secateur.errors import NumericError, UsageError
from secateur.pattern import Channels, Heads, Hidden, KVGroups, Neurons

ALLOCATIONS = {"per axis": per_layer, "global": globally, "normalised": Normalised("standard")}


class Net(nn.Module):
    """Convolutions, a norm and two linear layers: three axes."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
        self.c, self.d = nn.Linear(4 * 16, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        return self.d(torch.relu(self.c(x.flatten(1))))


X, Y = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 3
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]
UNITS = Neurons() | Channels()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    return model, analysis_of(model, X)[0]


def transformer(name: str):
    """A tiny model, the logits' key, and batches of unequal lengths."""
    hf = pytest.importorskip("transformers")
    shapes = {"vocab_size": 53, "pad_token_id": 0, "attn_implementation": "eager"}
    torch.manual_seed(1)
    if name == "gpt2":
        config = hf.GPT2Config(
            n_embd=24, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2, **shapes
        )
        model = hf.GPT2LMHeadModel(config)
    elif name == "llama":
        config = hf.LlamaConfig(hidden_size=24, intermediate_size=30, num_hidden_layers=2, head_dim=6,
                                num_attention_heads=12, num_key_value_heads=4, **shapes)  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    else:
        config = hf.BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=30,
                               max_position_embeddings=16, num_labels=3, **shapes)  # fmt: skip
        model = hf.BertForSequenceClassification(config)
    texts = [torch.randint(3, 53, (n,)) for n in (9, 4, 12, 7)]
    return model.eval(), texts


def padded(texts, width, labels=None):
    ids, mask = (
        torch.zeros(len(texts), width, dtype=torch.long),
        torch.zeros(len(texts), width, dtype=torch.long),
    )
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch if labels is None else batch | {"labels": labels}


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=12)
@given(st.floats(0, 0.95), st.integers(0, 3))
@pytest.mark.thorough
def test_masks_are_unions_of_units_and_counts_are_exact(net, name, sparsity, seed):
    model, analysis = net
    recipe = Recipe(score.random, UNITS, ALLOCATIONS[name])
    try:
        masks = prune_(deepcopy(model), sparsity, recipe, example=analysis, seed=seed)
    except UsageError:
        assert sparsity > 0.8  # one unit stays on every axis
        return
    keep = keep_of(analysis, masks)  # raises for zeros that are no whole units
    assert masks == analysis.masks({name: keep.get(name, range(analysis[name].size)) for name in
                                    [units.name for units in analysis.units]})  # fmt: skip
    cells = {s.name: s.cells for s in plan(model, 0.5, recipe, example=analysis).sites}
    whole = sum(cells[units.name] * units.size for units in analysis.units)
    removed = sum((analysis[name].size - len(kept)) * cells[name] for name, kept in keep.items())
    assert abs(removed - whole * sparsity) <= max(cells.values())
    assert all(len(kept) >= 1 for kept in keep.values())


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_more_sparsity_prunes_more_of_the_same(net, name):
    model, analysis = net
    recipe = Recipe(score.l2, UNITS, ALLOCATIONS[name])
    last = None
    for sparsity in (0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.8):
        masks = prune_(deepcopy(model), sparsity, recipe, example=analysis)
        if last is not None:
            assert all(bool((last[key] | ~masks[key]).all()) for key in masks)
        last = masks


def test_the_result_is_the_same_every_time_and_can_be_undone(net):
    model, analysis = net
    first, second = deepcopy(model), deepcopy(model)
    a = prune_(first, 0.4, replace(taylor, pattern=UNITS), data=DATA, keep_originals=True)
    assert a == prune_(second, 0.4, replace(taylor, pattern=UNITS), data=iter(DATA), example=analysis)
    for (key, p), (_, q) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(p, q), key
        if key in a:
            assert not p[~a[key]].any()
    undo_(first, a)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), model.parameters(), strict=True))


def test_what_is_masked_computes_what_is_cut(net):
    model, analysis = net
    pruned = deepcopy(model)
    masks = prune_(pruned, 0.5, Recipe(score.l2, UNITS), example=X)
    small = pruned_program(analysis, keep_of(analysis, masks))
    torch.testing.assert_close(small(X), pruned(X), rtol=1e-4, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())


def test_no_axis_ever_loses_its_last_unit(net):
    model, analysis = net
    masks = prune_(deepcopy(model), recipe=Recipe(score.activation, UNITS, Threshold(1e9)), data=DATA)
    assert {name: len(kept) for name, kept in keep_of(analysis, masks).items()} == {
        units.name: 1 for units in analysis.units
    }
    least = Neurons(minimum=7) | Channels(minimum=3)
    masks = prune_(deepcopy(model), recipe=Recipe(score.activation, least, Threshold(1e9)), data=DATA)
    assert sorted(len(kept) for kept in keep_of(analysis, masks).values()) == [3, 3, 7]
    with pytest.raises(UsageError, match=r"sparsity 1\.0000 cannot be reached in whole units; nearest 0\.8"):
        prune_(deepcopy(model), 1.0, Recipe(score.l2, UNITS), example=analysis)
    with pytest.raises(UsageError, match="no weight is pruned by it"):
        prune_(deepcopy(model), recipe=Recipe(score.l2, UNITS, Threshold(0.0)), example=X)


@pytest.mark.thorough
def test_multiples_and_equal_widths():
    model, texts = transformer("gpt2")
    recipe = Recipe(score.l2, Neurons(multiple=8, homogeneous=True) | Heads(homogeneous=True), globally)
    analysis, _ = analysis_of(model, texts[0][None])
    masks = prune_(model, 0.4, recipe, example=analysis)
    keep = keep_of(analysis, masks)
    counts = {units.name: len(keep.get(units.name, range(units.size))) for units in analysis.units}
    (neurons,) = {count for name, count in counts.items() if name.startswith("feed-forward")}
    (heads,) = {count for name, count in counts.items() if name.startswith("heads")}
    assert neurons % 8 == 0
    assert (neurons, heads) != (96, 4)


USUAL = {("gpt2", "gate"), ("llama", "wanda"), ("bert", "taylor")}
PAIRS = [
    pytest.param(name, recipe, marks=() if (name, recipe) in USUAL else pytest.mark.slow)
    for name in ("gpt2", "llama", "bert")
    for recipe in ("wanda", "flap", "gate", "taylor")
]


@pytest.mark.parametrize(("name", "recipe"), PAIRS)
@pytest.mark.thorough
def test_padding_and_batching_do_not_change_a_mask(name, recipe):
    model, texts = transformer(name)
    labels = torch.tensor([0, 1, 2, 1]) if name == "bert" else None
    chosen = {"wanda": wanda, "taylor": taylor}.get(recipe) or Recipe(getattr(score, recipe))
    chosen = replace(chosen, pattern=Heads() | Neurons(), allocate=Normalised())
    analysis, _ = analysis_of(model, padded(texts, 12))

    def masks(batches) -> Masks:
        return prune_(deepcopy(model), 0.5, chosen, data=batches, example=analysis)

    alone = [
        padded([text], len(text), None if labels is None else labels[i : i + 1]) for i, text in enumerate(texts)
    ]
    whole = masks(alone)
    assert whole == masks([padded(texts, 14, labels)])
    first, second = padded(texts[:3], 12, labels if labels is None else labels[:3]), alone[3]
    assert whole == masks([first, second])
    assert whole.sparsity == pytest.approx(0.5, abs=0.12)


def test_heads_of_gpt2_by_brute_force():
    """The first-order Taylor score of a head from all of its slices of the fused projection."""
    model, texts = transformer("gpt2")
    data = [padded(texts, 12)]
    masks = prune_(deepcopy(model), 0.25, replace(taylor, pattern=Heads()), data=data)
    ids, mask = data[0]["input_ids"], data[0]["attention_mask"].bool()
    labels = ids.masked_fill(~mask, -100)
    labels[:, 1:][~mask[:, :-1]] = -100
    logits = model(**data[0]).logits
    nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    ).backward()
    for block in range(2):
        attention = model.transformer.h[block].attn
        fused = (attention.c_attn.weight * attention.c_attn.weight.grad).abs().detach().view(24, 3, 4, 6)
        output = (attention.c_proj.weight * attention.c_proj.weight.grad).abs().detach().view(4, 6, 24)
        found = (fused.sum((0, 1, 3)) + output.sum((1, 2))) / (24 * 3 * 6 + 6 * 24)
        gone = int(found.argmin())
        kept = masks[f"transformer.h.{block}.attn.c_proj.weight"].view(4, 6, 24)
        assert [bool(head.any()) for head in kept] == [head != gone for head in range(4)]
        bias = masks[f"transformer.h.{block}.attn.c_attn.bias"].view(3, 4, 6)
        assert not bias[:, gone].any()
        assert int((~bias).sum()) == 18


@pytest.mark.thorough
def test_groups_of_queries_go_with_their_keys():
    model, texts = transformer("llama")
    analysis, _ = analysis_of(model, texts[0][None])
    masks = prune_(model, 0.5, Recipe(score.magnitude, KVGroups()), example=analysis)
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn"
        q = masks[f"{stem}.q_proj.weight"].view(4, 18, 24).all((1, 2))
        k = masks[f"{stem}.k_proj.weight"].view(4, 6, 24).all((1, 2))
        assert torch.equal(q, k)
        assert int(q.sum()) == 2


@pytest.mark.thorough
def test_hidden_width_goes_everywhere_and_tied_tensors_once():
    model, texts = transformer("gpt2")
    masks = prune_(model, 0.25, Recipe(score.magnitude, Hidden()), example=texts[0][None])
    assert "lm_head.weight" not in masks
    gone = ~masks["transformer.wte.weight"].any(0)
    assert int(gone.sum()) == 6
    assert not model.lm_head.weight[:, gone].any()
    assert torch.equal(gone, ~masks["transformer.ln_f.weight"])


def test_earlier_masks_stay_and_count(net):
    model, analysis = net
    recipe = Recipe(score.random, UNITS)
    pruned = deepcopy(model)
    first = prune_(pruned, 0.3, recipe, example=analysis, seed=1)
    second = prune_(pruned, 0.6, recipe, example=analysis, masks=first, seed=2)
    assert all(bool((first[key] | ~second[key]).all()) for key in second)
    with pytest.raises(UsageError, match="would be kept again"):
        prune_(pruned, 0.2, recipe, example=analysis, masks=second, seed=3)
    single = Masks({"c.weight": torch.rand(10, 64) > 0.5})
    with pytest.raises(UsageError, match="no whole units"):
        prune_(pruned, 0.6, recipe, example=analysis, masks=single)
    with pytest.raises(UsageError, match=r"the earlier masks prune a\.weight, which is not chosen now"):
        prune_(pruned, 0.6, Recipe(score.random, Neurons()), example=analysis, masks=first)


def test_a_plan_says_of_what(net):
    model, analysis = net
    todo = plan(model, 0.5, replace(magnitude, pattern=UNITS), example=analysis)
    assert str(todo) == (
        "magnitude on Neurons() | Channels(), per_layer: 3 axes with 1,882 weights in 20 units to sparsity 0.5000 of "
        "these weights"
    )
    left = plan(model, 0.5, replace(magnitude, pattern=UNITS), example=analysis, skip="d")
    assert [name for name, _ in left.axes_left_out] == ["feed-forward units of c, d"]
    assert [layer.name for layer, _ in left.left_out] == ["d.weight"]
    one = plan(model, 0.5, replace(magnitude, pattern=UNITS), example=analysis, only=["c", "d"])
    assert [site.name for site in one.sites] == ["feed-forward units of c, d"]
    assert "1 axis with" in str(one)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"recipe": Recipe(score.l2, UNITS)}, r"cuts coupled units, .* pass example=, or data="),
        ({"recipe": Recipe(score.l2, UNITS), "example": 3}, "expected a tensor, a tuple"),
        ({"recipe": replace(wanda_mended, pattern=UNITS), "data": DATA}, "updates single layers"),
        ({"recipe": Recipe(score.l2, UNITS), "data": DATA, "sparsity": None, "nonzero": 100}, "needs single weights"),
        ({"recipe": Recipe(score.slimming)}, "belong to whole channels; choose pattern=Channels"),
        ({"recipe": Recipe(score.taylor, UNITS), "example": X}, "needs calibration data for grad; pass data="),
        ({"recipe": Recipe(lambda weight: weight.sum(0), UNITS), "data": DATA}, "one number for each of the weights"),
        ({"recipe": replace(activation, pattern=UNITS), "data": DATA, "sparsity": 50}, "Did you mean 0.5"),
    ],
)  # fmt: skip
def test_a_refusal_says_why(net, arguments, words):
    model, _ = net
    before = deepcopy(model.state_dict())
    given = {"sparsity": 0.5} | arguments
    with pytest.raises(UsageError, match=words):
        prune_(model, **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_score_about_inputs_is_checked_too(net):
    from secateur.core.site import looking_at

    model, analysis = net

    @looking_at("inputs")
    def wrong(weight, input_norm):
        return input_norm

    with pytest.raises(UsageError, match=r"rows of one number for each input column, shape \(rows, "):
        prune_(model, 0.5, Recipe(wrong, UNITS), data=DATA, example=analysis)

    @looking_at("inputs")
    def ill(weight, input_norm):
        return input_norm[None] / 0

    with pytest.raises(NumericError, match="NaN or Inf among its scores"):
        prune_(model, 0.5, Recipe(ill, UNITS), data=DATA, example=analysis)


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) if x.sum() > 0 else self.b(self.a(x))

    with pytest.raises(UsageError, match=r"Moody: torch\.export cannot trace the forward"):
        prune_(Moody(), 0.5, Recipe(score.l2, Neurons()), example=torch.ones(3, 4))
