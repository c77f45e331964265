"""Multiply-accumulates read off the labels are those that torch counts, before and after pruning."""

import pytest
import torch
from torch import nn

from secateur import evaluate
from secateur.core.example import analysis_of
from secateur.core.units import pruned_program


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(7, 10, 2, batch_first=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 3, groups=2, stride=2), nn.ReLU(), nn.ConvTranspose2d(12, 6, 2, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(4 * 121, 5),
    )  # fmt: skip


def tiny(name: str, config: str, **sizes):
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, config)(vocab_size=53, pad_token_id=0, attn_implementation="eager", **sizes)
    return getattr(transformers, name)(made).eval(), torch.randint(3, 53, (2, 9))


CASES = {
    "mlp": lambda: (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 5, 3)),
    "cnn": lambda: (convolutions().eval(), torch.randn(2, 3, 13, 13)),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(2, 5, 7)),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(2, 5, 7)),
    "llama": lambda: tiny(
        "LlamaForCausalLM", "LlamaConfig", hidden_size=24, intermediate_size=30, num_hidden_layers=2, head_dim=6,
        num_attention_heads=12, num_key_value_heads=4,
    ),
    "gpt2": lambda: tiny(
        "GPT2LMHeadModel", "GPT2Config", n_embd=24, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    ),
    "bert": lambda: tiny(
        "BertForSequenceClassification", "BertConfig", hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=30, max_position_embeddings=16,
    ),
}  # fmt: skip


def counted(program, given) -> int:
    torch._C._set_mkldnn_enabled(False)  # its recurrent layers hide their products from the counter
    try:
        return evaluate.flops(program, given)["macs"].value
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thorough
def test_as_torch_counts_whole_and_pruned(name):
    model, x = CASES[name]()
    analysis, example = analysis_of(model, x)
    given = (*example.args, *example.kwargs.values())  # the program takes its inputs in order
    expected = counted(pruned_program(analysis, {}), given)
    assert abs(analysis.macs() - expected) <= 0.01 * expected
    keep = {units.name: range(0, units.size, 2) for units in analysis.units}
    expected = counted(pruned_program(analysis, keep), given)
    found = analysis.macs(keep)
    assert abs(found - expected) <= 0.01 * expected
    assert found < analysis.macs()


@pytest.mark.thorough
def test_fused_attention_counts_as_the_eager_one_does():
    pytest.importorskip("transformers")
    model, ids = CASES["llama"]()
    eager = analysis_of(model, ids)[0].macs()
    model.config._attn_implementation = "sdpa"
    assert analysis_of(model, ids)[0].macs() == eager


def test_bytes_and_parameters_are_those_of_the_pruned_program():
    model, x = CASES["cnn"]()
    analysis, _ = analysis_of(model.double(), x.double())
    keep = {units.name: range(1, units.size) for units in analysis.units}
    small = pruned_program(analysis, keep)
    assert analysis.parameter_count(keep) == sum(p.numel() for p in small.parameters())
    stored = [*small.parameters(), *(b for n, b in small.named_buffers() if "num_batches" not in n)]
    assert analysis.byte_count(keep) == 8 * sum(t.numel() for t in stored)
    assert analysis.byte_count() > analysis.byte_count(keep)
