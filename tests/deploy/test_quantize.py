"""Quantization after pruning: every zero stays, outputs are those of the rounded weights, and files come back."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import evaluate
from secateur.core.where import layers
from secateur.deploy.grid import from_grid
from secateur.deploy.packed import load_quantized_, quantized_header, save_quantized
from secateur.deploy.quantize import find_integers, quantize_
from secateur.errors import InputError, NumericError, UsageError
from secateur.prune import prune_

from .mixed import Mixed, Tied

pytest.importorskip("torchao")


def gpt2():
    hf = pytest.importorskip("transformers")
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_head": 2, "n_layer": 1}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


IDS = torch.arange(24).reshape(2, 12) % 20


def answer(model):
    model.eval()
    with torch.no_grad():
        output = model(IDS)
    return getattr(output, "logits", output)


def pruned(build, sparsity=0.5):
    model = build()
    masks = prune_(model, sparsity, only=lambda path, module: True)
    return model, masks


def rounded(model, **options):
    """A copy whose ordinary weights are rounded by hand to what the integers say."""
    plain, integers = copy.deepcopy(model), copy.deepcopy(model)
    done = quantize_(integers, **options)
    grids = {name: grid for name, _, grid, _ in find_integers(integers)}
    with torch.no_grad():
        for layer in layers(plain):
            layer.weight.copy_(layer.layout.from_matrices(from_grid(grids[layer.name])))
    return plain, integers, done


@pytest.mark.parametrize("build", [Mixed, Tied, gpt2])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_model_computes_with_the_rounded_weights(build, scheme):
    model, masks = pruned(build)
    plain, integers, done = rounded(model, scheme=scheme, group=8 if scheme == "int4" else None)
    assert torch.allclose(answer(integers), answer(plain), atol=1e-5)
    assert (answer(plain) - answer(model)).abs().mean() < 0.2 * answer(model).abs().mean()
    for name, mask in masks.items():
        assert not plain.get_parameter(name)[~mask].any()
    assert done.sparsity >= 0.5
    assert {layer.name for layer in done.layers} == {layer.name for layer in layers(model)}
    assert not done.left_out


def test_schemes_of_inner_and_outer_layers():
    done = quantize_(Tied(), "int4")
    assert {layer.name: layer.scheme for layer in done.layers} == {
        "table.weight": "int8",
        "middle.weight": "int4",
    }
    done = quantize_(Tied(), "int4", outer="int4")
    assert {layer.scheme for layer in done.layers} == {"int4"}
    model = Tied()
    done = quantize_(model, "int4", outer=None)
    assert [layer.name for layer in done.layers] == ["middle.weight"]
    assert done.left_out == (("table.weight", "outer=None"),)
    assert model.table.weight.dtype == torch.float32
    done = quantize_(Mixed(), "int8", skip="conv")
    assert ("conv.weight", "skipped by skip='conv'") in done.left_out or any(
        name == "conv.weight" for name, _ in done.left_out
    )


def test_dynamic_layers_compute_in_integers():
    """The product by hand: inputs rounded row by row, an integer product, both scales."""
    model = nn.Sequential(nn.Linear(64, 48))
    quantize_(model, "int8-dynamic", outer="int8-dynamic")
    x = torch.randn(40, 64)
    (_, scheme, grid, _), *_ = find_integers(model)
    assert scheme == "int8-dynamic"
    step = x.abs().amax(-1, keepdim=True) / 127.5
    inputs = (x / step).round().clamp(-128, 127)
    product = inputs.double() @ grid.integers[0].double().t()
    expected = product * step.double() * grid.scale[0].double().t() + model[0].bias.double()
    gap = (model(x).double() - expected).abs()
    # an input on the edge between two integers may fall on either side: one step of it times one weight
    assert (
        gap <= 1e-4 + 2 * step.double() * (grid.integers[0].double().abs() * grid.scale[0].double()).max()
    ).all()
    assert (gap < 1e-4).double().mean() > 0.7
    # layers that torchao has no such kernel for hold int8 weights
    mixed = Mixed()
    kinds = {
        layer.name: layer.scheme for layer in quantize_(mixed, "int8-dynamic", outer="int8-dynamic").layers
    }
    assert kinds["conv.weight"] == kinds["table.weight"] == "int8"
    assert kinds["linear.weight"] == "int8-dynamic"


def test_half_precision_models_answer_in_half_precision():
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Conv1d(16, 4, 1)).bfloat16()
    plain = copy.deepcopy(model)
    quantize_(model)
    x = torch.randn(16, 32).bfloat16()
    assert model(x).dtype == torch.bfloat16
    assert torch.allclose(model(x), plain(x), atol=0.05)


def test_tied_weights_stay_one():
    model = Tied()
    quantize_(model)
    first, second = (module.parametrizations.weight for module in (model.table, model.head))
    assert first.original is second.original
    assert first[0].scale is second[0].scale
    assert torch.equal(model.table.weight, model.head.weight)


def test_memory_is_that_of_the_integers():
    model, _ = pruned(gpt2)
    dense = evaluate.state_bytes(model).value
    quantize_(model)
    assert evaluate.state_bytes(model).value < 0.35 * dense
    assert evaluate.nonzeros(model).value < 0.6 * evaluate.parameters(model).value


@pytest.mark.parametrize("build", [Mixed, Tied, gpt2])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
def test_saved_and_loaded_it_answers_the_same(tmp_path, build, scheme):
    model, _ = pruned(build, 0.7)
    quantize_(model, scheme)
    path = tmp_path / "q.safetensors"
    save_quantized(model, path)
    torch.manual_seed(1)
    again = load_quantized_(build(), path)
    assert torch.equal(answer(again), answer(model))
    dense = load_quantized_(build(), path, dense=True)
    assert not list(find_integers(dense))
    if scheme != "int8-dynamic":
        assert torch.allclose(answer(dense), answer(model), atol=1e-5)
    save_quantized(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"q.safetensors", "again.safetensors"}


def test_the_file_is_as_small_as_its_bits(tmp_path):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    prune_(model, 0.6)
    quantize_(model)
    save_quantized(model, tmp_path / "q")
    tensors = load_file(tmp_path / "q")
    weights, kept = 2 * 64 * 64 * 9, sum(int((g.integers != 0).sum()) for _, _, g, _ in find_integers(model))
    held = sum(tensors[name].numel() for name in tensors if name.endswith((":values", ":kept")))
    assert held == weights // 8 + kept <= weights * (0.4 + 1 / 8) + 1
    assert {tensors[name].dtype for name in tensors if name.endswith(":scale")} == {torch.float16}


@pytest.fixture
def saved(tmp_path):
    model, _ = pruned(Tied)
    quantize_(model)
    path = tmp_path / "q.safetensors"
    save_quantized(model, path)
    return path


def altered(path, change):
    header, tensors = quantized_header(path), load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"secateur": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.pop("tied"), "the header was altered"),
        (lambda h, t: h.update(weights=3), "the header was altered"),
        (
            lambda h, t: h["weights"]["middle.weight"].update(scheme="int3"),
            "what the header says of middle.weight",
        ),
        (
            lambda h, t: h["weights"]["middle.weight"].update(shape=[1, 24]),
            "what the header says of middle.weight",
        ),
        (
            lambda h, t: h["weights"]["middle.weight"].update(names=["x"]),
            "what the header says of middle.weight",
        ),
        (lambda h, t: t.pop("middle.weight:values"), "middle.weight has no values"),
        (lambda h, t: t.pop("middle.weight:scale"), "middle.weight has no scale"),
        (lambda h, t: t["middle.weight:scale"].neg_(), "the scales of middle.weight were altered"),
        (
            lambda h, t: t["middle.weight:scale"][0].fill_(float("nan")),
            "the scales of middle.weight were altered",
        ),
        (lambda h, t: t.update({"middle.weight:scale": torch.ones(1, 24, 7)}), "the scales of middle.weight"),
        (lambda h, t: t.pop("middle.bias"), "missing in the file: middle.bias"),
        (lambda h, t: t.update(extra=torch.ones(1)), "unknown: extra"),
        (
            lambda h, t: t.update({"middle.bias": torch.ones(2)}),
            r"middle.bias is \(2,\) in the file, \(24,\) in",
        ),
        (lambda h, t: h["tied"].update(a="b"), "a is said to be b, which is not in the file"),
        (lambda h, t: h.update(format="other"), "no file of a quantized model"),
    ],
)
def test_an_altered_file_is_told(saved, change, message):
    altered(saved, change)
    with pytest.raises(InputError, match=message):
        load_quantized_(Tied(), saved)


def test_files_of_another_kind_and_models_of_another_kind(saved, tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    for path in (tmp_path / "x", tmp_path / "missing"):
        assert quantized_header(path) is None
        with pytest.raises(InputError, match="no file of a quantized model"):
            load_quantized_(Tied(), path)
    with pytest.raises(InputError, match=r"does not fit the model: it has no weight middle\.weight"):
        load_quantized_(nn.Linear(2, 2), saved)
    other = Tied()
    other.middle = nn.Linear(24, 12)
    with pytest.raises(
        InputError, match=r"middle\.weight is \(1, 24, 24\) in the file, \(1, 12, 24\) in the model"
    ):
        load_quantized_(other, saved)
    with pytest.raises(UsageError, match="the model holds no integers; quantize_ it first"):
        save_quantized(Tied(), tmp_path / "y")


def test_what_is_refused():
    with pytest.raises(UsageError, match="scheme 'int3' is not known; nearest: int"):
        quantize_(Tied(), "int3")
    with pytest.raises(UsageError, match="scheme 'int5' is not known"):
        quantize_(Tied(), outer="int5")
    with pytest.raises(
        UsageError, match="no layer to quantize; choose some with only=, or give outer= a scheme"
    ):
        quantize_(nn.Sequential(nn.Embedding(4, 4)), outer=None)
    model = Tied()
    quantize_(model)
    with pytest.raises(UsageError, match="the model holds integers already"):
        quantize_(model)
    model = Tied()
    model.middle.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericError, match=r"middle\.weight: NaN or Inf among the weights"):
        quantize_(model)
    assert all(
        torch.equal(before[name], value) or name == "middle.weight"
        for name, value in model.state_dict().items()
    )
    with pytest.raises(UsageError, match=r"table\.weight"):
        quantize_(Tied(), only="head")


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        UsageError, match=r"quantized linear layers need torchao 0\.18 .*pip install 'secateur\[quantize\]'"
    ):
        quantize_(Tied())


class Experts(nn.Module):
    """A block whose gate weighs four feed-forwards."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_routers_keep_their_precision_unless_they_are_named():
    model = nn.Sequential(*(Experts() for _ in range(2)))
    gates = [name for name, _ in model.named_parameters() if "gate" in name]
    reasons = dict(quantize_(copy.deepcopy(model)).left_out)
    assert {name: reasons.get(name) for name in gates} == dict.fromkeys(
        gates, "a router is small, and decides much"
    )
    done = quantize_(model, only="*")
    assert {layer.name for layer in done.layers} >= set(gates)
