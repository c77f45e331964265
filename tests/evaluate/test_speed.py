"""No time is asserted: a clock that the tests wind themselves shows what is measured and in what order."""

import statistics

import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.evaluate import latency, paired_latency, throughput


class Clock:
    """A clock that only moves when a model works."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("time.perf_counter", made)
    return made


class Worker(nn.Module):
    """Takes the next of `seconds` for every call."""

    def __init__(self, clock, name, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.5)
        self.clock, self.name, self.seconds, self.calls = clock, name, list(seconds), 0

    def forward(self, x, y=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.clock.now += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        self.clock.log.append(self.name)
        return self.drop(x) * self.weight

    def generate(self, ids, **options):
        self.clock.now += 2.0
        self.options = options
        return ids


def test_latency_is_the_median_with_the_interquartile_spread(clock):
    model = Worker(clock, "m", [100, 0.001, 0.002, 0.003, 0.004, 0.010]).train()
    found = latency(model, torch.ones(4, 3), repeats=5, warmup=1)
    assert model.calls == 6
    assert (found.name, found.unit) == ("latency", "ms")
    assert found.value == pytest.approx(3.0)
    assert (found.spread.low, found.spread.high) == pytest.approx((2.0, 4.0))
    assert (found.spread.kind, found.spread.repeats) == ("interquartile", 5)
    assert found.conditions["batch"] == 4
    assert found.conditions["threads"] == torch.get_num_threads()
    assert {"cpu", "torch", "dtype", "device"} <= set(found.conditions)
    assert model.training


def test_one_repeat_has_a_spread_of_nothing(clock):
    found = latency(Worker(clock, "m", [0.5]), {"x": torch.ones(2), "y": None}, repeats=1, warmup=0)
    assert (found.value, found.spread.low, found.spread.high) == pytest.approx((500, 500, 500))
    assert found.conditions["batch"] == 2


def test_paired_models_take_turns_and_the_speedup_is_taken_within_rounds(clock):
    # The machine slows down tenfold in the second half: each round still says that b is twice as fast.
    slow = [0.1] * 5 + [1.0] * 5
    a, b = Worker(clock, "a", slow), Worker(clock, "b", [t / 2 for t in slow])
    found = paired_latency({"dense": a, "pruned": b}, torch.ones(1, 2), repeats=8, warmup=2)
    assert clock.log == ["a", "b", "b", "a"] * 5
    assert set(found.latency) == {"dense", "pruned"}
    assert set(found.speedup) == {"pruned"}
    speedup = found.speedup["pruned"]
    assert (speedup.value, speedup.spread.low, speedup.spread.high) == pytest.approx((2, 2, 2))
    assert speedup.conditions["over"] == "dense"
    assert speedup.conditions["model"] == "pruned"
    assert found.latency["dense"].value == pytest.approx(1000 * statistics.median(slow[2:]))
    assert found.latency["dense"].spread.repeats == 8


def test_every_model_comes_first_equally_often(clock):
    models = {name: Worker(clock, name, [0.1]) for name in "abc"}
    paired_latency(models, torch.ones(1), repeats=6, warmup=0)
    assert sorted(clock.log[::3]) == ["a", "a", "b", "b", "c", "c"]


def test_throughput_of_reading_counts_every_token(clock):
    model = Worker(clock, "m", [0.5, 0.25, 1.0])
    found = throughput(model, torch.zeros(2, 10), repeats=3, warmup=0)
    assert (found.value, found.unit) == (pytest.approx(40), "tokens/s")
    assert found.conditions["method"] == "forward pass"
    assert (found.conditions["prompt"], found.conditions["batch"]) == (10, 2)


def test_throughput_of_writing_counts_new_tokens_only(clock):
    model = Worker(clock, "m", [0.0])
    found = throughput(model, torch.zeros(3, 10), new_tokens=4, repeats=2)
    assert found.value == pytest.approx(3 * 4 / 2.0)
    assert (model.options["min_new_tokens"], model.options["max_new_tokens"]) == (4, 4)
    assert model.options["do_sample"] is False
    assert found.conditions["method"] == "greedy generation"


def test_a_real_model_generates_exactly_the_tokens_that_are_counted(gpt2, monkeypatch):
    made = []
    real = type(gpt2).generate
    monkeypatch.setattr(type(gpt2), "generate", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    found = throughput(gpt2, torch.zeros(2, 5, dtype=torch.long), new_tokens=7, repeats=1, warmup=0)
    assert made[0].shape == (2, 12)
    assert found.value > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: latency(m, torch.ones(1), repeats=0),
            "expected repeats >= 1 and warmup >= 0, got repeats=0",
        ),
        (
            lambda m: latency(m, torch.ones(1), warmup=-1),
            "expected repeats >= 1 and warmup >= 0, got repeats=20, war",
        ),
        (
            lambda m: paired_latency({"a": m}, torch.ones(1)),
            "a paired latency compares at least two models, got 1",
        ),
        (
            lambda m: paired_latency({"a": m, "b": m}, torch.ones(1), repeats=1),
            "a speed-up needs its spread, so at",
        ),
        (
            lambda m: paired_latency({"a": m, "b": nn.Linear(1, 1, device="meta")}, torch.ones(1)),
            r"the models lie on different devices \(cpu, meta\); move them together",
        ),
        (
            lambda m: throughput(m, torch.ones(3)),
            r"throughput needs ids of shape \(batch, tokens\), got \(3,\)",
        ),
        (lambda m: throughput(m, torch.ones(3, 1), new_tokens=0), "new_tokens must be at least 1, got 0"),
        (
            lambda m: throughput(m, torch.ones(3, 1), new_tokens=2),
            r"Linear has no generate\(\); leave new_tokens=",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UsageError, match=message):
        call(nn.Linear(1, 1))
