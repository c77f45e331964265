"""What an analysis says and does, against really smaller models; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.core.units import Analysis, analyse, masked_program, pruned_program
from secateur.errors import UsageError


class Net(nn.Module):
    """Submodules, and a function for the forward."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.computation = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.computation(self, *args)


X = torch.randn(2, 5, 7, dtype=torch.float64)
A, B = nn.Linear(7, 12), nn.Linear(12, 3)


def tiny_llama(**changed: int) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 53, "hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2, "head_dim": 6,
        "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.LlamaConfig(**(sizes | changed), attn_implementation="eager")
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(3, 53, (2, 9))


@pytest.mark.thorough
def test_a_really_smaller_llama_with_the_kept_slices_computes_the_pruned_program() -> None:
    """The strongest oracle: no mask and no graph, a model of the same class built with the smaller sizes."""
    model, ids = tiny_llama()
    analysis = analyse(model, (ids,), {"use_cache": False}, output="logits")
    wanted = {"hidden": range(0, 24, 2), "feed-forward unit": range(20), "KV group": [0, 3]}
    keep = {units.name: wanted[units.kind] for units in analysis.units if units.kind in wanted}
    assert len(keep) == 5
    small, _ = tiny_llama(hidden_size=12, intermediate_size=20, num_attention_heads=6, num_key_value_heads=2)
    index = analysis.kept_indices(keep)
    state = {}
    for name, value in model.state_dict().items():
        for dim, kept in enumerate(index.get(name, ())):
            value = value if kept is None else value.index_select(dim, kept)
        state[name] = value
    small.load_state_dict(state)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    torch.testing.assert_close(
        pruned_program(analysis, keep)(ids, use_cache=False), small(ids, use_cache=False).logits
    )


def test_a_llama_has_the_axes_its_computation_asks_for() -> None:
    model, ids = tiny_llama()
    analysis = analyse(model, (ids,), {"use_cache": False}, output="logits")
    found = {(units.kind, units.size) for units in analysis.units}
    assert found == {
        ("hidden", 24), ("feed-forward unit", 30), ("KV group", 4), ("query head", 3), ("rotary pair", 3),
        ("v dimension", 6),
    }  # fmt: skip
    groups = analysis["KV groups of model.layers.0.self_attn"]
    assert [(member.name.split(".")[-2], member.dim) for member in groups.members] == [
        ("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1),
    ]  # fmt: skip
    assert groups.members[1].indices[1].tolist() == [6, 7, 8, 9, 10, 11]
    assert groups.exact
    hidden = analysis["hidden dimensions of model"]
    assert not hidden.exact
    assert hidden.reason == "mean over it"
    assert (hidden.members[0].name, hidden.members[0].aliases) == (
        "model.embed_tokens.weight",
        ("lm_head.weight",),
    )
    pairs = analysis["rotary pairs of model.layers.0-1.self_attn"]
    assert pairs.members[0].indices[0, :2].tolist() == [0, 3]
    assert "model.rotary_emb.inv_freq" in {member.name for member in pairs.members}
    assert any("rows are chosen by index" in str(frozen.reason) for frozen in analysis.frozen)


def test_a_smaller_lstm_with_the_kept_slices_computes_the_pruned_program() -> None:
    model = Net(
        lambda s, x: s.head(s.rnn(x)[0]), rnn=nn.LSTM(7, 10, 2, batch_first=True), head=nn.Linear(10, 3)
    )
    x = torch.randn(2, 5, 7)
    analysis = analyse(model, (x,))
    (units,) = analysis.units
    assert (units.kind, units.size, units.width) == ("recurrent unit", 10, 4)
    keep = {units.name: [0, 2, 3, 9]}
    index = analysis.kept_indices(keep)
    small = Net(model.computation, rnn=nn.LSTM(7, 4, 2, batch_first=True), head=nn.Linear(4, 3))
    state = {}
    for name, value in model.state_dict().items():
        for dim, kept in enumerate(index.get(name, ())):
            value = value if kept is None else value.index_select(dim, kept)
        state[name] = value
    small.load_state_dict(state)
    torch.testing.assert_close(pruned_program(analysis, keep)(x), small(x))


def mlp() -> tuple[nn.Module, Analysis]:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, analyse(model, (torch.zeros(4, 3),))


def test_pruning_leaves_the_model_its_mode_and_its_tensors() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analysis = analyse(model, (torch.randn(4, 3),))
    small = pruned_program(analysis, {analysis.units[0].name: [1, 5]})
    assert [module.training for module in model] == [True, True, False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert set(small.state_dict()) <= set(before)
    assert small.get_parameter("0.weight").shape == (2, 3)
    assert not small.get_parameter("0.weight").requires_grad
    assert small.get_parameter("3.weight").requires_grad
    assert small.get_buffer("2.running_mean").shape == (2,)


def test_nothing_kept_back_is_the_model_itself() -> None:
    model, analysis = mlp()
    x = torch.randn(4, 3)
    assert torch.equal(pruned_program(analysis, {})(x), model(x))
    assert torch.equal(pruned_program(analysis, {"feed-forward units of 0,2": range(8)})(x), model(x))
    assert analysis.kept_indices({"feed-forward units of 0,2": range(8)}) == {}


def test_meta_models_are_analysed_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 10**6), nn.ReLU(), nn.Linear(10**6, 2))
    analysis = analyse(model, (torch.zeros(4, 3, device="meta"),))
    assert [units.size for units in analysis.units] == [10**6]


def test_parts_of_the_output_that_do_not_matter_do_not_freeze() -> None:
    model = Net(lambda s, x: {"logits": s.b(y := s.a(x)), "hidden": y}, a=A, b=B).float()
    x = X.float()
    assert analyse(model, (x,)).units == ()
    for output in ("logits", lambda result: result["logits"]):
        analysis = analyse(model, (x,), output=output)
        (units,) = analysis.units
        assert pruned_program(analysis, {units.name: [0]})(x).shape == (2, 5, 3)


def test_parameters_the_example_never_touches_are_named() -> None:
    model = Net(lambda s, x: s.b(s.a(x)), a=A, b=B, idle=nn.Linear(2, 2)).float()
    assert analyse(model, (X.float(),)).unused == ("idle.weight", "idle.bias")


def test_tensors_that_share_a_part_of_their_memory_are_frozen() -> None:
    table = torch.randn(24, 7)
    model = Net(
        lambda s, x: s.b((x @ s.head.T).relu()) + (x @ s.whole.T).sum(-1, keepdim=True),
        b=nn.Linear(12, 3), whole=nn.Parameter(table), head=nn.Parameter(table[:12]),
    )  # fmt: skip
    analysis = analyse(model, (X.float(),))
    assert analysis.units == ()
    assert any("shares a part of its memory" in str(frozen.reason) for frozen in analysis.frozen)


def test_unknown_axis_names_the_nearest() -> None:
    _, analysis = mlp()
    with pytest.raises(UsageError, match="none of the 1 prunable axes; nearest: feed-forward units of 0,2"):
        pruned_program(analysis, {"feed-forward units of 0": [1]})


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], "no unit is left of 8; keep at least one"),
        ([0, 8], "kept units run from 0 to 8, expected 0 to 7"),
        ([-1, 2], "kept units run from -1 to 2, expected 0 to 7"),
        ([3, 3], "a unit is kept twice"),
    ],
)
def test_wrong_kept_units_are_refused(kept: list[int], words: str) -> None:
    _, analysis = mlp()
    with pytest.raises(UsageError, match=words):
        masked_program(analysis, {"feed-forward units of 0,2": kept})


def test_a_forward_that_depends_on_values_is_refused_with_the_tracers_words() -> None:
    model = Net(lambda s, x: s.a(x) if x.sum() > 0 else x, a=nn.Linear(7, 7))
    with pytest.raises(UsageError, match=r"Net: torch\.export cannot trace the forward with this example: "):
        analyse(model, (X.float(),))


def test_an_output_that_is_not_there_is_refused() -> None:
    model = Net(lambda s, x: {"logits": s.a(x)}, a=nn.Linear(7, 7))
    with pytest.raises(UsageError, match="output 'scores' is not in the model's output; it has: logits"):
        analyse(model, (X.float(),), output="scores")
    with pytest.raises(UsageError, match="finds no tensor"):
        analyse(model, (X.float(),), output=lambda result: 3)


@pytest.mark.thorough
def test_parameters_left_are_counted_without_building_anything() -> None:
    model, ids = tiny_llama()
    analysis = analyse(model, (ids,), output="logits")
    assert analysis.parameter_count() == sum(value.numel() for value in model.parameters())
    keep = {units.name: range(0, units.size, 2) for units in analysis.units}
    pruned = pruned_program(analysis, keep)
    assert analysis.parameter_count(keep) == sum(value.numel() for value in pruned.parameters())


def test_an_analysis_reads_as_words() -> None:
    model = Net(lambda s, x: s.b(s.n(s.a(x)) * torch.arange(1, 13)), a=A, b=B, n=nn.LayerNorm(12)).float()
    lines = str(analyse(model, (X.float(),))).splitlines()
    assert lines == [
        "12 inner dimensions of a, b, n: a.weight[0], a.bias[0], b.weight[1], n.weight[0] and 1 more; "
        "approximate: mean and variance over it; made in the forward by aten.arange at ",
        "frozen, an input of the model (input at args_0): a.weight[1]",
        "frozen, an output of the model (output at linear_1): b.weight[0], b.bias[0]",
    ]


@pytest.mark.filterwarnings("ignore")
def test_quantized_modules_are_refused_by_name() -> None:
    quantized = torch.ao.nn.quantized.dynamic.Linear(7, 12)
    model = nn.Sequential(nn.Linear(7, 7), nn.Sequential(nn.ReLU(), quantized))
    with pytest.raises(UsageError, match=r"1\.1: Linear is quantized.*Prune the float model first"):
        analyse(model, (X.float(),))
