"""A model that refuses its inputs: which module, what it takes, what it was given; everything else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Masks, Recipe, evaluate, finetune_, prune_, score, shrink, sparsegpt, taylor, wanda
from secateur.core.misfit import OURS, MisfitError, run
from secateur.errors import UsageError
from secateur.measure import running_on
from secateur.pattern import Neurons


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.head(self.body(x) * scale)


WIDE = torch.ones(5, 7)
LABELS = torch.tensor([0, 1, 2, 3, 0])
REASON = (
    "inputs of (5, 7) float32: body.0 (Linear, weight 8 x 6) was given (5, 7) float32 and raised RuntimeError: mat1 "
    "and mat2 shapes cannot be multiplied (5x7 and 6x8)"
)
TOLD = f"the model cannot be run on {REASON}; do they fit together?"
RUNS: dict[str, Callable[[], Any]] = {
    "gradients": lambda: prune_(Net(), 0.5, taylor, data=[(WIDE, LABELS)]),
    "accuracy": lambda: evaluate.accuracy(Net(), [(WIDE, LABELS)]),
    "latency": lambda: evaluate.latency(Net(), WIDE),
    "training": lambda: finetune_(Net(), [(WIDE, LABELS)]),
    "shrinking": lambda: shrink(Net(), Masks({"body.0.weight": torch.ones(8, 6, dtype=torch.bool)}), WIDE),
    "units": lambda: prune_(Net(), 0.5, Recipe(score.l2, Neurons()), example=WIDE),
}


@pytest.mark.parametrize("what", RUNS)
def test_every_way_in_names_the_module_that_refused(what, capfd, caplog):
    with pytest.raises(MisfitError) as caught:
        RUNS[what]()
    assert str(caught.value) == TOLD
    assert caught.value.exit_code == 2
    assert "Traceback" not in capfd.readouterr().err  # torch logs one of its own where an export fails
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_the_command_line_says_which_data_they_were():
    words = f"the model cannot be run on the calibration data ({REASON}); do they fit together?"
    with pytest.raises(UsageError) as caught, running_on("the calibration data"):
        run(Net(), (WIDE,), {})
    assert str(caught.value) == words


@pytest.mark.parametrize("recipe", [wanda, sparsegpt])
@pytest.mark.parametrize("data", [[WIDE], [torch.ones(5, 6), WIDE]])
def test_calibration_data_of_another_width_are_told_with_the_layer(recipe, data):
    if recipe is sparsegpt and len(data) > 1:
        words = r"calibration batches differ in shape, inputs: \[\(6,\), \(7,\)\]"
    else:
        words = (
            r"body\.0\.weight: takes inputs of width 6, and calibration data bring it 7 \(input of shape \(5, 7\)\); "
            "give batches that the model takes"
        )
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        prune_(model, 0.5, recipe, data=data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_and_numbers_of_arguments_are_told():
    with pytest.raises(
        MisfitError, match=r"inputs of x \(2, 6\) float32, size 3: it raised TypeError: .*'size'"
    ):
        run(Net(), (), {"x": torch.ones(2, 6), "size": 3})
    with pytest.raises(MisfitError, match="inputs of nothing: it raised TypeError"):
        run(Net(), (), {})


def test_what_is_no_misfit_stays_as_it_is():
    model = Net()

    def hook(*_: Any) -> None:
        raise UsageError("mine")

    with model.head.register_forward_pre_hook(hook), pytest.raises(UsageError, match=r"^mine$"):
        run(model, (torch.ones(2, 6),), {})
    for words in ("DefaultCPUAllocator: can't allocate memory: you tried", "CUDA out of memory. Tried"):

        def full(*_: Any, words: str = words) -> None:
            raise RuntimeError(words)

        with model.head.register_forward_pre_hook(full), pytest.raises(RuntimeError, match="memory"):
            run(model, (torch.ones(2, 6),), {})
    # a defect of a hook of secateur's is no fault of the user's data
    ours: dict[str, Any] = {}
    exec(compile("def hook(*_):\n    raise AttributeError('ours')", f"{OURS}/core/visit.py", "exec"), ours)
    with pytest.raises(AttributeError, match=r"^ours$"), model.head.register_forward_pre_hook(ours["hook"]):
        run(model, (torch.ones(2, 6),), {})
    assert run(model, (torch.ones(2, 6),), {"scale": 2.0}).shape == (2, 4)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            LABELS + 9,
            "targets from 9 to 12 where the model tells 4 classes apart; expected whole numbers from 0 to 3",
        ),
        (-LABELS, "targets from -3 to 0 where"),
    ],
)
def test_classes_that_the_model_does_not_know(labels, words):
    for act in (
        lambda: prune_(Net(), 0.5, taylor, data=[(torch.ones(5, 6), labels)]),
        lambda: finetune_(Net(), [(torch.ones(5, 6), labels)]),
    ):
        with pytest.raises(UsageError, match=words):
            act()


def test_another_number_of_classes_than_of_inputs():
    words = r"targets of shape \(3,\) do not fit logits of shape \(5, 4\); expected \(5,\), one class for each"
    with pytest.raises(UsageError, match=words):
        prune_(Net(), 0.5, taylor, data=[(torch.ones(5, 6), LABELS[:3])])


def test_targets_that_do_not_count_are_no_classes():
    masks = prune_(Net(), 0.5, taylor, data=[(torch.randn(5, 6), torch.tensor([0, 1, -100, 3, -100]))])
    assert masks.sparsity == 0.5


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 6)])
def test_elements_that_share_their_memory(shape):
    def model() -> Net:
        net = Net()
        net.body[0].weight = nn.Parameter(torch.randn(shape).expand(8, 6))
        return net

    masks = Masks({"body.0.weight": torch.ones(8, 6, dtype=torch.bool)})
    for act in (
        lambda: prune_(model(), 0.5),
        lambda: prune_(model(), 0.5, sparsegpt, data=[torch.randn(9, 6)]),
        lambda: masks.apply_(model()),
        lambda: finetune_(model(), [(torch.ones(5, 6), LABELS)]),
    ):
        with pytest.raises(
            UsageError, match=r"body\.0\.weight: its 48 elements, shape \(8, 6\), share places in memory"
        ):
            act()
    prune_(model(), 0.5, skip="body.0")
