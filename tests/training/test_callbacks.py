"""The callbacks step with the optimizer, save and restore, and need nothing of Lightning."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import Gradual, LightningCallback, linear, magnitude, trainer_callback
from secateur.errors import InputError, UsageError

from .support import check_zeros, loss_of, network


def make(model, optimizer, steps):
    return Gradual(model, magnitude, linear(0.2, 0.8), 1, steps - 1, 1, optimizer=optimizer)


def lightning(model: nn.Module, steps: int) -> types.SimpleNamespace:
    """As much of Lightning's trainer as the callback looks at."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return types.SimpleNamespace(global_step=0, optimizers=[optimizer], estimated_stepping_batches=steps)


def run(callback, trainer, model, batches: range, accumulate: int = 1) -> None:
    for number in batches:
        loss_of(model, number).backward()
        if (number + 1) % accumulate == 0:
            trainer.optimizers[0].step()
            trainer.optimizers[0].zero_grad()
            trainer.global_step += 1
        callback.on_train_batch_end(trainer, model, None, None, number)


def test_lightning_accumulated_batches_count_once():
    model = network()
    trainer, callback = lightning(model, 4), LightningCallback(make)
    callback.on_train_start(trainer, model)
    run(callback, trainer, model, range(8), accumulate=2)
    assert callback.pruner.steps == 4
    assert callback.pruner.done
    check_zeros(model, callback.pruner.masks)


def test_lightning_restores_before_training_begins():
    model = network()
    trainer, callback = lightning(model, 6), LightningCallback(make)
    assert callback.state_dict() == {}
    callback.on_train_start(trainer, model)
    run(callback, trainer, model, range(3))
    again = LightningCallback(make)
    again.load_state_dict(callback.state_dict())
    callback.pruner.remove()
    again.on_train_start(trainer, model)
    assert again.pruner.steps == 3
    assert again.pruner.masks == callback.pruner.masks
    run(again, trainer, model, range(3, 6))
    assert again.pruner.done
    check_zeros(model, again.pruner.masks)


def test_lightning_finds_every_hook_and_nothing_else():
    callback = LightningCallback(make)
    assert callback.state_key == "secateur"
    assert callback.setup(None, None, stage="fit") is None
    assert callback.on_some_hook_of_a_later_version(1, 2) is None
    with pytest.raises(AttributeError, match="LightningCallback has no attribute 'optimise'"):
        _ = callback.optimise


def test_lightning_training_without_an_end():
    model = network()
    trainer = lightning(model, 3)
    trainer.estimated_stepping_batches = float("inf")
    with pytest.raises(UsageError, match="this training takes inf steps; a schedule needs an end"):
        LightningCallback(make).on_train_start(trainer, model)


def trainer_state(step: int, steps: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=True)


def arguments(folder: Path) -> types.SimpleNamespace:
    return types.SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None)


def test_trainer_saves_restores_and_ends_with_zeros(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callback = trainer_callback(make)
    callback.on_train_begin(arguments(tmp_path), trainer_state(0, 6), None, model=model, optimizer=optimizer)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        callback.on_step_end(arguments(tmp_path), trainer_state(step + 1, 6), None)
    (tmp_path / "checkpoint-3").mkdir()
    callback.on_save(arguments(tmp_path), trainer_state(3, 6), None)
    assert [file.name for file in (tmp_path / "checkpoint-3").iterdir()] == ["secateur.pt"]
    masks = callback.pruner.masks
    callback.pruner.remove()

    again = trainer_callback(make)
    again.on_train_begin(arguments(tmp_path), trainer_state(3, 6), None, model=model, optimizer=optimizer)
    assert again.pruner.steps == 3
    assert again.pruner.masks == masks
    with torch.no_grad():
        model[3].weight.fill_(1.0)  # as if an earlier checkpoint had been the best
    again.on_train_end(arguments(tmp_path), trainer_state(6, 6), None, model=model)
    check_zeros(model, masks)


def test_trainer_resumed_from_what_it_never_wrote(tmp_path):
    model = network()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    state = trainer_state(3, 6)
    with pytest.raises(UsageError, match="written without the pruning callback, or lies elsewhere"):
        trainer_callback(make).on_train_begin(arguments(tmp_path), state, None, **given)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "secateur.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match="no readable state of pruning"):
        trainer_callback(make).on_train_begin(arguments(tmp_path), state, None, **given)
