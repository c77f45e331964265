"""Training goes on: a step of the shrunk model is the masked model's step on the survivors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import shrink, shrunk
from secateur.core.units import analyse
from secateur.deploy.optimizer import slice_like_, slice_optimizer_
from secateur.errors import UsageError

from .nets import Language, Net, ids


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    optimizer.zero_grad()
    logits = model(inputs)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()).backward()
    optimizer.step()


def kept(value: torch.Tensor, index) -> torch.Tensor:
    for dim, positions in enumerate(index):
        value = value if positions is None else value.index_select(dim, positions)
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    ],
    ids=["AdamW", "SGD"],
)
def test_a_step_on_the_shrunk_model_is_the_masked_models_step_on_the_survivors(make) -> None:
    model = Language().double()
    optimizer = make(model.parameters())
    for _ in range(2):
        step(model, optimizer, ids())
    analysis = analyse(model, (ids(),))
    keep = {units.name: range(0, units.size, 2) for units in analysis.units}
    masks = analysis.masks(keep)
    small = shrink(model, masks, ids(), analysis=analysis)
    average = slice_like_(copy.deepcopy(small), model)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), small.parameters(), strict=True))
    masks.apply_(model)
    theirs = copy.deepcopy(optimizer.state_dict())
    slice_optimizer_(optimizer, model, small)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], small.parameters(), strict=True))
    masked = make(model.parameters())
    masked.load_state_dict(theirs)
    inputs = ids()
    step(model, masked, inputs)
    step(small, optimizer, inputs)
    index = shrunk(small).index
    for (name, big), (_, little) in zip(model.named_parameters(), small.named_parameters(), strict=True):
        torch.testing.assert_close(
            kept(big.detach(), index.get(name, ())), little.detach(), rtol=1e-9, atol=1e-12
        )


def test_adapters_are_sliced_as_they_are_parameters_like_others() -> None:
    def forward(self, x):
        return self.down(F.relu(self.up(x) + self.b(self.a(x))))

    model = Net(
        forward, up=nn.Linear(6, 12), a=nn.Linear(6, 4, bias=False), b=nn.Linear(4, 12, bias=False),
        down=nn.Linear(12, 3),
    )  # fmt: skip
    model.up.requires_grad_(False)
    x = torch.randn(3, 6)
    analysis = analyse(model, (x,))
    wide = next(u.name for u in analysis.units if u.size == 12)
    small = shrink(model, {wide: [0, 3, 4, 9]}, x, analysis=analysis)
    assert small.b.weight.shape == (4, 4)
    assert torch.equal(small.b.weight, model.b.weight[[0, 3, 4, 9]])
    assert not small.up.weight.requires_grad
    assert small.a.weight.requires_grad


def test_what_cannot_be_sliced_is_refused_and_nothing_is_changed() -> None:
    model = Language()
    analysis = analyse(model, (ids(),))
    small = shrink(model, {u.name: range(u.size - 1) for u in analysis.units}, ids(), analysis=analysis)
    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"parameter of shape \(2, 3\) that is none of Language's"):
        slice_optimizer_(other, model, small)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model.embed.weight
    optimizer.state[first]["rows"] = torch.ones(29)
    with pytest.raises(UsageError, match=r"^embed.weight: the optimizer's rows has shape \(29,\)"):
        slice_optimizer_(optimizer, model, small)
    assert optimizer.param_groups[0]["params"][0] is first
    with pytest.raises(UsageError, match=r"it is another model"):
        slice_like_(small, Language(hidden_size=16))
