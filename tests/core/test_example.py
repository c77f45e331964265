"""Examples as users give them, and what of an answer has to stay."""

import pytest
import torch
from torch import nn

from secateur.core.example import Example, analysis_of, example_of, main_output
from secateur.errors import UsageError


class Two(nn.Module):
    """Takes one input, and a second if given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, scale=None, use_cache=True):
        logits = self.b(torch.relu(self.a(x)))
        return {"logits": logits, "past_key_values": [x] if use_cache else None, "inner": self.a(x)}


X, Y = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "args", "names"),
    [
        (X, 1, []),
        ((X, X), 2, []),
        ((X, X, True, Y), 1, []),  # more than forward takes: a batch (inputs, ...)
        ([X], 1, []),
        ({"x": X, "labels": Y}, 0, ["x"]),
        (({"x": X}, Y), 0, ["x"]),
        (Example((X,), {}), 1, []),
    ],
)
def test_every_form_of_an_example(given, args, names):
    found = example_of(Two(), given)
    assert (len(found.args), list(found.kwargs), found.rows) == (args, names, 5)


def test_a_single_row_is_doubled_and_the_cache_is_off():
    found, example = analysis_of(Two(), X[:1])
    assert (example.rows, example.kwargs) == (2, {"use_cache": False})
    assert [units.size for units in found.units] == [8]
    assert found.program(*example.args, **example.kwargs).shape == (2, 2)
    _, example = analysis_of(Two(), {"x": X})
    assert (example.rows, example.kwargs["use_cache"]) == (5, False)


def test_the_main_part_of_an_answer():
    model = Two()
    assert main_output(X) is X
    assert main_output((X, Y)) == (X, Y)
    assert main_output((X, None, 3)) == (X,)
    assert main_output((None, 3)) == (None, 3)
    assert main_output({"out": X, "aux": None, "steps": 3, "both": (X, Y)}) == {"out": X, "both": (X, Y)}
    assert main_output(model(X)).shape == (5, 2)
    assert main_output({"last_hidden_state": X, "encoder_last_hidden_state": Y}) is X
    assert main_output({"last_hidden_state": X, "pooler_output": Y}) == (X, Y)
    assert main_output({"loss": Y, "start": X, "end": X, "past_key_values": Y}) == {"start": X, "end": X}
    whole, _ = analysis_of(model, X, output=lambda answer: answer["inner"])
    assert not whole.units


@pytest.mark.parametrize(
    ("given", "words"),
    [(7, "got int"), ((), "got tuple"), ({"labels": Y}, "holds no tensor"), ([3], "no tensor")],
)
def test_what_is_no_example_is_said(given, words):
    with pytest.raises(UsageError, match=words):
        example_of(Two(), given)
