"""Fine-tuning: zeros held, the best epoch kept, the schedule of the rate, and everything that is refused."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur import Gradual, cubic, evaluate, magnitude
from secateur.core.masks import Masks
from secateur.errors import NumericError, UsageError
from secateur.measurement import Measurement
from secateur.prune import prune_
from secateur.recover import finetune_
from secateur.recover.training import Training, training

from .problems import batches, classifier, examples


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def zeros_held(model, masks):
    """Bits, not values: no negative zero either."""
    return all(not model.get_parameter(name)[~mask].view(torch.int32).any() for name, mask in masks.items())


@pytest.fixture
def pruned():
    model = classifier()
    return model, prune_(model, 0.5)


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.SGD, momentum=0.95), torch.optim.Adam])
def test_pruned_weights_stay_exactly_zero_and_the_others_learn(pruned, optimizer):
    model, masks = pruned
    with torch.no_grad():
        model[0].weight[0, 0] = 0  # zero by chance
    masks["0.weight"][0, 0] = True
    before = evaluate.accuracy(model, batches(seed=1)).value
    tuned = finetune_(model, batches(), masks, epochs=8, lr=0.02, weight_decay=0.1, optimizer=optimizer)
    assert zeros_held(model, masks)
    assert model[0].weight[0, 0] != 0
    assert evaluate.accuracy(model, batches(seed=1)).value > before + 0.1
    losses = [epoch.measurements[0].value for epoch in tuned.history]
    assert losses[-1] < losses[0] * 0.9
    assert tuned.best == 8
    assert tuned.steps == 80


def test_without_masks_zeros_are_weights_like_any_other(pruned):
    model, masks = pruned
    finetune_(model, batches(), epochs=1, lr=0.01)
    assert not zeros_held(model, masks)


def test_the_best_epoch_by_validation_is_kept_and_not_the_last(pruned):
    """The metric itself says that epoch 2 of 5 was best; the weights must be those of two epochs."""
    model, masks = pruned
    said = iter([0.3, 0.5, 0.9, 0.4, 0.9, 0.1])
    seen = []

    def metric(model, data):
        seen.append(values(model))
        return Measurement("accuracy", next(said), "1")

    tuned = finetune_(model, batches(), masks, epochs=5, lr=0.01, validation=batches(seed=1), metric=metric)
    assert tuned.best == 2  # not the equal one that came later
    assert same(values(model), seen[2])
    assert not same(seen[2], seen[5])
    assert [epoch.number for epoch in tuned.history] == [0, 1, 2, 3, 4, 5]
    assert [m.name for m in tuned.history[3].measurements] == ["training_loss", "accuracy"]


def test_training_that_only_hurts_is_taken_back(pruned):
    model, masks = pruned
    masks.apply_(model)
    before = values(model)
    said = iter([1.0, 2.0, 3.0])
    tuned = finetune_(
        model, batches(), masks, epochs=2, lr=0.01, validation=[1], metric=lambda *_: next(said), better="lower"
    )
    assert tuned.best == 0
    assert same(values(model), before)
    assert str(tuned).startswith("epoch 0 of 2 kept: <lambda> 1")


def test_early_stopping(pruned):
    model, masks = pruned
    said = iter([5.0, 4.0, 4.5, 4.2, 1.0])
    judged = {"validation": [1], "metric": lambda *_: next(said), "better": "lower"}
    tuned = finetune_(model, batches(), masks, epochs=9, patience=1, lr=0.01, **judged)
    assert [epoch.number for epoch in tuned.history] == [0, 1, 2, 3]
    assert (tuned.best, tuned.stopped) == (1, "patience is over")


def test_the_direction_of_a_metric_goes_by_its_name(pruned):
    model, masks = pruned
    tuned = finetune_(
        model, batches(), masks, epochs=2, lr=0.02, validation=batches(seed=1), metric=evaluate.accuracy
    )
    best = max(tuned.history, key=lambda epoch: (epoch.measurements[-1].value, -epoch.number))
    assert tuned.best == best.number
    with pytest.raises(UsageError, match='is more sharpness better, or less\\? Say better="higher"'):
        finetune_(model, batches(), masks, validation=[1], metric=lambda *_: Measurement("sharpness", 1.0, "1"))


def test_validation_loss_weighs_batches_by_their_labels():
    model = nn.Linear(8, 3)
    x, y = examples(21, seed=5)
    tuned = finetune_(model, batches(), epochs=1, lr=1e-9, validation=[(x[:16], y[:16]), (x[16:], y[16:])])
    model.eval()
    expected = F.cross_entropy(model(x), y).item()
    assert tuned.history[-1].measurements[-1].value == pytest.approx(expected, rel=1e-5)


def test_modes_gradients_and_generators_are_as_before(pruned):
    model, masks = pruned
    model.eval()
    model[0].train()
    state = torch.get_rng_state()
    finetune_(model, batches(), masks, epochs=1, lr=0.01, validation=batches(seed=1))
    assert [module.training for module in model.modules()] == [False, True, *[False] * 4]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not model[0].weight._backward_hooks
    with torch.no_grad():
        model[0].weight.fill_(1)  # nothing holds it any more
    assert model[0].weight.min() == 1


def test_the_seed_decides_everything():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = classifier(dropout=0.5)
        torch.rand(len(found))  # where the global generator stands does not matter
        finetune_(model, batches(), epochs=2, lr=0.01, seed=seed)
        found.append(values(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_accumulated_batches_make_the_step_of_one_large_batch():
    x, y = examples(12)
    models = [nn.Linear(8, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    how = {
        "epochs": 1,
        "lr": 0.1,
        "clip": None,
        "warm_up": 0,
        "decay": "constant",
        "optimizer": torch.optim.SGD,
    }
    small = DataLoader(TensorDataset(x, y), batch_size=4)
    large = DataLoader(TensorDataset(x, y), batch_size=12)
    tuned = [
        finetune_(m, d, accumulate=a, **how) for m, d, a in zip(models, (small, large), (3, 1), strict=True)
    ]
    assert tuned[0].steps == tuned[1].steps == 1
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-6)


def test_a_last_group_that_is_not_full_still_counts():
    model = nn.Linear(8, 3)
    assert finetune_(model, batches(80, 16), accumulate=2, epochs=2, lr=0.01).steps == 6


def test_clipping_looks_at_kept_weights_only():
    """The gradient of a pruned weight is large; the kept one's must not be scaled down for it."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0]]))
    masks = Masks({"weight": torch.tensor([[False, True]])})
    data = [(torch.tensor([[1000.0, 0.5]]), torch.tensor([0.0]))]
    how = {"optimizer": torch.optim.SGD, "warm_up": 0, "decay": "constant", "clip": 1.0, "epochs": 1, "lr": 0.1}
    finetune_(model, data, masks, weight_decay=0, **how)
    assert model.weight[0, 1].item() == pytest.approx(
        1 - 0.1 * 0.5
    )  # d/dw (0.5 w)^2 at 1 is 0.5, below the limit


def test_autocast_computes_in_half_precision_and_keeps_the_weights():
    seen = []
    model = classifier()
    model[4].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    finetune_(model, batches(), epochs=1, lr=0.01, autocast="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert model[0].weight.dtype == torch.float32


def test_frozen_parameters_stay(pruned):
    model, masks = pruned
    masks.apply_(model)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    finetune_(model, batches(), masks, epochs=1, lr=0.01)
    assert torch.equal(model[0].weight, before)


def test_progress_is_told():
    told = []
    finetune_(classifier(), batches(), epochs=2, lr=0.01, tell=lambda *said: told.append(said))
    assert told == [("fine-tuning", done, 20) for done in range(1, 21)]


def test_the_rate_warms_up_and_falls():
    how = Training(lr=1.0, warm_up=0.2)
    rates = [how.at(step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert Training(lr=1.0, warm_up=0, decay="linear").at(75, 100) == pytest.approx(0.25)
    assert {Training(lr=1.0, warm_up=0, decay="constant").at(step, 9) for step in range(9)} == {1}


def test_the_default_rate_is_a_tenth_of_the_original_and_says_so_where_it_is_guessed():
    assert Training(original_lr=0.05).rate == pytest.approx(0.005)
    assert Training(lr=0.3, original_lr=0.05).rate == 0.3
    assert Training(lr=0.3).notes == Training(original_lr=0.3).notes == ()
    model = classifier()
    tuned = finetune_(model, batches(), epochs=1)
    assert tuned.lr == pytest.approx(1e-4)
    assert tuned.notes == (
        "The original learning rate is not known; 0.0001, a tenth of AdamW's default, was used. Give original_lr= "
        "or lr=.",
        "No validation data were given, so the last epoch was kept.",
    )


def test_norms_and_biases_do_not_decay():
    groups = []

    def optimizer(given, lr):
        groups.extend(given)
        return torch.optim.AdamW(given, lr=lr)

    finetune_(classifier(), batches(), epochs=1, lr=0.01, weight_decay=0.3, optimizer=optimizer)
    assert {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]} == {
        (2, 0.3),
        (1, 0.0),
    }


class Sick(nn.Linear):
    """Goes wrong at one call of forward."""

    def __init__(self, at, how):
        super().__init__(8, 3)
        self.calls, self.at, self.how = 0, at, how

    def forward(self, x):
        self.calls += self.training
        out = super().forward(x)
        if self.training and self.calls == self.at:
            return {
                "loss": out * math.nan,
                "gradient": out + 0 * (self.weight.sum() - self.weight.sum()).sqrt(),
            }[self.how]
        return out


@pytest.mark.parametrize(
    ("how", "said"), [("loss", "the loss is nan"), ("gradient", "the norm of the gradients is nan")]
)
def test_nan_stops_and_leaves_the_last_good_state(how, said):
    model, good = Sick(25, how), Sick(99, how)
    good.load_state_dict(model.state_dict())
    finetune_(good, batches(), epochs=2, lr=0.01, decay="constant", warm_up=0)
    with pytest.raises(NumericError) as told:
        finetune_(model, batches(), epochs=5, lr=0.01, decay="constant", warm_up=0)
    assert str(told.value).startswith(
        f"fine-tuning: {said} at step 25, epoch 3, batch 5. The model has its last good state"
    )
    assert "that of epoch 2; lower lr (it was 0.01)" in str(told.value)
    assert same(values(model), values(good))
    assert all(p.grad is None for p in model.parameters())


def test_nan_at_the_first_step_leaves_the_model_as_it_was():
    model = Sick(1, "loss")
    before = values(model)
    with pytest.raises(NumericError, match=r"at step 1, epoch 1, batch 1\. .* that of before training"):
        finetune_(model, batches(), epochs=1, lr=0.01)
    assert same(values(model), before)


def test_validation_that_breaks_is_told_with_its_step():
    model = classifier()
    nan = [(torch.full((4, 8), math.nan), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(
        NumericError, match=r"validation failed \(the loss on the validation data is nan\) at step 1"
    ):
        finetune_(model, batches(), epochs=1, lr=0.01, validation=nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"lr": 0}, "lr is 0; expected above 0"),
        ({"lr": math.nan}, "lr is nan; expected above 0"),
        ({"original_lr": -1}, "original_lr is -1; expected above 0"),
        ({"warm_up": 1}, r"warm_up is 1; expected in \[0, 1\)"),
        ({"decay": "cosinus"}, "decay is 'cosinus'; expected one of cosine, linear, constant"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected at least 0"),
        ({"clip": 0}, "clip is 0; expected above 0, or None"),
        ({"accumulate": 0}, "accumulate is 0; expected at least 1"),
        ({"autocast": "float16"}, "autocast is 'float16'; expected bfloat16 or None"),
        ({"patience": -1}, "patience is -1; expected at least 0, or None"),
        ({"every": 0}, "every is 0; expected at least 1, or None"),
        ({"epoch": 3}, "epoch= is no option of training; nearest: epochs"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        training(**options)


def test_what_is_refused(pruned):
    model, masks = pruned
    with pytest.raises(UsageError, match="metric= needs data to measure on; give validation="):
        finetune_(model, batches(), metric=evaluate.accuracy)
    with pytest.raises(UsageError, match="validation can be walked through only once"):
        finetune_(model, batches(), validation=iter(batches()))
    with pytest.raises(UsageError, match="better is 'more'; expected higher or lower"):
        finetune_(model, batches(), validation=batches(), better="more")
    with pytest.raises(UsageError, match="these masks belong to another model"):
        finetune_(nn.Linear(8, 3), batches(), masks)
    with pytest.raises(UsageError, match="no parameter needs a gradient"):
        finetune_(classifier().requires_grad_(False), batches())
    with pytest.raises(
        UsageError, match=r"the loss is a tensor of shape \(16,\); expected a tensor with one number"
    ):
        finetune_(model, batches(), loss=partial(F.cross_entropy, reduction="none"))
    with pytest.raises(UsageError, match="validation holds nothing to judge by"):
        finetune_(model, batches(), validation=[])


def test_data_that_give_fewer_batches_than_they_say():
    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter(batches(32))

    with pytest.raises(UsageError, match="data say that they have 3 batches and gave fewer"):
        finetune_(classifier(), Loader(), epochs=1)


def test_a_language_model_learns_without_labels():
    from types import SimpleNamespace

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 11)

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=self.table(input_ids))

    ids = (torch.arange(12)[None] + torch.arange(8)[:, None]) % 11
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    model = Bigram()
    masks = Masks({"table.weight": torch.rand(11, 11) > 0.3})
    tuned = finetune_(model, data, masks, epochs=60, lr=0.3, validation=data)
    assert tuned.history[-1].measurements[-1].value < 0.5 * tuned.history[0].measurements[-1].value
    assert zeros_held(model, masks)


def test_a_copy_is_not_needed(pruned):
    """Nothing of the model object is replaced: optimizers and references from outside stay valid."""
    model, masks = pruned
    before = {name: id(p) for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    finetune_(model, batches(), masks, epochs=1, lr=0.01)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not same(values(model), values(twin))


def gradually(model, optimizer, steps):
    return Gradual(model, magnitude, cubic(0.0, 0.75), 1, steps // 2, 1, optimizer=optimizer)


def test_a_pruner_prunes_while_the_model_learns():
    model, data = classifier(), batches()
    tuned = finetune_(model, data, pruner=gradually, epochs=4, lr=1e-2, validation=data)
    assert tuned.masks.sparsity == pytest.approx(0.75, abs=0.01)
    assert tuned.best >= 2  # no epoch before the last pruning is kept, however good
    for name, mask in tuned.masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_a_schedule_that_ends_after_training():
    model, data = classifier(), batches()
    before = copy.deepcopy(model.state_dict())

    def late(model, optimizer, steps):
        return Gradual(model, magnitude, cubic(0.0, 0.75), 0, steps + 1, 1, optimizer=optimizer)

    with pytest.raises(
        UsageError, match=r"never reaches its end: it ends at step \d+, and training has \d+ steps"
    ):
        finetune_(model, data, pruner=late, epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UsageError, match="give the masks to the pruner instead"):
        finetune_(model, data, prune_(copy.deepcopy(model), 0.5), pruner=late)
