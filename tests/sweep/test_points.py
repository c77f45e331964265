"""Points of a sweep: every combination, each with its own folder, and errors that name the line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.sweep import AXES, read_sweep, sweep

FILE = """\
model: own.py:build
train: own.py:train
stages:
  - prune: {allocate: global}
  - fine-tune: {lr: 1e-2}
sweep:
  method: [magnitude, random]
  sparsity: [0.3, 0.5]
  only: [all, "0"]
  epochs: [0, 2]
  seed: [0, 1]
"""


def test_every_combination_is_a_point(tmp_path):
    (tmp_path / "s.yaml").write_text(FILE)
    found = read_sweep(tmp_path / "s.yaml")
    assert list(found.axes) == ["method", "sparsity", "only", "epochs", "seed"]
    wanted = itertools.product(["magnitude", "random"], [0.3, 0.5], ["all", "0"], [0, 2], [0, 1])
    assert [tuple(point.at.values()) for point in found.points] == list(wanted)
    first, last = found.points[0].experiment, found.points[-1].experiment
    assert first.plain() == {
        "model": "own.py:build",
        "train": "own.py:train",
        "seed": 0,
        "stages": [{"prune": {"allocate": "global", "method": "magnitude", "sparsity": 0.3}}],
    }
    assert last.common.seed == 1
    assert [stage.name for stage in last.stages] == ["prune", "fine-tune"]
    assert last.stages[0].settings.asked.only == ("0",)
    assert (last.stages[1].settings.epochs, last.stages[1].settings.lr) == (2, 0.01)
    assert found.points[0].name.startswith("magnitude-0.3-all-0-s0-")
    assert len({point.name for point in found.points}) == len(found.points)


@given(
    st.dictionaries(
        st.sampled_from(["sparsity", "seed", "epochs"]), st.sets(st.integers(0, 5), min_size=1), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_the_number_of_points_is_the_product(axes):
    axes = {
        k: [v / 8 for v in vs] if k == "sparsity" else [v + (k == "epochs") for v in vs]
        for k, vs in axes.items()
    }
    axes = {"sparsity": [0.5]} | axes
    found = sweep({"model": "a.py:b", "sweep": axes})
    number = 1
    for values in axes.values():
        number *= len(values)
    assert len(found.points) == len({p.name for p in found.points}) == number


def test_names_tell_experiments_apart_and_are_safe():
    odd = ["</script>", "../../up", "層", "w" * 300]
    one = sweep({"model": "a.py:b", "sweep": {"sparsity": 0.5, "only": odd}})
    two = sweep({"model": "c.py:d", "sweep": {"sparsity": 0.5, "only": odd}})
    names = [point.name for point in (*one.points, *two.points)]
    assert len(set(names)) == 8
    for name in names:
        assert name.isascii()
        assert not set(name) & set("/\\<>\0 ")
        assert len(name) < 100
        assert not name.startswith(".")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("  sparsity: [0.3, 0.5]", "  sparsty: [0.3]"), "s.yaml, line 8: sparsty is no axis; nearest: sparsity"),
        (("0.3, 0.5", "0.3, 50"), r"s.yaml, line 8: sparsity: 50 is not in \[0, 1\]. Did you mean 0.5"),
        (("[0.3, 0.5]", "\n    - 0.3\n    - 1.5"), "s.yaml, line 10: sparsity"),
        (("magnitude, random", "magnitude, wandaa"), "s.yaml, line 7: .*nearest: wanda"),
        (("[0.3, 0.5]", "[]"), "s.yaml, line 8: sparsity is an empty list"),
        (("0.3, 0.5", "0.3, 0.3"), "s.yaml, line 8: sparsity has 0.3 twice"),
        (("allocate: global", "sparsity: 0.1"), "s.yaml, line 4: sparsity is swept over"),
        (("  - fine-tune: {lr: 1e-2}\n", ""), "line 9: epochs is a setting of a stage fine-tune, and there are 0"),
        (("model:", "modle:"), "s.yaml, line 1: modle is no setting"),
        (("  method: [magnitude, random]", "  pattern: ['2:4']"), "s.yaml, line 7: pattern 2:4, sparsity 0.3"),
        (("seed: [0, 1]", "seed: [0, -1]"), "s.yaml, line 11: seed"),
        (("epochs: [0, 2]", "epochs: [-1]"), "s.yaml, line 10: epochs"),
        (("sweep:", "sweeps:"), "a sweep is an experiment with a mapping sweep"),
    ],
)  # fmt: skip
def test_errors_name_the_line(tmp_path, change, said):
    assert change[0] in FILE
    (tmp_path / "s.yaml").write_text(FILE.replace(*change))
    with pytest.raises(UsageError, match=said):
        read_sweep(tmp_path / "s.yaml")


def test_lists_of_the_command_line_take_the_place_of_the_files(tmp_path):
    (tmp_path / "s.yaml").write_text(FILE)
    found = read_sweep(tmp_path / "s.yaml", {"model": "b.py:c", "sweep": {"sparsity": [0.9], "seed": [7]}})
    assert {point.at["sparsity"] for point in found.points} == {0.9}
    assert {point.experiment.common.seed for point in found.points} == {7}
    assert {point.experiment.common.model for point in found.points} == {"b.py:c"}
    with pytest.raises(UsageError, match=r"^command line: sparsity: 90"):  # not the line of another value
        read_sweep(tmp_path / "s.yaml", {"sweep": {"sparsity": [90]}})


def test_too_many_points_and_no_stage():
    with pytest.raises(UsageError, match="10,001 points"):
        sweep({"model": "a.py:b", "sweep": {"seed": list(range(10_001)), "sparsity": 0.5}})
    with pytest.raises(UsageError, match="no stage is left"):
        sweep({"model": "a", "stages": ["fine-tune"], "sweep": {"epochs": [0]}})
    assert "seed" in AXES


@pytest.mark.parametrize(("name", "number"), [("sparsity", 15), ("methods", 9), ("layers", 12), ("epochs", 12)])
def test_the_classic_experiments(name, number):
    found = read_sweep(Path(__file__).parents[2] / "examples" / "sweeps" / f"{name}.yaml")
    assert len(found.points) == number
    for point in found.points:
        assert all(axis in AXES for axis in point.at)
        assert point.experiment.stages[0].name == "train"
