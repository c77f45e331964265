"""SparseGPT against its published equations: one column at a time, the inverse of what is left taken anew.

Frantar and Alistarh 2023, algorithm 1 and equation 3 (optimal brain surgery): pruning `w_j` while the columns
before it are frozen costs `w_j^2 / (2 [H_j^-1]_11)`, `H_j` the moment of columns j and after, and changes the columns
after it by `-w_j / [H_j^-1]_11 * [H_j^-1]_1,:`. In every block of columns the cheapest are chosen when the
sweep reaches the block; of N:M, when it reaches the group.

The authors' code sorts the scores of a block and prunes whatever is `<=` the element at index `int(n S)`: that is one
weight more than asked in every block, and all that tie with it. Here as in the package counts are exact.
"""

import pytest
import torch

from secateur import NM, Recipe, per_row
from secateur.mend import Choice
from secateur.recover import SparseGPT
from secateur.score import magnitude


def correlated(out: int, columns: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the second moment of inputs that share a few directions and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64) / columns**0.5
    sizes = torch.randn(columns, generator=draw, dtype=torch.float64).exp()
    inputs = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) @ mix * sizes
    return torch.randn(out, columns, generator=draw, dtype=torch.float64), inputs.t() @ inputs


def oracle(weight, moment, *, block, zeros=None, rows=False, n=None, m=None):
    """Weights and mask by explicit elimination; `zeros` of every block, or of every row of it, or n of m kept."""
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    weight, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for start in range(0, columns, m or block):
        here = slice(start, min(start + (m or block), columns))
        price = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(here.start, here.stop)])
        score = weight[:, here].square() / price
        if m or rows:
            order = score.sort(dim=1, stable=True).indices[:, : m - n if m else zeros]
            keep[:, here] = keep[:, here].scatter(1, order, False)
        else:
            flat = torch.ones(score.numel(), dtype=torch.bool)
            flat[score.flatten().sort(stable=True).indices[:zeros]] = False
            keep[:, here] = flat.reshape(score.shape)
        for j in range(here.start, here.stop):
            inverse = torch.linalg.inv(damped[j:, j:])
            error = torch.where(keep[:, j], 0, weight[:, j]) / inverse[0, 0]
            weight[:, j:] -= error[:, None] * inverse[0]
    return weight * keep, keep


def choice(shape: tuple[int, int], counts: torch.Tensor, **parts) -> Choice:
    return Choice(Recipe(magnitude, **parts), counts, shape, lambda: torch.ones(shape))


@pytest.mark.parametrize("seed", range(3))
def test_unstructured_blocks_of_128(seed):
    weight, moment = correlated(24, 256, 1000, seed)
    expected, keep = oracle(weight, moment, block=128, zeros=24 * 128 * 6 // 10)
    choose = choice((24, 256), torch.tensor([24 * 256 - 2 * (24 * 128 * 6 // 10)]))
    found = SparseGPT(normalise=False)(weight, choose, moment)
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    assert [int((~found.mask[:, :128]).sum()), int((~found.mask[:, 128:]).sum())] == [24 * 128 * 6 // 10] * 2


@pytest.mark.parametrize("block", [16, 32, 96])
def test_rows_that_compete_for_themselves(block):
    """Nothing but another allocator: each row gives up equally many weights in every block of columns."""
    weight, moment = correlated(12, 96, 500, block)
    expected, keep = oracle(weight, moment, block=block, zeros=block * 5 // 8, rows=True)
    choose = choice((12, 96), torch.full((12,), 96 - 96 * 5 // 8), allocate=per_row)
    found = SparseGPT(block, normalise=False)(weight, choose, moment)
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    among_all = SparseGPT(block, normalise=False)(weight, choice((12, 96), choose.counts.sum()[None]), moment)
    assert len(set(among_all.mask.sum(1).tolist())) > 1  # which is another choice than the layer's


def test_the_whole_layer_at_once_is_one_block():
    weight, moment = correlated(12, 96, 500, 5)
    expected, keep = oracle(weight, moment, block=96, zeros=700)
    found = SparseGPT(96, normalise=False)(weight, choice((12, 96), torch.tensor([12 * 96 - 700])), moment)
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)


def test_the_published_threshold_takes_one_more_of_every_block():
    """`<=` the element at index `int(n S)` of the sorted scores; with that many zeros asked for, ours are theirs."""
    weight, moment = correlated(10, 64, 400, 9)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    theirs, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in (0, 32):
        here = slice(start, start + 32)
        score = theirs[:, here].square() / upper.diagonal()[here].square()
        keep[:, here] = score > score.flatten().sort().values[int(320 * 0.5)]
        for j in range(start, start + 32):
            error = torch.where(keep[:, j], 0, theirs[:, j]) / upper[j, j]
            theirs[:, j:] -= error[:, None] * upper[j, j:]
    assert (~keep).sum() == 2 * (160 + 1)
    found = SparseGPT(32, normalise=False)(weight, choice((10, 64), torch.tensor([640 - 2 * 161])), moment)
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight, theirs * keep, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_n_of_m(n, m):
    weight, moment = correlated(16, 96, 500, n)
    expected, keep = oracle(weight, moment, block=m, n=n, m=m)
    found = SparseGPT(normalise=False)(weight, choice((16, 96), torch.tensor([n]), pattern=NM(n, m)), moment)
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)


def test_rows_of_a_narrow_last_block():
    weight, moment = correlated(8, 40, 300, 7)
    found = SparseGPT(block=32, normalise=False)(
        weight, choice((8, 40), torch.full((8,), 20), allocate=per_row), moment
    )
    assert (~found.mask).sum(1).tolist() == [20] * 8
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    for row in range(8):  # the last column can be mended by nothing, the first by all
        swept = torch.zeros(40, dtype=torch.float64)
        swept += weight[row]
        for j in range(40):
            inverse = torch.linalg.inv(damped[j:, j:])
            if not found.mask[row, j]:
                swept[j:] = swept[j:] - swept[j] / inverse[0, 0] * inverse[0]
        torch.testing.assert_close(found.weight[row], swept * found.mask[row], rtol=1e-8, atol=1e-9)


def test_float32_agrees_with_float64():
    weight, moment = correlated(32, 256, 2000, 1)
    keep = torch.tensor([32 * 128])
    exact = SparseGPT()(weight, choice((32, 256), keep), moment)
    single = SparseGPT()(weight.float(), choice((32, 256), keep), moment.float())
    assert (exact.mask != single.mask).float().mean() < 1e-3
    agree = (exact.mask == single.mask).all(1)
    assert agree.sum() > 16
    torch.testing.assert_close(single.weight[agree].double(), exact.weight[agree], rtol=1e-2, atol=1e-3)


def test_scaling_the_inputs_changes_nothing_when_normalised():
    weight, moment = correlated(16, 64, 500, 3)
    sizes = torch.linspace(0.1, 10, 64, dtype=torch.float64)
    one = SparseGPT()(weight, choice((16, 64), torch.tensor([512])), moment)
    scaled = SparseGPT()(weight / sizes, choice((16, 64), torch.tensor([512])), moment * sizes * sizes[:, None])
    assert torch.equal(one.mask, scaled.mask)
    torch.testing.assert_close(scaled.weight * sizes, one.weight)
