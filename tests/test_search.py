"""Allocations judged on held-out data: the divergence by hand, ties, mending taken back, slopes, evolution."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import search
from secateur.allocate import per_layer
from secateur.allocate.shares import Shares, Slope
from secateur.errors import NumericError, UsageError
from secateur.recipes import magnitude
from secateur.search import Judge, Trial, evolve, finished, try_allocations, try_slopes

from .language import Tiny, ids


class Bigram(nn.Module):
    """Logits of the next token are a row of a table."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, attention_mask=None):
        return self.table[input_ids]


def deep() -> nn.Sequential:
    """Three blocks of one square layer each."""
    return nn.Sequential(*[nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU()) for _ in range(3)])


def shares(model: nn.Module) -> list[float]:
    return [float((layer[0].weight == 0).float().mean()) for layer in model]


def bits(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The judge


def test_the_divergence_by_hand():
    """Two tokens; p = (3/4, 1/4) against q = (1/2, 1/2) after token 0, equal after token 1."""
    dense = Bigram(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log())
    other = Bigram(torch.zeros(2, 2))
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert Judge(dense, [torch.tensor([[0, 0]])])(other) == pytest.approx(float(expected), rel=1e-6)
    assert Judge(dense, [torch.tensor([[0, 1, 1, 1]])])(other) == pytest.approx(float(expected) / 4, rel=1e-6)
    assert Judge(dense, [torch.tensor([[0, 1]])])(dense) == 0.0


def test_pieces_and_padding_do_not_matter(monkeypatch):
    dense, other = Tiny().eval(), Tiny().eval()
    rows, mask = ids(6, 8), torch.ones(6, 8, dtype=torch.long)
    mask[3:, 5:] = 0
    together = [{"input_ids": rows, "attention_mask": mask}]
    filled = [{"input_ids": torch.where(mask.bool(), rows, 7), "attention_mask": mask}]
    apart = [{"input_ids": rows[:3]}, {"input_ids": rows[3:, :5]}]
    found = Judge(dense, together)(other)
    assert found > 0
    assert Judge(dense, filled)(other) == pytest.approx(found, rel=1e-5)
    assert Judge(dense, apart)(other) == pytest.approx(found, rel=1e-5)
    monkeypatch.setattr(search, "CACHED", 0)
    judge = Judge(dense, together)
    assert [judge(other), judge(other)] == [found, found]
    assert not judge._kept


def test_the_judge_leaves_mode_and_random_state():
    dense, other = Tiny(), Tiny()
    state = torch.get_rng_state()
    Judge(dense, [ids(2)])(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert dense.training
    assert other.training


def test_what_the_judge_refuses():
    with pytest.raises(UsageError, match="there is no held-out batch to judge by; give more data"):
        Judge(Tiny(), [])
    broken = Bigram(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))
    with pytest.raises(NumericError, match="the divergence from the dense model is NaN or infinite"):
        Judge(Bigram(torch.zeros(2, 2)), [torch.tensor([[0, 1]])])(broken)


# Allocations


def test_equal_shares_win_a_tie_and_only_the_best_keeps_its_model():
    model = deep()
    before = bits(model)
    found = try_allocations(model, 0.5, magnitude, [], lambda _: 1.0, [Slope(0.2), Slope(-0.2)])
    assert [trial.name for trial in found] == [
        "per_layer",
        "Slope(rise=0.2, rows=False)",
        "Slope(rise=-0.2, rows=False)",
    ]
    assert [trial.model is None for trial in found] == [False, True, True]
    assert shares(found[0].model) == [0.5, 0.5, 0.5]
    assert same(model, before)


def test_the_judge_decides():
    found = try_allocations(deep(), 0.5, magnitude, [], lambda m: shares(m)[0], [Slope(0.2), Slope(-0.2)])
    assert found[0].recipe == replace(magnitude, allocate=Slope(0.2))
    assert [trial.divergence for trial in found] == sorted(trial.divergence for trial in found)
    assert found[0].masks.sparsity == 0.5
    for mask, layer in zip(found[0].masks.values(), found[0].model, strict=True):
        assert torch.equal(mask, layer[0].weight != 0)


def test_mending_is_judged_and_taken_back_where_it_hurts():
    def worse(model, masks):
        model[0][0].weight.data.zero_()

    def better(model, masks):
        model[2][0].weight.data.zero_()

    def judge(model):
        return 2.0 + shares(model)[0] - shares(model)[2]

    kept = try_allocations(deep(), 0.5, magnitude, [], judge, [], mend=worse)[0]
    assert (kept.mended, kept.divergence, kept.bare) == (False, 2.0, 2.0)
    assert shares(kept.model) == [0.5, 0.5, 0.5]
    taken = try_allocations(deep(), 0.5, magnitude, [], judge, [], mend=better)[0]
    assert (taken.mended, taken.divergence, taken.bare) == (True, 1.5, 2.0)


def test_what_is_hopeless_is_not_mended():
    mended = []

    def judge(model):
        return 1.0 + 10 * abs(shares(model)[0] - 0.5)

    rises = [Slope(0.08), Slope(0.2)]  # first block at 0.46 and 0.4: 1.4 and 2 times the divergence
    try_allocations(
        deep(), 0.5, magnitude, [], judge, rises, mend=lambda model, _: mended.append(shares(model)[0])
    )
    assert [round(each, 2) for each in mended] == [0.5, 0.46]


def test_a_trial_that_let_go_of_its_model_cannot_be_finished():
    with pytest.raises(UsageError, match="x: this trial did not keep its model; only the best one does"):
        finished(Trial("x", 1.0, magnitude), lambda model, masks: None, lambda model: 0.0)


# Slopes


@pytest.mark.parametrize(
    ("judge", "most", "rises"),
    [
        (lambda s: s[0], 4, [0.1, -0.1, 0.2, 0.4]),  # the denser the first block, the better
        (lambda s: s[2], 4, [0.1, -0.1, -0.2, -0.4]),
        (lambda s: abs(s[0] - 0.45), 4, [0.1, -0.1, 0.2]),  # 0.2 is too much: 0.1 stays
        (lambda s: abs(s[0] - 0.5), 4, [0.1, -0.1]),  # equal shares stay
        (lambda s: s[0], 2, [0.1, -0.1]),
        (lambda s: s[0], 1, [0.1]),
    ],
)
def test_the_better_side_is_followed_as_long_as_it_gets_better(judge, most, rises):
    found = try_slopes(deep(), 0.5, magnitude, [], lambda model: judge(shares(model)), most=most)
    tried = {trial.recipe.allocate.rise for trial in found if isinstance(trial.recipe.allocate, Slope)}
    assert tried == set(rises)
    assert found[0].divergence == min(trial.divergence for trial in found)
    assert len(found) == len(rises) + 1


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.98, 1.0])
def test_no_slope_where_there_is_no_room(sparsity):
    found = try_slopes(deep(), sparsity, magnitude, [], lambda model: shares(model)[0])
    assert [trial.recipe.allocate for trial in found] == [per_layer]


# Evolution


def test_evolution_makes_the_layer_denser_that_the_judge_cares_for():
    model = deep()
    before = bits(model)
    judge = lambda m: shares(m)[1]  # noqa: E731
    found = evolve(model, 0.5, magnitude, [], judge, seed=1)
    assert found.of("1.0.weight") == pytest.approx(0.4)
    assert sum(s for _, s in found.sparsities) >= 1.5 - 1e-9  # never more weights kept than asked
    assert same(model, before)
    assert evolve(model, 0.5, magnitude, [], judge, seed=1) == found


def test_evolution_that_finds_nothing_better_gives_equal_shares():
    found = evolve(deep(), 0.5, magnitude, [], lambda model: 1.0)
    assert found == Shares({f"{i}.0.weight": 0.5 for i in range(3)})
