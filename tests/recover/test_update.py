"""Updates: exact zeros and counts under every pattern, and who beats whom on the layer's loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import NM, Blocks, Columns, Rows, per_row
from secateur.recover import ADMM, ALPS, LeastSquares, SparseGPT, Swaps, loss

from .problems import choice, correlated

UPDATES = {
    "least squares": LeastSquares(),
    "sparsegpt": SparseGPT(),
    "published sparsegpt": SparseGPT(normalise=False),
    "small blocks": SparseGPT(block=5),
    "admm": ADMM(),
    "alps": ALPS(),
    "swaps": Swaps(),
}
COARSE = {name: update for name, update in UPDATES.items() if name != "swaps"}
every = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
coarse = pytest.mark.parametrize("update", COARSE.values(), ids=COARSE)


def single(out: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return correlated(out, columns, 3 * columns, seed, torch.float32)


@every
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 99), st.data())
@settings(max_examples=20)
def test_counts_are_exact_and_zeros_are_zero(update, out, columns, seed, data):
    weight, moment = single(out, columns, seed)
    keep = data.draw(st.integers(0, out * columns))
    found = update(weight, choice(weight, moment, torch.tensor([keep])), moment)
    assert int(found.mask.sum()) == keep
    assert not found.weight[~found.mask].any()
    assert found.weight.isfinite().all()
    assert found.damping == 0.01
    rows = torch.tensor([data.draw(st.integers(0, columns)) for _ in range(out)])
    found = update(weight, choice(weight, moment, rows, allocate=per_row), moment)
    assert found.mask.sum(1).tolist() == rows.tolist()


@every
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (5, 5)])
def test_every_group_keeps_n_of_m(update, n, m):
    weight, moment = single(6, 12 * m, n)
    found = update(weight, choice(weight, moment, torch.tensor([n]), pattern=NM(n, m)), moment)
    assert (found.mask.reshape(-1, m).sum(1) == n).all()
    assert not found.weight[~found.mask].any()


@coarse
def test_rows_columns_and_blocks_stay_whole(update):
    weight, moment = single(8, 24)
    rows = update(weight, choice(weight, moment, torch.tensor([3]), pattern=Rows()), moment)
    assert sorted(rows.mask.sum(1).tolist()) == [0] * 5 + [24] * 3
    columns = update(weight, choice(weight, moment, torch.tensor([7]), pattern=Columns()), moment)
    assert sorted(columns.mask.sum(0).tolist()) == [0] * 17 + [8] * 7
    blocks = update(weight, choice(weight, moment, torch.tensor([5]), pattern=Blocks(4, 3)), moment)
    tiles = blocks.mask.reshape(2, 4, 8, 3).sum((1, 3))
    assert sorted(tiles.flatten().tolist()) == [0] * 11 + [12] * 5


@every
def test_kept_whole_and_cut_whole(update):
    weight, moment = single(4, 10)
    whole = update(weight, choice(weight, moment, torch.tensor([40])), moment)
    torch.testing.assert_close(whole.weight, weight)
    assert not update(weight, choice(weight, moment, torch.tensor([0])), moment).weight.any()


@every
def test_dead_columns_go_first_and_otherwise_stay(update):
    weight, moment = single(6, 12)
    weight[:, [2, 9]] = 100
    moment[[2, 9]], moment[:, [2, 9]] = 0, 0
    found = update(weight, choice(weight, moment, torch.full((6,), 6), allocate=per_row), moment)
    if getattr(update, "block", 12) >= 12:  # SparseGPT takes the same share of every block
        assert not found.mask[:, [2, 9]].any()
    found = update(weight, choice(weight, moment, torch.full((6,), 11), allocate=per_row), moment)
    torch.testing.assert_close(found.weight[:, [2, 9]], 100.0 * found.mask[:, [2, 9]])


@every
def test_arguments_are_left_alone(update):
    weight, moment = single(6, 12)
    before = weight.clone(), moment.clone()
    update(weight, choice(weight, moment, torch.tensor([36])), moment)
    assert torch.equal(weight, before[0])
    assert torch.equal(moment, before[1])


def test_least_squares_mends_the_mask_of_any_score():
    weight, moment = single(16, 32)
    for score_moment in (None, moment):
        choose = choice(weight, score_moment, torch.tensor([256]))
        found = LeastSquares()(weight, choose, moment)
        assert torch.equal(found.mask, choose())
        assert loss(found.weight, weight, moment) < 0.7 * loss(weight * found.mask, weight, moment)


@pytest.mark.parametrize(
    "counts", [torch.tensor([48 * 64 * 3 // 10]), torch.full((48,), 19)], ids=["per layer", "per row"]
)
@pytest.mark.thorough
def test_who_beats_whom(counts):
    """Over ten problems at 70 %: searching the support beats one sweep, which beats the mask as it is."""
    losses: dict[str, list[float]] = {}
    for seed in range(10):
        weight, moment = correlated(48, 64, 400, seed, torch.float32)
        choose = choice(weight, moment, counts)
        losses.setdefault("wanda", []).append(loss(weight * choose(), weight, moment))
        for name, update in UPDATES.items():
            losses.setdefault(name, []).append(loss(update(weight, choose, moment).weight, weight, moment))
    table = {name: torch.tensor(values) for name, values in losses.items()}
    for better in ("admm", "alps"):
        for worse in ("wanda", "sparsegpt", "published sparsegpt", "least squares"):
            assert (table[better] < table[worse]).all(), (better, worse)
    assert (table["least squares"] < table["wanda"]).all()
    assert (table["sparsegpt"] < table["wanda"]).all()
    assert (table["swaps"] < table["least squares"]).all()
    assert (table["alps"] / table["admm"]).log().mean() < 0


def test_2_of_4_too():
    for seed in range(10):
        weight, moment = correlated(24, 64, 400, seed, torch.float32)
        choose = choice(weight, moment, torch.tensor([2]), pattern=NM(2, 4))
        found = {
            name: loss(update(weight, choose, moment).weight, weight, moment)
            for name, update in UPDATES.items()
        }
        assert max(found["admm"], found["alps"]) < min(found["sparsegpt"], found["least squares"])


def test_alps_stops_by_itself():
    """Ten times the iterations find the same mask."""
    weight, moment = single(16, 32)
    choose = choice(weight, moment, torch.tensor([150]))
    assert torch.equal(ALPS()(weight, choose, moment).mask, ALPS(iterations=3000)(weight, choose, moment).mask)
