"""The native kernels: the torch path's answers on long data, at any number of threads; what is said without them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from secateur import global_magnitude, prune_
from secateur.core import native, select
from secateur.core.select import Magnitudes, kth_smallest, smallest

from ..library import BUILD
from .test_select import by_sorting

KINDS = {
    "normal": lambda n: torch.randn(n),
    "ties": lambda n: torch.randint(-2, 3, (n,)).float(),
    "constant": lambda n: torch.full((n,), -0.25),
    "two scales": lambda n: torch.cat([torch.randn(n // 2) * 1e-20, torch.randn(n - n // 2) * 1e20]),
    "sorted": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    "half pruned": lambda n: torch.where(torch.rand(n) < 0.5, -float("inf"), torch.rand(n)),
    "zeros of both signs": lambda n: torch.where(torch.rand(n) < 0.5, torch.rand(n).round(), -0.0),
    "periodic": lambda n: (torch.arange(n) % 64).float(),
}


@pytest.fixture
def opened(kernels, monkeypatch):
    """The kernels of this tree in use."""
    monkeypatch.setattr(native, "FILE", kernels)
    native._opened.cache_clear()
    yield
    monkeypatch.undo()
    native._opened.cache_clear()


@pytest.fixture
def threads():
    """Sets the number of threads; one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_long_row_is_marked_as_by_sorting(kind, absolute):
    """Lengths around the sizes at which the kernel changes its ways."""
    for size in (4096, 4097, (1 << 16) - 1, (1 << 16) + 5, (1 << 17) + 3):
        row = KINDS[kind](size)[None]
        scores = row.abs() if absolute else row
        for count in (0, 1, size // 3, size - 1, size):
            found = smallest(Magnitudes(row) if absolute else row, torch.tensor([count]))
            assert torch.equal(found, by_sorting(scores, torch.tensor([count]))), (size, count)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("units", [2, 3, 4, 8, 16, 100, 5000])
def test_many_rows_are_marked_as_by_sorting(units):
    for kind in ("normal", "ties", "half pruned"):
        scores = KINDS[kind](20_000 // units * units).reshape(-1, units)
        counts = torch.randint(0, units + 1, (scores.shape[0],))
        assert torch.equal(smallest(scores, counts), by_sorting(scores, counts))


@pytest.mark.usefixtures("opened")
def test_a_sample_that_misleads_costs_time_and_no_correctness():
    """Every element that the sample looks at is far from all others."""
    size = 1 << 16
    row = torch.rand(1, size)
    stride = (size // 1024) | 1
    row[0, ::stride] += 10
    for count in (1, size // 2, size - 3):
        assert torch.equal(smallest(row, torch.tensor([count])), by_sorting(row, torch.tensor([count])))


@pytest.mark.usefixtures("opened")
def test_threads_change_nothing(threads):
    scores = torch.randn(3, 300_000)
    scores[:, ::7] = scores[:, :1]
    counts = torch.tensor([1, 150_000, 299_999])
    rows = torch.randn(3000, 100).round(decimals=1)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(
            (
                smallest(scores, counts),
                smallest(rows, torch.full((3000,), 37)),
                native.between(scores, -0.1, 0.1)[2],
                kth_smallest([lambda: scores], 450_001),
            )
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:3], other[:3], strict=True))
        assert found[0][3] == other[3]


@pytest.mark.usefixtures("opened")
def test_pruning_is_the_same_on_both_paths(monkeypatch):
    def masks():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(96, 128) for _ in range(3)])
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_((layer.weight * 40).round() / 40)  # many ties
        return prune_(model, 0.37, global_magnitude)

    found = masks()
    monkeypatch.setenv("SECATEUR_NATIVE", "0")
    native._opened.cache_clear()
    assert native.path() == "torch (SECATEUR_NATIVE=0)"
    assert masks() == found


@pytest.mark.usefixtures("opened")
def test_between_counts_and_collects(monkeypatch):
    scores = torch.randn(200_001)
    monkeypatch.setattr(native, "MOST", 1 << 16)
    below, count, inside = native.between(scores, -0.5, 0.25)
    among = scores[(scores >= -0.5) & (scores <= 0.25)]
    assert (below, count) == (int((scores < -0.5).sum()), among.numel())
    assert torch.equal(inside, among)
    monkeypatch.setattr(native, "MOST", 64)  # of each chunk: what lies beyond is only counted
    assert native.between(scores, -0.5, 0.25) == (below, count, None)
    assert native.between(scores, 3.9, 4.0)[2] is not None
    monkeypatch.undo()
    monkeypatch.setattr(native, "ROOM", 100)
    assert native.between(scores, -0.5, 0.25) == (below, count, None)
    assert native.between(torch.empty(0), -1.0, 1.0)[:2] == (0, 0)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("count", [0, 1, 70_000, 131_071, 150_000, 199_999, 200_001])
def test_a_guess_changes_nothing(count):
    """Right, wrong or absurd, with ties that fill whole chunks and end within one."""
    torch.manual_seed(count)
    scores = (torch.randn(1, 200_001) * 2).round() / 2
    wanted = torch.zeros(200_001, dtype=torch.bool)
    wanted[scores[0].abs().sort(stable=True).indices[:count]] = True
    value = float(scores[0].abs().sort().values[max(count - 1, 0)])
    for guess in (None, value, value + 0.5, -1.0, float("inf")):
        found = native.smallest(scores, torch.tensor([count]), absolute=True, guess=guess)
        assert torch.equal(found[0], wanted), guess
        found = native.smallest(scores, torch.tensor([count]), absolute=True, guess=guess, others=True)
        assert torch.equal(~found[0], wanted), guess
        found = native.smallest(scores.abs(), torch.tensor([count]), guess=guess)
        assert torch.equal(found[0], wanted), guess


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("units", [2, 3, 4, 8, 16, 700, 5000])
def test_the_others_are_what_is_not_marked(units):
    scores = (torch.randn(37, units) * 2).round() / 2
    counts = torch.randint(0, units + 1, (37,))
    marked = native.smallest(scores, counts)
    assert torch.equal(native.smallest(scores, counts, others=True), ~marked)
    assert torch.equal(select.all_but_smallest(scores, counts), ~select.smallest(scores, counts))


@pytest.mark.usefixtures("opened")
def test_zero_leaves_what_is_kept_bit_for_bit():
    values = torch.randn(70_001)
    values[:3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    kept = torch.rand(70_001) < 0.5
    kept[:3] = torch.tensor([True, True, False])
    wanted = torch.where(kept, values.view(torch.int32), torch.tensor(0, dtype=torch.int32))
    native.zero(values, kept)
    assert torch.equal(values.view(torch.int32), wanted)


@pytest.mark.usefixtures("opened")
def test_only_what_the_kernels_can_read_goes_to_them():
    assert native.path() == "native kernels"
    assert native.serves(torch.zeros(3))
    assert not native.serves(torch.zeros(3, dtype=torch.float64))
    assert not native.serves(torch.zeros(3, device="meta"))


def test_without_a_library_the_torch_path_is_taken_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FILE", tmp_path / "kernels.native.so")
    try:
        native._opened.cache_clear()
        assert native.path().startswith("torch (the native kernels were not built; a C++ compiler")
        assert not native.serves(torch.zeros(3))
        native.FILE.write_bytes(b"not a library")
        native._opened.cache_clear()
        assert native.path().startswith("torch (the native kernels do not load: ")
        assert select.smallest(torch.tensor([[2.0, 1.0]]), torch.tensor([1])).tolist() == [[False, True]]
    finally:
        monkeypatch.undo()
        native._opened.cache_clear()


def test_a_library_of_another_version_is_not_used(kernels, monkeypatch):
    monkeypatch.setattr(native, "FILE", kernels)
    current = native.ABI
    monkeypatch.setattr(native, "ABI", 99)
    try:
        native._opened.cache_clear()
        assert (
            native.path() == f"torch (the native kernels are of version {current}, expected 99; install again)"
        )
    finally:
        monkeypatch.undo()
        native._opened.cache_clear()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SECATEUR_NATIVE": "0"}, "SECATEUR_NATIVE=0"),
        ({"CXX": "/nowhere/c++"}, "/nowhere/c++ cannot be run ("),
        ({"CXX": "false"}, "false failed:"),
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler (c++, g++ or clang++) was found"),
    ],
)
def test_what_is_not_built_has_a_reason_and_leaves_the_old_one(tmp_path, monkeypatch, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    target: Path = tmp_path / "kernels.native.so"
    target.write_text("old")
    said = runpy.run_path(str(BUILD))["build"](target)
    assert said.startswith(reason)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.native.so"]
