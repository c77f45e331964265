"""Pruning inside other people's training loops: transformers' Trainer and Lightning.

Both make the optimizer themselves and know only then how many steps they will take. So the callback is given a function
that makes the pruner, and calls it when training begins:

    def make(model, optimizer, steps):
        return Gradual(model, magnitude, cubic(0.0, 0.9), 0, steps // 2, steps // 20, optimizer=optimizer)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core.hold import unwrapped
from secateur.errors import InputError, UsageError

__all__ = ["LightningCallback", "trainer_callback"]

# (model, optimizer or optimizers, steps of the whole training) -> anything with step(), state_dict(), load_state_dict()
Make = Callable[[nn.Module, Any, int], Any]
FILE = "secateur.pt"


def trainer_callback(make: Make) -> Any:
    """A callback for `transformers.Trainer`: `Trainer(..., callbacks=[trainer_callback(make)])`.

    The pruner steps with the optimizer, however many batches are accumulated; its state lies in every checkpoint and
    is read again when the training is resumed. When training ends its masks are applied once more, because
    `load_best_model_at_end` may have brought back weights from before they were pruned. It is the callback's
    `pruner`, once training has begun.

    Args:
        make: `(model, optimizer, steps) -> pruner`, such as a `Gradual`; called when training begins.

    Raises:
        UsageError: transformers is not installed; a resume from a checkpoint that was made without it.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise UsageError("a callback for Trainer needs transformers: pip install 'secateur[hf]'") from None

    class Pruning(TrainerCallback):
        """Steps a pruner with the optimizer, saves and restores it with the checkpoints."""

        pruner: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Make the pruner; after a resume, bring it to where it was."""
            self.pruner = make(given["model"], given["optimizer"], state.max_steps)
            if state.global_step:
                self.pruner.load_state_dict(_read(_folder(args, state)))

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """One step of the optimizer is done."""
            self.pruner.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """What is pruned is zero in the end, whichever checkpoint was the best."""
            self.pruner.masks.apply_(unwrapped(given["model"]))

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Put the state into the checkpoint that has just been written."""
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            said = self.pruner.state_dict()  # every process asks, one writes
            if state.is_world_process_zero and folder.is_dir():
                _write(folder / FILE, said)

    return Pruning()


class LightningCallback:
    """A callback for Lightning's `Trainer(callbacks=[...])`, which Lightning need not be installed for.

    It has every hook that a Lightning callback has; those that it has no use for do nothing. The pruner steps when
    `trainer.global_step` has moved, so accumulated batches count once, and its state lies in Lightning's checkpoints.

    Args:
        make: `(model, optimizers, steps) -> pruner`, such as a `Gradual`; called when training begins.

    Attributes:
        pruner: what `make` made, once training has begun.
    """

    def __init__(self, make: Make) -> None:
        self.make = make
        self.pruner: Any = None
        self._restored: dict[str, Any] | None = None
        self._seen = 0

    @property
    def state_key(self) -> str:
        """Under what name Lightning keeps the state in its checkpoints."""
        return "secateur"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the pruner; after a resume, bring it to where it was."""
        steps = trainer.estimated_stepping_batches
        if not isinstance(steps, int):
            raise UsageError(
                f"Lightning says that this training takes {steps} steps; a schedule needs an end, so give max_steps or "
                "max_epochs"
            )
        self.pruner = self.make(pl_module, list(trainer.optimizers), steps)
        self._seen = trainer.global_step
        if self._restored is not None:
            self.pruner.load_state_dict(self._restored)
            self._restored = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step where the optimizer has."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            assert self.pruner is not None  # made when training starts
            self.pruner.step()

    def state_dict(self) -> dict[str, Any]:
        """What goes into Lightning's checkpoint."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lightning restores callbacks before training begins; the pruner is made then."""
        self._restored = state or None

    def __getattr__(self, name: str) -> Any:
        """Hooks without a use here."""
        if name.startswith("on_") or name in ("setup", "teardown"):
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _nothing(*_: Any, **__: Any) -> None: ...


def _folder(args: Any, state: Any) -> Path:
    """The checkpoint that a Trainer resumes from: the one that its arguments name, or the one of this step."""
    named = args.resume_from_checkpoint
    if isinstance(named, str) and Path(named).is_dir():
        return Path(named)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _write(path: Path, state: dict[str, Any]) -> None:
    import torch

    beside = path.with_name(f".{path.name}.tmp")
    torch.save(state, beside)
    os.replace(beside, path)


def _read(folder: Path) -> dict[str, Any]:
    import torch

    path = folder / FILE
    if not path.is_file():
        raise UsageError(
            f"{path} is missing: this checkpoint was written without the pruning callback, or lies elsewhere; start "
            "anew, or set resume_from_checkpoint in the training arguments to the folder"
        )
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: no readable state of pruning ({error})") from None
