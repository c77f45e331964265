"""Statistics of gradients: against autograd by hand, whatever the batching, and nothing is touched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.core.gradients import GRADIENTS, KNOWN, gather_all, gather_gradients
from secateur.core.where import layers
from secateur.errors import NumericError, UsageError


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4))


def rows(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3), torch.randint(0, 4, (count,))


def batched(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def by_hand(model, x, y):
    """The gradient of one mean loss for each layer, by the usual way."""
    model = model.eval()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("weight")}


def test_values_against_autograd_row_by_row():
    model, (x, y) = net(), rows()
    found = gather_gradients(model, layers(model), list(GRADIENTS), batched(x, y, 3))
    whole = by_hand(model, x, y)
    single = [by_hand(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    for name, weight in model.named_parameters():
        if name.endswith("weight"):
            torch.testing.assert_close(found[name]["grad"], whole[name][None])
            squared = torch.stack([g[name].square() for g in single]).mean(0)
            torch.testing.assert_close(found[name]["grad_squared"], squared[None])
            gates = torch.stack([(weight.detach() * g[name]).sum(0) for g in single])
            torch.testing.assert_close(found[name]["input_gate"], gates[None])


def test_a_gate_is_the_derivative_by_a_factor_on_the_input_column():
    model, (x, y) = net(), rows(1)
    gate = torch.ones(5, requires_grad=True)
    F.cross_entropy(model[3](torch.tanh(model[0](x)) * gate), y).backward()
    found = gather_gradients(model, layers(model), ["input_gate"], [(x, y)])
    torch.testing.assert_close(found["3.weight"]["input_gate"][0, 0], gate.grad)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batching_does_not_matter(size):
    model, (x, y) = net(), rows()
    alone = gather_gradients(model, layers(model), list(GRADIENTS), batched(x, y, 4))
    again = gather_gradients(model, layers(model), list(GRADIENTS), batched(x, y, size))
    for layer, known in alone.items():
        for name, value in known.items():
            torch.testing.assert_close(again[layer][name], value, rtol=1e-5, atol=1e-7)


def test_padding_does_not_matter():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    texts = [torch.randint(0, 48, (n,)) for n in (9, 2, 6)]
    ids, mask = torch.full((3, 11), 7), torch.zeros(3, 11, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    chosen = [layer for layer in layers(model) if layer.role != "embedding"]
    alone = gather_gradients(model, chosen, list(GRADIENTS), [{"input_ids": text[None]} for text in texts])
    again = gather_gradients(model, chosen, list(GRADIENTS), [{"input_ids": ids, "attention_mask": mask}])
    for layer, known in alone.items():
        for name, value in known.items():
            torch.testing.assert_close(again[layer][name], value, rtol=1e-4, atol=1e-7)


def test_the_model_is_left_as_it_was():
    model, (x, y) = net(), rows()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(4)
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    gather_gradients(model, layers(model), ["grad"], [(x, y)])
    assert [m.training for m in model] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model[3].weight.grad is None
    assert torch.equal(model[3].bias.grad, torch.ones(4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_activations_and_gradients_come_together():
    model, (x, y) = net(), rows()
    found = gather_all(model, layers(model), ["input_norm", "grad"], iter(batched(x, y, 3)))
    assert set(found["0.weight"]) == {"input_norm", "grad"}
    torch.testing.assert_close(found["0.weight"]["input_norm"][0], x.norm(dim=0))
    assert set(gather_all(model, layers(model), ["input_norm"], [(x, y)])["0.weight"]) == {"input_norm"}
    assert len(set(KNOWN)) == len(KNOWN)


def test_a_layer_that_only_some_rows_reach_counts_zero_for_the_others():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    model, y = Branch(), torch.tensor([0])
    data = [(torch.ones(1, 2), y), (-torch.ones(1, 2), y)]
    found = gather_gradients(model, layers(model), ["input_gate", "grad"], data)
    assert found["a.weight"]["input_gate"][0, 1].tolist() == [0, 0]
    half = gather_gradients(model, layers(model)[:1], ["grad"], data[:1])
    torch.testing.assert_close(found["a.weight"]["grad"] * 2, half["a.weight"]["grad"])


def test_what_goes_wrong_is_said():
    model, (x, y) = net(), rows()
    whole = layers(model)
    with pytest.raises(UsageError, match="data is one batch"):
        gather_gradients(model, whole, ["grad"], {"input": x, "labels": y})
    with pytest.raises(UsageError, match="data holds no batch"):
        gather_gradients(model, whole, ["grad"], [])
    with pytest.raises(UsageError, match=r"leading sizes \[3, 7\]; give batches of one row"):
        gather_gradients(model, whole, ["input_gate"], [(x, y[:3])])
    words = nn.Embedding(7, 7)
    with pytest.raises(UsageError, match="hold nothing to predict, such as two tokens"):
        gather_gradients(words, layers(words), ["grad"], [torch.zeros(2, 1, dtype=torch.long)])
    unused = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    unused.forward = unused["a"].forward
    with pytest.raises(UsageError, match=r"b\.weight: the loss of the calibration data does not depend"):
        gather_gradients(unused, layers(unused), ["grad"], [(x, y)])
    sick = nn.Linear(3, 4)
    bad = lambda output, target: (output * 0).sum().sqrt()  # finite, with an infinite slope  # noqa: E731
    with pytest.raises(NumericError, match=r"weight: NaN or Inf among its gradients"):
        gather_gradients(sick, layers(sick), ["grad"], [(x, y)], bad)
