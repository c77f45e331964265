"""Two processes that train one model: the same masks everywhere, the zeros held, the result of one process.

Each test starts two fresh Python processes joined by gloo; they write down what came out and this process compares.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("processes.py")


def run(kind: str, folder: Path, processes: int) -> list[dict[str, torch.Tensor]]:
    """What every process has at the end: whole weights, masks and what it saw on the way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    folder.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), kind, str(folder), str(rank), str(processes)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=1200)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def check(kind: str, tmp_path: Path) -> None:
    (alone,) = run("alone", tmp_path / "alone", 1)
    together = run(kind, tmp_path / kind, 2)
    for found in together:
        assert found["zeros"] == alone["zeros"]
        for name, mask in alone["masks"].items():
            assert torch.equal(found["masks"][name], mask), name
            assert not found["weights"][name].view(torch.int32)[~mask].any()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)
    for name, weight in together[0]["weights"].items():
        assert torch.equal(weight, together[1]["weights"][name]), name


@pytest.mark.slow
def test_ddp_equals_one_process(tmp_path):
    check("ddp", tmp_path)


@pytest.mark.slow
def test_fsdp_equals_one_process(tmp_path):
    check("fsdp", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_scores_of_different_data_agree_on_one_mask(kind, tmp_path):
    """Each process calibrates on its own batches; all prune what the first one says."""
    one, other = run(f"{kind}-data", tmp_path / kind, 2)
    for name, mask in one["masks"].items():
        assert torch.equal(mask, other["masks"][name])
        assert torch.equal(one["weights"][name] != 0, mask)
        assert torch.equal(other["weights"][name], one["weights"][name])


@pytest.mark.slow
def test_what_is_shared_out_resumes_and_grows(tmp_path):
    one, other = run("fsdp-state", tmp_path / "state", 2)
    for found in (one, other):
        assert found["same"]
        assert found["held"]
        assert found["moved"]
        assert found["kept"] == found["asked"]
    assert all(torch.equal(mask, other["masks"][name]) for name, mask in one["masks"].items())
