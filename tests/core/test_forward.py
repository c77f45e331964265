from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.core.forward import (
    accepts,
    batch_size_of,
    call,
    device_of,
    dtype_of,
    input_of,
    logits_of,
    move,
    undisturbed,
)
from secateur.errors import UsageError


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_random_numbers_drawn_inside_are_not_missed_outside():
    expected = torch.rand(2)
    torch.manual_seed(0)
    with undisturbed(nn.Identity()):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(1),
        {"logits": torch.ones(1)},
        SimpleNamespace(logits=torch.ones(1)),
        (torch.ones(1), "rest"),
        [torch.ones(1)],
    ],
)
def test_logits_are_found(output):
    assert torch.equal(logits_of(output), torch.ones(1))


@pytest.mark.parametrize("output", [None, {}, (), ("a",), SimpleNamespace(logits=3)])
def test_an_answer_without_logits_is_refused(output):
    with pytest.raises(UsageError, match=f"the model returned {type(output).__name__} without logits"):
        logits_of(output)


def test_examples_of_every_form_reach_the_model():
    class Add(nn.Module):
        def forward(self, a, b=1):
            return a + b

    model = Add()
    assert [call(model, 1), call(model, (1, 2)), call(model, [1, 3]), call(model, {"a": 1, "b": 4})] == [
        2,
        3,
        4,
        5,
    ]
    assert (accepts(model, "b"), accepts(model, "c")) == (True, False)


def test_the_batch_size_is_that_of_the_first_tensor():
    rows = torch.ones(4, 2)
    assert [batch_size_of(e) for e in (rows, (None, rows), {"x": 1, "y": [rows]})] == [4, 4, 4]
    assert input_of((None, {"y": [torch.ones(2, 3, 5)]})) == {"batch": 2, "input": "2 x 3 x 5"}
    assert input_of((3, torch.tensor(1.0))) == {}
    assert [batch_size_of(e) for e in (3, "text", torch.tensor(1.0), (), {})] == [None] * 5


def test_devices_and_formats():
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert dtype_of(nn.Linear(1, 1, dtype=torch.bfloat16)) == "bfloat16"
    assert dtype_of(nn.Identity()) == "none"
    moved = move({"a": [torch.ones(1)], "b": (torch.ones(1), 3)}, torch.device("meta"))
    assert (moved["a"][0].device.type, moved["b"][0].device.type, moved["b"][1]) == ("meta", "meta", 3)
    assert isinstance(moved["b"], tuple)
