import math

import pytest
import torch
from torch import nn

from secateur.errors import NumericError, UsageError
from secateur.evaluate import divergence


class Table(nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, ids):
        return self.scores[ids]


def brute_force(model, reference, documents, context):
    """KL by its definition, token by token, in float64."""
    kl, same, count = 0.0, 0, 0
    for document in documents:
        for begin in range(0, len(document), context):
            ids = torch.tensor([document[begin : begin + context]])
            with torch.no_grad():
                q = model(ids)["logits"][0].double().softmax(-1)
                p = reference(ids)["logits"][0].double().softmax(-1)
            for ours, theirs in zip(q, p, strict=True):
                kl += sum(b * math.log(b / a) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True) if b)
                same += int(ours.argmax() == theirs.argmax())
                count += 1
    return kl / count, same / count


def test_kl_and_agreement_are_those_of_the_definition(gpt2, other_gpt2):
    documents = [torch.randint(257, (length,)).tolist() for length in (10, 37, 1)]
    kl, same = brute_force(gpt2, other_gpt2, documents, 8)
    for batch_size in (1, 3, None):
        found = divergence(gpt2, other_gpt2, documents, context=8, batch_size=batch_size, dataset="noise")
        assert found["kl_divergence"].value == pytest.approx(kl, rel=1e-5)
        assert found["top1_agreement"].value == pytest.approx(same, abs=1e-12)
    assert found["kl_divergence"].unit == "nats"
    conditions = found["top1_agreement"].conditions
    assert (conditions["tokens"], conditions["windows"], conditions["dataset"]) == (48, 8, "noise")
    assert conditions["protocol"] == "non-overlapping windows of 8, every position"


def test_a_model_does_not_diverge_from_itself(gpt2):
    found = divergence(gpt2, gpt2, torch.arange(64))
    assert (found["kl_divergence"].value, found["top1_agreement"].value) == (0.0, 1.0)


def test_the_direction_is_reference_to_model():
    sure, unsure = Table(torch.tensor([[10.0, 0.0]] * 2)), Table(torch.zeros(2, 2))
    forwards = divergence(unsure, sure, [0, 1], context=2)["kl_divergence"].value
    backwards = divergence(sure, unsure, [0, 1], context=2)["kl_divergence"].value
    assert forwards == pytest.approx(math.log(2), rel=1e-2)
    assert backwards == pytest.approx(5 - math.log(2), rel=1e-2)


def test_the_mode_of_both_models_is_left_alone():
    model, reference = Table(torch.zeros(3, 3)).train(), Table(torch.zeros(3, 3)).train()
    before = torch.get_rng_state()
    seen = []
    divergence(model, reference, [0, 1, 2], context=2, batch_size=1, progress=lambda *args: seen.append(args))
    assert (model.training, reference.training) == (True, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == [(1, 2), (2, 2)]


def test_a_token_the_reference_rules_out_costs_nothing():
    reference = Table(torch.tensor([[0.0, -math.inf]] * 2))
    found = divergence(Table(torch.zeros(2, 2)), reference, [0, 1], context=2)
    assert found["kl_divergence"].value == pytest.approx(math.log(2))


@pytest.mark.parametrize("scores", [[[0.0, -math.inf]] * 2, [[math.nan, 0.0]] * 2])
def test_a_divergence_without_value_is_an_error(scores):
    with pytest.raises(NumericError, match="the divergence is not finite: logits hold NaN, or the model gives"):
        divergence(Table(torch.tensor(scores)), Table(torch.zeros(2, 2)), [0, 1], context=2)


def test_mistakes(gpt2):
    with pytest.raises(
        UsageError, match="the models answer with 2 and 3 tokens of vocabulary; divergence needs"
    ):
        divergence(Table(torch.zeros(2, 2)), Table(torch.zeros(2, 3)), [0, 1], context=2)
    with pytest.raises(UsageError, match="context 64 is longer than the model's 32 positions"):
        divergence(Table(torch.zeros(257, 257)), gpt2, [0, 1], context=64)
    with pytest.raises(UsageError, match="there is no token in the data"):
        divergence(gpt2, gpt2, [])
    with pytest.raises(UsageError, match="id 300 is outside the vocabulary"):
        divergence(gpt2, gpt2, [300])
