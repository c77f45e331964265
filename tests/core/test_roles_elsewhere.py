"""Blocks, stacks and heads of models that are of no known family, and what cannot be pruned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from secateur.core.roles import survey
from secateur.core.stacks import below
from secateur.core.where import layers
from secateur.errors import UsageError

from .families import family

# Blocks, stacks and heads of models that are no Hugging Face models ----------------------------------------
from .unnamed import Foo, container, squares


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.squeeze = container("SE", {"down": nn.Linear(channels, 2), "up": nn.Linear(2, channels)})


class ResNet(nn.Module):
    """As torchvision lays it out: stages are attributes; the second stage has one block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.layer2 = nn.Sequential(BasicBlock(16))
        self.fc = nn.Linear(16, 10)


def test_a_convolutional_network() -> None:
    found = layers(ResNet())
    assert {layer.role for layer in found if layer.stack} == {"other"}
    assert [(layer.path, layer.role) for layer in found if not layer.stack] == [
        ("conv1", "other"),
        ("fc", "head"),
    ]
    blocks = {layer.path.rpartition(".")[0]: layer.block for layer in found if layer.path.endswith("conv1")}
    assert blocks == {"": None, "layer1.0": 0, "layer1.1": 1, "layer2.0": 2}


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)]),
        nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))),
    ],
)
def test_a_multilayer_perceptron_has_no_blocks(model: nn.Module) -> None:
    found = layers(model)
    assert [layer.role for layer in found] == ["other", "other", "head"]
    assert [layer.stack for layer in found] == [None, None, None]


def test_torch_transformers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    found = layers(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert [(each.name, each.role, each.block) for each in found] == [
        (f"layers.{block}.{name}", role, block)
        for block in (0, 1)
        for name, role in zip(names, ["attention", "attention", "ffn", "ffn"], strict=True)
    ]
    both = nn.Transformer(32, 4, 1, 2, dim_feedforward=64, batch_first=True)
    # nested tensors are not what this is about
    found = layers(both)
    assert [(each.stack, each.block) for each in found if each.name.endswith("linear1.weight")] == [
        ("encoder", 0),
        ("decoder", 0),
        ("decoder", 1),
    ]
    assert {each.role for each in found if "attn" in each.name} == {"attention"}
    assert {each.role for each in found if "linear" in each.name} == {"ffn"}


class Tutorial(nn.Module):
    """A language model of one's own; `first` says which modules are registered before the blocks."""

    def __init__(self, first: str = "tokens positions", vocabulary: int = 50) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {
            "tokens": nn.Embedding(vocabulary, 32),
            "positions": nn.Embedding(64, 32),
            "types": nn.Embedding(2, 32),
            "patches": nn.Linear(48, 32),
            "mixer": nn.Linear(32, vocabulary),
            "blocks": nn.ModuleList(
                [Foo([(96, 32), (32, 32), (64, 32), (32, 64)]), Foo([(96, 32), (32, 32), (64, 32), (32, 64)])]
            ),
            "out": nn.Linear(32, vocabulary, bias=False),
            "classes": nn.Linear(32, 2),
        }
        for name in first.split():
            self.add_module(name, parts[name])


@pytest.mark.parametrize(
    ("order", "head", "vocabulary"),
    [
        ("tokens positions blocks out", "out", True),
        ("positions tokens blocks out", "out", False),
        ("tokens positions out blocks", "out", True),
        ("tokens mixer blocks out", "out", True),
        ("tokens positions types blocks classes", "classes", False),
        ("patches blocks classes", "classes", False),
        ("patches classes blocks", "classes", False),
        ("patches blocks", None, False),
        ("tokens blocks", None, False),
    ],
)
def test_the_head_of_a_model_that_does_not_say(order: str, head: str | None, vocabulary: bool) -> None:
    places = survey(Tutorial(order)).places
    assert [place.path for place in places if place.role == "head"] == ([head] if head else [])
    # a table of positions registered first and larger than the vocabulary hides it: the documented limit
    assert [place.path for place in places if place.vocabulary] == ([head] if vocabulary else [])


class Declared(Tutorial):
    """Says what Hugging Face models say of themselves."""

    base_model_prefix = "body"
    config = SimpleNamespace(is_encoder_decoder=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_a_vocabulary_head_is_told_by_the_declared_input_embedding() -> None:
    model = Declared("positions tokens out")
    model.body = Tutorial("positions blocks")
    assert [(place.path, place.role) for place in survey(model).places if place.vocabulary] == [("out", "head")]


def test_a_model_that_claims_one_stack_has_one() -> None:
    model = Declared("tokens")
    model.encoder, model.decoder = Tutorial("blocks"), Tutorial("blocks")
    assert not survey(model).encoder_decoder
    assert [layer.block for layer in layers(model) if layer.path.endswith("a")] == [0, 1, 2, 3]
    model.config = SimpleNamespace(is_encoder_decoder=True)
    assert survey(model).encoder_decoder
    assert [layer.block for layer in layers(model) if layer.path.endswith("a")] == [0, 1, 0, 1]


def test_a_wrapper_around_a_hugging_face_body() -> None:
    model = container("Wrapper", {"body": family("bert body"), "fc": nn.Linear(32, 2)})
    assert [layer.path for layer in layers(model) if layer.role == "head"] == ["fc"]


def test_layers_of_several_kinds_may_alternate() -> None:
    kinds = [container("K1", {"p": nn.Linear(32, 64), "r": nn.Linear(64, 32)}) for _ in range(2)]
    other = container("K2", squares("p", "r", "s", "t"), num_heads=4)
    found = layers(nn.ModuleList([kinds[0], other, kinds[1]]))
    assert [layer.block for layer in found] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [layer.role for layer in found] == ["ffn", "ffn", *["attention"] * 4, "ffn", "ffn"]


def test_one_module_used_many_times_is_one_block() -> None:
    block = Foo([(96, 32), (32, 32), (64, 32), (32, 64)])
    found = layers(nn.Sequential(nn.Linear(4, 32), nn.ModuleList([block] * 3), nn.Linear(32, 2)))
    assert [layer.block for layer in found] == [None, 0, 0, 0, 0, None]
    assert found[1].tied == ("1.1.a.weight", "1.2.a.weight")


# What cannot be pruned -------------------------------------------------------------------------------------


def test_a_computed_or_integer_weight_is_no_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    found = survey(model)
    assert [place.name for place in found.places] == ["2.weight"]
    assert found.unprunable == (
        (
            "0.weight",
            "is computed from other parameters; make it plain first (torch.nn.utils.parametrize"
            ".remove_parametrizations, torch.nn.utils.prune.remove or remove_weight_norm)",
        ),
        ("1.weight", "holds torch.uint8, not floating-point weights"),
    )


def test_a_model_masked_by_torch_prune_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert survey(model).unprunable[0][0] == "0.weight"


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UsageError) as caught:
        survey(model)
    assert str(caught.value) == (
        "1.0.weight has no shape yet (LazyLinear is lazy): run one batch through the model before pruning it"
    )


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        survey("model.safetensors")
    assert str(caught.value) == "expected a torch.nn.Module to prune, got str"


def test_below_is_about_whole_parts_of_a_path() -> None:
    assert below("a.b", "a.b.c.d") == "c.d"
    assert below("a.b", "a.bc") is None
    assert below("a.b", "a.b") == ""
    assert below("", "") == ""
