"""The real TensorBoard and the real Weights & Biases take what we send; each test needs its package and says so."""

from __future__ import annotations

import pytest
import torch

from secateur.report import Stage, figures, histogram, log_to

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own

WEIGHT = torch.where(torch.rand(64, 32) < 0.3, torch.zeros(()), torch.randn(64, 32))
FOUND = {"dense": [{"name": "perplexity", "value": 12.5, "unit": "1", "conditions": {}}]}


def sent(board, step):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which is not installed")
    stage = Stage("after", {"layer": histogram(WEIGHT)})
    log_to(board, step=step, measurements=FOUND, stage=stage, figures={"life": figures.histograms([stage])})


def test_tensorboard_reads_back_what_was_sent(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        sent(writer, 3)
    read = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    read.Reload()
    (scalar,) = read.Scalars("dense/perplexity")
    assert (scalar.step, scalar.value) == (3, 12.5)
    (found,) = read.Histograms("layer/after")
    held = found.histogram_value
    assert (found.step, held.num) == (3, WEIGHT.numel())
    assert sum(held.bucket) == WEIGHT.numel()
    assert held.min == pytest.approx(float(WEIGHT.min()))
    assert held.sum == pytest.approx(float(WEIGHT.double().sum()))
    (picture,) = read.Images("life")
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_weights_and_biases_offline_keeps_what_was_sent(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="secateur", mode="offline", dir=str(tmp_path))
    sent(run, 2)
    run.finish()  # what has a step is kept until then
    (log,) = tmp_path.rglob("run-*.wandb")
    written = log.read_bytes()
    assert b"dense/perplexity" in written
    assert b"layer/after" in written
    pictures = list(tmp_path.rglob("media/images/*.png"))
    assert len(pictures) == 1
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert b"histogram" in written
    assert b"life" in written
