"""Layers are met once, in the order of use, with the statistics of what really reaches them."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core import visit as module
from secateur.core.statistics import STATISTICS, gather
from secateur.core.visit import merge, visit
from secateur.core.where import layers
from secateur.errors import NumericError, UsageError

NAMES = ["second_moment", "input_norm"]


class Attention(nn.Module):
    """Three projections of one input, then a fourth."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, attention_mask=None):
        return self.o(torch.relu(self.q(x)) * self.k(x) + self.v(x))


def visited(model, data, names=NAMES, at=lambda layer, known: None, chosen=None):
    """Layer name -> statistics, in the order of the visits."""
    found = {}

    def keep(layer, known):
        assert layer.name not in found
        found[layer.name] = {name: value.clone() for name, value in known.items()}
        at(layer, known)

    visit(model, layers(model) if chosen is None else chosen, names, data, keep)
    return found


def test_the_same_statistics_as_gathered_when_nothing_is_changed():
    model, data = Attention(), [torch.randn(2, 5, 6) for _ in range(3)]
    every = list(STATISTICS)
    together = gather(model, layers(model), every, data)
    for name, known in visited(model, data, every).items():
        for statistic in every:
            torch.testing.assert_close(known[statistic], together[name][statistic])


def test_layers_that_share_their_input_share_one_computation(monkeypatch):
    made = []
    real = module.Sums
    monkeypatch.setattr(module, "Sums", lambda names, layer: made.append(layer.name) or real(names, layer))
    found = visited(Attention(), [torch.randn(3, 4, 6)])
    assert list(found) == ["q.weight", "k.weight", "v.weight", "o.weight"]
    assert made == ["q.weight", "o.weight"]
    assert torch.equal(found["q.weight"]["second_moment"], found["v.weight"]["second_moment"])


def test_an_input_changed_in_place_is_another_input():
    class Tricky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(2))

    found = visited(Tricky(), [torch.randn(5, 3)])
    torch.testing.assert_close(found["b.weight"]["second_moment"], 4 * found["a.weight"]["second_moment"])


def test_convolutions_with_other_kernels_have_their_own_statistics():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 3, 3), nn.Conv1d(2, 3, 5)

        def forward(self, x):
            return self.a(x).mean() + self.b(x).mean()

    found = visited(Two(), [torch.randn(4, 2, 9)])
    assert found["a.weight"]["second_moment"].shape == (1, 6, 6)
    assert found["b.weight"]["second_moment"].shape == (1, 10, 10)


def test_every_layer_meets_the_pruned_stream():
    """Two layers: what reaches the second comes out of the first as it is after the visit."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    first, x = model[0], torch.randn(20, 4)
    dense = torch.relu(first(x)).detach()

    def halve(layer, known):
        layer.weight[:, ::2] = 0

    found = visited(model, [x], at=halve)
    sparse = torch.relu(first(x)).detach()
    torch.testing.assert_close(found["2.weight"]["second_moment"][0], sparse.t() @ sparse)
    assert not torch.allclose(found["2.weight"]["second_moment"][0], dense.t() @ dense)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=10)
def test_padding_and_batching_do_not_matter(lengths, extra):
    model = Attention()
    texts = [torch.randn(n, 6) for n in lengths]
    longest = max(lengths) + extra
    x = torch.full((len(texts), longest, 6), 1e3)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        x[row, : len(text)], mask[row, : len(text)] = text, 1
    padded = visited(model, [{"x": x, "attention_mask": mask}])
    apart = [{"x": t[None], "attention_mask": torch.ones(1, len(t), dtype=torch.long)} for t in texts]
    for name, known in visited(model, apart).items():
        torch.testing.assert_close(known, padded[name], rtol=1e-4, atol=1e-4)


def test_many_tokens_are_counted_piece_by_piece(monkeypatch):
    model, x = Attention(), torch.randn(7, 5, 6)
    whole = visited(model, [x])
    monkeypatch.setattr(module, "TOKENS", 4)
    for name, known in visited(model, [x]).items():
        torch.testing.assert_close(known, whole[name])


def test_half_precision_is_summed_in_float32():
    model, x = Attention().bfloat16(), torch.randn(50, 6, 6).bfloat16()
    known = visited(model, [x])["q.weight"]["second_moment"]
    flat = x.reshape(-1, 6).double()
    assert known.dtype == torch.float32
    torch.testing.assert_close(known[0].double(), flat.t() @ flat, rtol=1e-5, atol=1e-3)


def test_what_was_used_is_let_go():
    """At each layer only its own statistics are alive, and its input is not held by the visit."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    alive = []

    def look(layer, known):
        assert [ref() is not None for ref in alive] == [False] * len(alive)
        alive.append(weakref.ref(known["second_moment"]))

    inputs = []
    for layer in model:
        layer.register_forward_hook(lambda m, args, out: inputs.append(weakref.ref(args[0])))
    visit(model, layers(model), NAMES, [torch.randn(3, 4)], look)
    assert not any(ref() is not None for ref in [*alive, *inputs[1:]])


def test_the_pass_ends_at_the_last_layer_and_leaves_no_trace():
    calls = []

    class Head(nn.Module):
        def forward(self, x):
            calls.append("head")
            return x

    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3), Head())
    model[1].eval()
    data, state = [torch.randn(2, 3)], torch.get_rng_state()
    assert list(visited(model, data)) == ["0.weight", "2.weight"]
    assert calls == []
    assert [m.training for m in model] == [True, False, True, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.randn(2, 3))
    assert calls == ["head"]


def test_inference_mode_of_the_caller_is_no_obstacle():
    with torch.inference_mode():
        found = visited(Attention(), [torch.randn(2, 3, 6)])
    assert len(found) == 4


def test_a_layer_that_is_used_twice_is_visited_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    assert list(visited(Twice(), [torch.randn(4, 3)])) == ["a.weight", "b.weight"]


def test_nothing_to_visit_is_no_work():
    visit(nn.Linear(2, 2), [], NAMES, [torch.randn(1, 2)], lambda layer, known: None)


def test_a_layer_out_of_reach():
    model = Attention()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(
        UsageError, match=r'spare.weight: no calibration token reached this layer. Skip .*skip="spare'
    ):
        visited(model, [torch.randn(1, 2, 6)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_layer_that_meets_nan_is_named(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].bias.data[1] = bad
    with pytest.raises(NumericError, match=r"1.weight: NaN or Inf among its input activations"):
        visited(model, [torch.randn(4, 3)])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_merging_tensors_pairs_and_one_batch():
    a, b = torch.randn(2, 3), torch.randn(1, 3)
    assert torch.equal(merge([a, b]), torch.cat([a, b]))
    assert torch.equal(merge([(a, 1), (b, 2)]), torch.cat([a, b]))
    assert merge(iter([a])) is a


def test_merging_pads_whatever_has_the_shape_of_the_mask():
    short = {
        "input_ids": torch.tensor([[5]]),
        "embedded": torch.ones(1, 1, 2),
        "size": torch.ones(1, 4),
        "flag": True,
    }
    long = {
        "input_ids": torch.tensor([[7, 8, 9]]),
        "embedded": torch.ones(1, 3, 2),
        "size": torch.ones(1, 4),
        "flag": True,
    }
    found = merge([{**short, "labels": 1}, {**long, "attention_mask": torch.tensor([[1, 1, 0]])}])
    assert found["input_ids"].tolist() == [[5, 0, 0], [7, 8, 9]]
    assert found["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert found["embedded"].shape == (2, 3, 2)
    assert found["size"].shape == (2, 4)
    assert found["flag"] is True
    assert "labels" not in found
    hidden = [
        {"src": torch.ones(1, n, 2), "src_key_padding_mask": torch.zeros(1, n, dtype=torch.bool)}
        for n in (1, 2)
    ]
    assert merge(hidden)["src_key_padding_mask"].tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data holds no batch"),
        ({"x": torch.ones(1, 2)}, r"data is one batch; .* such as \[batch\]"),
        ([torch.ones(1, 2), {"x": torch.ones(1, 2)}], "some calibration batches are mappings"),
        ([{"x": torch.ones(1, 2)}, {"y": torch.ones(1, 2)}], "differ in what they hold: .*'x'.*'y'"),
        ([torch.ones(1, 2), torch.ones(1, 3)], r"differ in shape, inputs: \[\(2,\), \(3,\)\]"),
        ([torch.ones(1, 2).long(), torch.ones(1, 3).long()], "rows of tokens with an attention_mask"),
        ([{"x": torch.ones(1), "n": 1}, {"x": torch.ones(1), "n": 2}], "differ in 'n', which is no tensor"),
    ],
)
def test_batches_that_cannot_be_joined(data, message):
    with pytest.raises(UsageError, match=message):
        merge(data)
