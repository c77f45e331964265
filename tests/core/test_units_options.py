"""Decoupling by gather, fixed tensors, and analysis block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.core.axes.blocks import analyse_blocks
from secateur.core.units import Analysis, analyse, masked_program, pruned_program
from secateur.errors import UsageError


class Attention(nn.Module):
    """Four heads of three, with a bias per head that somebody else made."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 4, 3).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.mT + bias).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """Two layers that share one table of biases, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(5)
        bias = self.table((steps[:, None] - steps).abs()).permute(2, 0, 1)
        for layer in self.layers:
            x = x + layer(x, bias)
        return self.head(x)


@pytest.fixture
def biased() -> tuple[nn.Module, Tensor]:
    return Biased().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)


def test_a_shared_table_ties_the_heads_of_all_layers(biased: tuple[nn.Module, Tensor]) -> None:
    model, x = biased
    heads = [units for units in analyse(model, (x,)).units if units.kind == "head"]
    assert [units.size for units in heads] == [4]
    assert {"table.weight", "layers.1.query.weight"} <= {member.name for member in heads[0].members}
    assert heads[0].gathers == ()


def test_decoupled_layers_keep_their_own_heads(biased: tuple[nn.Module, Tensor]) -> None:
    model, x = biased
    analysis = analyse(model, (x,), decouple=True)
    heads = [units for units in analysis.units if units.kind == "head"]
    assert [units.name for units in heads] == ["heads of layers.0", "heads of layers.1"]
    assert heads[1].gathers == ("permute read at layers.1, 100 numbers",)
    assert any("a table that several modules share" in str(frozen.reason) for frozen in analysis.frozen)
    keep = {heads[0].name: [0, 3], heads[1].name: [2]}
    pruned, masked = pruned_program(analysis, keep), masked_program(analysis, keep)
    assert pruned.get_parameter("table.weight").shape == (9, 4)
    assert pruned.get_parameter("layers.1.query.weight").shape == (3, 8)
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-12, atol=1e-12)


def test_fixed_tensors_keep_their_shapes(biased: tuple[nn.Module, Tensor]) -> None:
    model, x = biased
    analysis = analyse(model, (x,), fixed=["layers.0.query.weight"])
    assert not any(
        member.name == "layers.0.query.weight" for units in analysis.units for member in units.members
    )
    assert any(str(frozen.reason).startswith("fixed by the caller") for frozen in analysis.frozen)


class Branching(nn.Module):
    """A forward that looks at values, around two blocks that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 7))
        self.twice = nn.Sequential(nn.Linear(7, 10), nn.ReLU(), nn.Linear(10, 7))
        self.tied = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 7))
        self.last = nn.Linear(7, 9)
        self.last.weight = self.tied[0].weight
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if x.sum() > 1e9:
            return x
        return self.last(self.tied(self.twice(self.twice(x))))


def test_blocks_are_analysed_where_the_whole_cannot_be() -> None:
    model, x = Branching(), torch.randn(2, 5, 7)
    with pytest.raises(UsageError, match="otherwise analyse its submodules with analyse_blocks"):
        analyse(model, (x,))
    blocks = analyse_blocks(model, (x,))
    assert set(blocks.analyses) == {"block", "tied", "last"}
    assert [units.size for units in blocks.analyses["block"].units] == [12]
    assert blocks.analyses["tied"].units == ()  # its first weight is also the last layer's
    assert blocks.refused == {
        "twice": "called 2 times in one forward",
        "idle": "never called by itself; its parent uses its parameters",
    }
    block = blocks.analyses["block"]
    pruned = pruned_program(block, {block.units[0].name: [1, 2, 7]})
    torch.testing.assert_close(pruned(x), masked_program(block, {block.units[0].name: [1, 2, 7]})(x))


def test_a_model_without_any_block_is_refused() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stubborn()
            self.inner.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(UsageError, match=r"none of its submodules can be analysed\. inner: Stubborn"):
        analyse_blocks(Outer(), (torch.ones(2),))


class Tokens(nn.Module):
    """Embedding, one attention layer over any number of tokens, a loop over what is picked by value."""

    def __init__(self, *, picked: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = Attention()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.head = nn.Linear(8, 3)
        self.picked = picked

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, torch.zeros(()))
        if not self.picked:
            return self.head(x + self.down(self.up(x).relu()))
        flat = x.flatten(0, 1)
        chosen = (ids.flatten() > 4).nonzero().flatten()
        flat = flat.index_add(0, chosen, self.down(self.up(flat[chosen]).relu()))
        return self.head(flat.view(*ids.shape, 8))


@pytest.fixture(scope="module")
def dynamic() -> Analysis:
    torch.manual_seed(0)
    return analyse(Tokens().eval(), (torch.randint(11, (2, 7)),), dynamic=True)


@pytest.mark.parametrize("shape", [(2, 7), (3, 7), (5, 4), (2, 9)])
def test_a_dynamic_program_runs_at_other_batch_sizes_and_lengths(
    dynamic: Analysis, shape: tuple[int, int]
) -> None:
    analysis = dynamic
    assert {units.kind for units in analysis.units} == {
        "head",
        "qk dimension",
        "v dimension",
        "feed-forward unit",
        "hidden",
    }
    keep = {units.name: range(0, units.size, 2) for units in analysis.units}
    ids = torch.randint(11, shape)
    torch.testing.assert_close(pruned_program(analysis, keep)(ids), masked_program(analysis, keep)(ids))


def test_tensors_whose_size_depends_on_values_are_followed() -> None:
    """As experts that gather their tokens: the number of rows is a symbol without an example."""
    model, ids = Tokens(picked=True).eval(), torch.randint(11, (2, 7))
    analysis = analyse(model, (ids,))
    assert {"head", "feed-forward unit"} <= {units.kind for units in analysis.units}
    assert not analysis.unruled
    keep = {units.name: range(0, units.size, 2) for units in analysis.units}
    for seed in range(3):
        ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(pruned_program(analysis, keep)(ids), masked_program(analysis, keep)(ids))
