"""The threshold study: its stages counted anew, its files, and data that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from secateur.errors import InputError, UsageError
from secateur.folder import verify
from secateur.study.threshold import Images, Plan, images, network, study

from ..tiny import Secateur

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def stages():
    given = images(None, samples=600)
    return study(given, Plan(2, loop_tau=0.02, sweep=(0.05, 0.1, 0.2)), lambda *_: None)


def test_the_stages_of_a_life(stages):
    assert [stage.name for stage in stages] == [
        "initial",
        "trained",
        "trained, τ = 0.02 in the loop",
        "trained, 20 % in the loop",
        *(f"pruned at τ = {tau}" for tau in (0.05, 0.1, 0.2, 0.4)),
    ]
    initial, trained, by_tau, by_share, *pruned = stages
    assert {name: held.n for name, held in initial.histograms.items()} == {
        "convolution 1": 144,
        "convolution 2": 4608,
        "feed-forward": 32768,
        "classification head": 640,
    }
    assert initial.zeros == trained.zeros == 0
    for name, held in by_share.histograms.items():
        assert held.zeros == round(0.2 * held.n), name
    for held in by_tau.histograms.values():
        assert held.count_up_to(0.02).low == held.zeros  # no bin below tau holds anything but zeros
    assert by_tau.zeros > 0
    for stage in pruned:
        assert stage.tau is not None
        for name, held in stage.histograms.items():
            before = trained.histograms[name].count_up_to(stage.tau)
            assert before.low <= held.zeros <= before.high
    assert [stage.zeros for stage in pruned] == sorted(stage.zeros for stage in pruned)
    assert trained.accuracy.value > initial.accuracy.value + 0.3


@pytest.mark.thorough
def test_the_command_writes_a_report_and_pictures(monkeypatch, capsys, tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    parts = {
        f"x_{part}": rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        for part, n in (("train", 300), ("test", 60))
    }
    parts |= {f"y_{part}": rng.integers(0, 10, n, dtype=np.uint8) for part, n in (("train", 300), ("test", 60))}
    np.savez(tmp_path / "mnist.npz", **parts)
    secateur, out = Secateur(monkeypatch, capsys), tmp_path / "out"
    asked = (
        "study",
        "threshold",
        "--data",
        tmp_path / "mnist.npz",
        "--samples",
        200,
        "--epochs",
        1,
        "--sweep",
        "0.1",
    )
    said = secateur(*asked, "--out", out, "--json")
    assert said.code == 0, said
    told = json.loads((out / "study.json").read_text())
    assert [row["stage"] for row in told["stages"]] == [row["stage"] for row in said.json["stages"]]
    assert told["data"] == "mnist"
    assert {path.name for path in out.iterdir()} >= {"report.html", "life-cycle.png", "sweep.png", "study.json"}
    assert (out / "life-cycle.png").read_bytes().startswith(b"\x89PNG")
    assert "Every layer at every stage" in (out / "report.html").read_text()
    assert verify(out) == []
    assert "expected numbers with commas" in secateur.refused(2, *asked[:-1], "a", "--out", tmp_path / "b")
    assert "no such file" in secateur.refused(
        2, "study", "threshold", "--data", "x.npz", "--out", tmp_path / "b"
    )


def broken(**more) -> dict:
    good = {"x_train": np.zeros((9, 8, 8), np.uint8), "y_train": np.zeros(9, np.uint8)}
    good |= {"x_test": np.zeros((3, 8, 8), np.uint8), "y_test": np.zeros(3, np.uint8)}
    return {key: value for key, value in (good | more).items() if value is not None}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"x_train": None}, "is no .npz file of pictures"),
        ({"y_train": np.array([{}] * 9, dtype=object)}, "is no .npz file of pictures"),
        ({"x_train": np.zeros((9, 8, 8), np.float32)}, "expected uint8"),
        ({"x_train": np.zeros((9, 8, 9), np.uint8)}, "expected uint8"),
        ({"y_test": np.zeros(2, np.uint8)}, "expected uint8"),
        ({"y_test": np.full(3, 11, np.uint8)}, "has the class 11; expected 0 to 9"),
        ({"x_test": np.zeros((3, 9, 9), np.uint8)}, "are of different sizes"),
    ],
)
def test_files_that_hold_no_pictures(tmp_path, more, said):
    np.savez(tmp_path / "data.npz", **broken(**more))
    with pytest.raises(InputError, match=said):
        images(tmp_path / "data.npz")


def test_both_spellings_of_the_arrays_are_read(tmp_path):
    held = broken(x_train=np.full((9, 8, 8), 51, np.uint8))
    words = {
        "x_train": "train_images",
        "y_train": "train_labels",
        "x_test": "test_images",
        "y_test": "test_labels",
    }
    np.savez(tmp_path / "data.npz", **{words[key]: value for key, value in held.items()})
    x, y = images(tmp_path / "data.npz").train
    assert (x.shape, y.shape, float(x.unique())) == ((9, 1, 8, 8), (9,), pytest.approx(0.2))


def test_other_files_and_plans(tmp_path):
    (tmp_path / "data.npz").write_text("no")
    with pytest.raises(InputError, match=r"is no \.npz file"):
        images(tmp_path / "data.npz")
    x, y = torch.zeros(4, 1, 8, 8), torch.zeros(4).long()
    for plan in (Plan(0), Plan(1, tau=-1), Plan(1, loop_percentile=101), Plan(1, sweep=(float("inf"),))):
        with pytest.raises(UsageError, match="expected at least 1 epoch"):
            study(Images("a", (x, y), (x, y)), plan, lambda *_: None)
    assert network(28)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
