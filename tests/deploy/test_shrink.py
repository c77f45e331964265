"""Shrunk models against copies with zeros, made without any graph; what follows, what stays, what is refused."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from secateur import Masks, shrink, shrunk
from secateur.core.units import Analysis, analyse
from secateur.errors import UsageError

from .nets import Language, Net, ids, masked


@pytest.fixture(scope="module")
def language() -> tuple[Language, Analysis]:
    torch.manual_seed(0)
    model = Language()
    return model, analyse(model, (ids(),))


def half(analysis: Analysis, *kinds: str) -> dict[str, range]:
    return {u.name: range(0, u.size, 2) for u in analysis.units if not kinds or u.kind in kinds}


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.detach().float().numpy().tobytes())
    numbers = {
        path: {k: v for k, v in vars(m).items() if isinstance(v, int)} for path, m in model.named_modules()
    }
    return found.hexdigest() + str(numbers) + str(getattr(model, "config", ""))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_a_model_of_the_same_classes_computes_what_the_masked_one_does(language) -> None:
    model, analysis = language
    before = digest(model)
    masks = analysis.masks(half(analysis))
    small = shrink(model, masks, ids(), analysis=analysis)
    inputs = ids(5, 9)
    close(masked(model, masks)(inputs), small(inputs))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert small.last.weight is small.embed.weight
    assert small.state_dict().keys() == model.state_dict().keys()
    assert digest(model) == before
    attention = small.blocks[1].attention
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (2, 3, 6)
    assert attention.scaling == 6**-0.5
    assert (attention.qkv.in_features, attention.qkv.out_features) == (12, 18)
    assert (small.config.hidden_size, small.config.num_heads, small.config.intermediate_size) == (12, 2, 10)
    assert small.config.vocab == 29
    assert attention.config is small.config  # every module agrees on it
    assert sum(p.numel() for p in small.parameters()) == analysis.parameter_count(half(analysis))


def test_the_result_tells_what_was_done(language) -> None:
    model, analysis = language
    note = shrunk(shrink(model, half(analysis), ids(), analysis=analysis))
    assert note.exact
    assert not note.padded
    assert note.difference < 1e-5
    assert replace(note, difference=0.0).equality == "equal to the masked model bit for bit"
    assert (
        replace(note, difference=2e-6).equality
        == "equal to the masked model within 2e-06 of its largest output"
    )
    assert len(note.checked) == 2
    assert note.index["embed.weight"][0] is None
    assert note.index["last.weight"][1].tolist() == list(range(0, 24, 2))
    assert {str(slot): pair for slot, pair in note.numbers.items()}["blocks.0.attention.split_size"] == (24, 6)
    assert str(note).startswith("Language: ")
    assert "heads of blocks.0.attention: 2 of 4" in str(note)
    with pytest.raises(UsageError, match=r"Language: not made by shrink"):
        shrunk(model)


@settings(max_examples=6)
@given(data=st.data())
@pytest.mark.thorough
def test_any_units_may_go_and_layers_may_differ(language, data) -> None:
    """Where one number would have to be two, the narrower axis holds zeroed units: the function is the masked one."""
    model, analysis = language
    keep = {
        u.name: sorted(data.draw(st.sets(st.integers(0, u.size - 1), min_size=1), label=u.name))
        for u in analysis.units
    }
    masks = analysis.masks(keep)
    small = shrink(model, masks, ids(), analysis=analysis)
    inputs = ids(3, 5)
    close(masked(model, masks)(inputs), small(inputs))
    note = shrunk(small)
    assert all(axis.width >= axis.kept for axis in note.axes)
    assert {axis.name: axis.kept for axis in note.axes} == {
        n: len(k) for n, k in keep.items() if len(k) < analysis[n].size
    }


def test_layers_that_differ_get_configurations_of_their_own(language) -> None:
    model, analysis = language
    names = [u.name for u in analysis.units if u.kind == "head"]
    small = shrink(model, {names[0]: [1], names[1]: [0, 2, 3]}, ids(), analysis=analysis)
    first, second = (block.attention for block in small.blocks)
    assert (first.num_heads, first.config.num_heads) == (1, 1)
    assert (second.num_heads, second.config.num_heads) == (3, 3)
    assert small.config.num_heads == 4  # no number is true of the whole
    assert first.config.hidden_size == second.config.hidden_size == 24
    assert model.blocks[0].attention.config is model.config
    assert model.config.num_heads == 4


def test_one_number_for_two_widths_is_refused_padded_or_left_to_the_program(language) -> None:
    model, analysis = language
    keep = {
        u.name: range(4 if u.kind == "qk dimension" else 2) for u in analysis.units if "dimension" in u.kind
    }
    keep = {name: kept for name, kept in keep.items() if "blocks.0" in name}
    assert len(keep) == 2
    with pytest.raises(UsageError) as caught:
        shrink(model, keep, ids(), analysis=analysis, fallback="refuse")
    words = str(caught.value)
    assert words.startswith(
        "v dimensions of blocks.0.attention: the modules cannot follow this axis: blocks.0.attention."
    )
    assert "4 for qk dimensions" in words
    assert "2 for v dimensions" in words
    assert 'fallback="program"' in words
    small = shrink(model, keep, ids(), analysis=analysis)
    (padded,) = shrunk(small).padded
    assert (padded.kind, padded.kept, padded.width) == ("v dimension", 2, 4)
    assert small.blocks[0].attention.head_dim == 4
    value = small.blocks[0].attention.qkv.weight.view(3, 4, 4, 24)[2]
    assert (value[:, 2:] == 0).all()
    program = shrink(model, keep, ids(), analysis=analysis, fallback="program")
    inputs = ids()
    close(masked(model, analysis.masks(keep))(inputs), program(inputs))


def test_a_number_written_in_the_forward_is_refused_by_name_or_held() -> None:
    def forward(self, x):
        b = len(x)
        return self.b((self.a(x).view(b, 4, 3) * self.scale).flatten(1))

    model = Net(forward, a=nn.Linear(5, 12), b=nn.Linear(12, 3), scale=nn.Parameter(torch.randn(4, 3)))
    analysis = analyse(model, (torch.randn(2, 5),))
    names = {u.size: u.name for u in analysis.units}
    with pytest.raises(UsageError, match=r"the modules cannot follow this axis: Net .*RuntimeError: shape"):
        shrink(model, {names[4]: [0, 2]}, torch.randn(2, 5), analysis=analysis, fallback="refuse")
    small = shrink(model, {names[4]: [0, 2]}, torch.randn(2, 5), analysis=analysis)
    assert shrunk(small).padded[0].width == 4
    x = torch.randn(3, 5)
    close(masked(model, analysis.masks({names[4]: [0, 2]}))(x), small(x))


def test_heads_that_would_be_cut_again_across_their_borders_are_never_returned() -> None:
    """A view with -1 runs with any width; only the numbers show that heads are mixed."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(12, 12) for name in "qkvo"}
    model = Net(forward, **parts)
    x = torch.randn(2, 5, 12)
    analysis = analyse(model, (x,))
    (heads,) = (u.name for u in analysis.units if u.kind == "head")
    with pytest.raises(UsageError, match=r"^heads of .*: the modules cannot follow this axis"):
        shrink(model, {heads: [0, 2]}, x, analysis=analysis, fallback="refuse")
    note = shrunk(shrink(model, {heads: [0, 2]}, x, analysis=analysis))
    assert [axis.width for axis in note.axes] == [4]


def test_a_scale_computed_from_the_width_stays_that_of_the_old_width() -> None:
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2) * self.width**-0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))

    model = Net(forward, width=6, **{name: nn.Linear(12, 12) for name in "qkvo"})
    x = torch.randn(2, 5, 12)
    analysis = analyse(model, (x,))
    keep = {u.name: range(4) for u in analysis.units if u.kind != "head"}
    small = shrink(model, keep, x, analysis=analysis, fallback="refuse")
    assert (small.width, small.width**-0.5) == (4, 6**-0.5)
    x = torch.randn(3, 4, 12)
    close(masked(model, analysis.masks(keep))(x), small(x))
    again = copy.deepcopy(small)
    assert again.width**-0.5 == 6**-0.5


def test_modes_gradients_types_and_formats_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 4, 1))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[0].weight.tag = "kept"
    model = model.to(memory_format=torch.channels_last).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    analysis = analyse(model, (x,))
    small = shrink(model, half(analysis), x, analysis=analysis)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert small.training
    assert not small[1].training
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert small[0].weight.dtype == torch.float64
    assert small[0].weight.tag == "kept"
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (small[0].out_channels, small[1].num_features, small[4].in_channels) == (4, 4, 4)
    assert small[1].running_mean.shape == (4,)


def test_half_precision_is_checked_in_float32() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)).to(torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    analysis = analyse(model, (x,))
    small = shrink(model, half(analysis), x, analysis=analysis)
    assert small[0].weight.dtype == torch.bfloat16
    assert shrunk(small).difference < 1e-5
    assert small[1].normalized_shape == (8,)


def test_norms_are_over_the_survivors_and_the_axis_is_called_approximate() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    analysis = analyse(model, (torch.randn(4, 6),))
    small = shrink(model, half(analysis), torch.randn(4, 6), analysis=analysis)
    note = shrunk(small)
    assert not note.exact
    assert "(approximate): mean and variance over it" in str(note)
    kept = torch.arange(0, 16, 2)
    x = torch.randn(5, 6)
    y = F.layer_norm(model[0](x)[:, kept], (8,), model[1].weight[kept], model[1].bias[kept])
    close(F.linear(y, model[2].weight[:, kept], model[2].bias), small(x))


def test_shrinking_twice_is_one_shrinking(language) -> None:
    model, analysis = language
    once = shrink(model, half(analysis, "feed-forward unit"), ids(), analysis=analysis)
    again = analyse(once, (ids(),))
    twice = shrink(once, half(again, "feed-forward unit", "head"), ids(), analysis=again)
    note = shrunk(twice)
    assert note.index["blocks.0.up.weight"][0].tolist() == list(range(0, 20, 4))
    assert note.parameters == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in twice.parameters()),
    )
    assert {str(s): pair for s, pair in note.numbers.items()}["blocks.1.up.out_features"] == (20, 5)


def test_recurrent_layers_follow() -> None:
    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

    for kind in (nn.LSTM, nn.GRU):
        model = Net(forward, rnn=kind(5, 12, batch_first=True), head=nn.Linear(12, 3))
        analysis = analyse(model, (torch.randn(2, 4, 5),))
        small = shrink(model, half(analysis), torch.randn(2, 4, 5), analysis=analysis)
        assert small.rnn.hidden_size == 6
        x = torch.randn(3, 6, 5)
        close(masked(model, analysis.masks(half(analysis)))(x), small(x))


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("hook", ["forward", "parametrization"])
def test_hooks_and_parametrizations_come_along(hook: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    if hook == "forward":
        model[1].register_forward_hook(lambda module, args, result: result * 2)
    else:
        nn.utils.parametrize.register_parametrization(model[0], "weight", Twice())
    x = torch.randn(4, 5)
    analysis = analyse(model, (x,))
    small = shrink(model, half(analysis), x, analysis=analysis)
    assert small[0].weight.shape == (4, 5)
    y = torch.randn(6, 5)
    close(masked(model, analysis.masks(half(analysis)))(y), small(y))


def test_what_slicing_would_lose_is_refused_by_name() -> None:
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    analysis = analyse(model, (x,))
    keep = half(analysis)
    with pytest.raises(UsageError, match=r"^fallback='prgram': nearest: program"):
        shrink(model, keep, x, analysis=analysis, fallback="prgram")
    with pytest.raises(UsageError, match=r"^'channels' is none of the 1 prunable axes"):
        shrink(model, {"channels": [0]}, x, analysis=analysis)
    with pytest.raises(UsageError, match=r"no unit is left of 8"):
        shrink(model, {next(iter(keep)): []}, x, analysis=analysis)
    handle = model[2].weight.register_hook(lambda grad: grad)
    with pytest.raises(UsageError, match=r"^2.weight: its gradient hook would be lost"):
        shrink(model, keep, x, analysis=analysis)
    handle.remove()
    with pytest.raises(UsageError, match=r"^0.weight: the model has no numbers \(meta device\)"):
        shrink(copy.deepcopy(model).to("meta"), keep, x)
    model[1].memory = model[0].weight * 2
    with pytest.raises(UsageError, match=r"^Sequential: the model cannot be copied .* nn.utils.prune.remove"):
        shrink(model, keep, x, analysis=analysis)


def test_an_output_that_says_nothing_cannot_prove_anything() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    x = torch.randn(4, 5)
    analysis = analyse(model, (x,))
    with pytest.raises(
        UsageError, match=r"^Sequential: the masked model's output does not depend on its inputs"
    ):
        shrink(model, half(analysis), x, analysis=analysis)


def test_masks_that_are_no_whole_units_name_the_layer_and_the_nearest_unit() -> None:
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    analysis = analyse(model, (x,))
    (name,) = (units.name for units in analysis.units)
    masks = {key: mask.clone() for key, mask in analysis.masks({name: [0, 1, 2, 4, 5, 6, 7]}).items()}
    masks["0.weight"][3, :2] = True  # the rest of unit 3 is gone
    with pytest.raises(UsageError) as caught:
        shrink(model, Masks(masks), x, analysis=analysis)
    words = "0.weight: 3 pruned weights, the first at (3, 2), are no whole units; nearest is unit 3 of 'feed-forward"
    assert str(caught.value).startswith(words)
    assert "7 of 9 weights are pruned" in str(caught.value)
    everything = Masks({key: torch.zeros_like(mask) for key, mask in masks.items()})
    with pytest.raises(UsageError, match=r"the masks remove all 8 units, first seen in .*; keep at least one"):
        shrink(model, everything, x, analysis=analysis)


def test_several_devices_and_quantized_modules_are_refused_by_name() -> None:
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    keep = {"feed-forward units of 0,2": [0, 1]}
    spread = copy.deepcopy(model)
    spread[2].to("meta")
    with pytest.raises(
        UsageError, match=r"^0\.weight is on cpu and 2\.weight on meta: the model lies on 2 devices"
    ):
        shrink(spread, keep, x)

    class Packed(nn.Linear):
        """Stands for torch's own, whose weights are packed."""

    Packed.__module__ = "torch.ao.nn.quantized.dynamic"
    packed = nn.Sequential(Packed(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UsageError, match=r"^0: Packed is quantized; its packed weights cannot be sliced"):
        shrink(packed, keep, x)

    class Integers(torch.Tensor):
        """Stands for a tensor that holds something else."""

    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Integers))
    with pytest.raises(
        UsageError, match=r"^0\.weight: an? \w+ cannot be sliced; shrink the plain float model first"
    ):
        shrink(model, keep, x)


def test_a_parametrization_that_looks_at_the_whole_weight_is_refused_by_name() -> None:
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(
        UsageError, match=r"the modules cannot follow this axis: Sequential computes something else"
    ):
        shrink(model, {"feed-forward units of 0,2": [0, 1]}, x)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3))
    found = analyse(normed, (x,))
    assert not found.units
    assert "bake the weight norm in before pruning" in str(found)


def test_like_axes_are_held_at_one_width_on_request(language) -> None:
    model, analysis = language
    names = [u.name for u in analysis.units if u.kind == "head"]
    keep = {names[0]: [1], names[1]: [0, 2, 3]}
    small = shrink(model, keep, ids(), analysis=analysis, homogeneous=True)
    assert [block.attention.num_heads for block in small.blocks] == [3, 3]
    assert small.config.num_heads == 3
    (axis,) = shrunk(small).padded
    assert (axis.name, axis.kept, axis.width, axis.reason) == (names[0], 1, 3, "equal widths were asked for")
    inputs = ids()
    close(masked(model, analysis.masks(keep))(inputs), small(inputs))
    whole = shrink(model, {names[0]: [1]}, ids(), analysis=analysis, homogeneous=True)
    assert [block.attention.num_heads for block in whole.blocks] == [4, 4]
    close(masked(model, analysis.masks({names[0]: [1]}))(inputs), whole(inputs))


class Adapted(nn.Module):
    """A layer with low-rank adapters in the way of the package peft."""

    def __init__(self, layer: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * 2.0


@pytest.mark.thorough
def test_adapters_beside_layers_are_sliced_with_them(language) -> None:
    model = copy.deepcopy(language[0])
    for block in model.blocks:
        block.attention.qkv, block.attention.out = Adapted(block.attention.qkv), Adapted(block.attention.out)
        block.up, block.down = Adapted(block.up), Adapted(block.down)
    analysis = analyse(model, (ids(),))
    keep = half(analysis, "head", "feed-forward unit")
    small = shrink(model, analysis.masks(keep), ids(), analysis=analysis)
    block = small.blocks[0]
    assert block.up.lora_B["default"].weight.shape == (10, 3)
    assert block.down.lora_A["default"].weight.shape == (3, 10)
    assert block.attention.qkv.lora_B["default"].weight.shape == (36, 3)
    assert not block.up.base_layer.weight.requires_grad
    assert block.up.lora_A["default"].weight.requires_grad
    inputs = ids()
    close(masked(model, analysis.masks(keep))(inputs), small(inputs))


class Talkative(nn.Module):
    """An answer with what is no tensor beside what is."""

    def __init__(self, wrap):
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(8, 12), nn.Linear(12, 3), wrap

    def forward(self, x):
        return self.wrap(self.second(self.first(x).relu()))


@pytest.mark.parametrize(
    ("wrap", "key"),
    [(lambda y: {"out": y, "aux": None, "steps": 3}, "out"), (lambda y: (y, None), 0)],
    ids=["mapping", "tuple"],
)
def test_answers_with_more_than_tensors(wrap, key):
    from secateur import magnitude, prune_
    from secateur.pattern import Neurons

    model, x = Talkative(wrap).eval(), torch.randn(5, 8)
    masks = prune_(model, 0.5, replace(magnitude, pattern=Neurons()), example=x)
    small = shrink(model, masks, x)
    assert small.first.out_features == 6
    assert torch.allclose(small(x)[key], model(x)[key], atol=1e-6)
