"""Running prune_checkpoint as tests need it: compared with memory, and killed on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from secateur import prune_
from secateur.core.masks import Masks
from secateur.model import load
from secateur.stream import prune_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_as_in_memory(source: Path, target: Path, *args, **named) -> None:
    """Stream into `target`; masks and weights must be those of load, prune_, save, bit by bit."""
    before = contents(source)
    outcome = prune_checkpoint(source, target, *args, **named)
    assert contents(source) == before
    loaded = load(source)
    masks = prune_(loaded.model, *args, **named)
    assert Masks.load(target / "run" / "masks.safetensors") == masks
    assert (outcome.pruned, outcome.size) == (masks.zeros, masks.size)
    stored = loaded.stored_dtype
    streamed = load(target).model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        expected = tensor.to(stored).float() if tensor.is_floating_point() else tensor
        assert torch.equal(streamed[name], expected), name


def killed(at: int, *args, **named) -> None:
    """Run prune_checkpoint in a child that kills itself, as kill -9 would, at its `at`-th word of progress."""
    child = os.fork()
    if child == 0:
        said = 0

        def tell(label: str, done: int, total: int) -> None:
            nonlocal said
            said += 1
            if said == at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            prune_checkpoint(*args, **named, tell=tell)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the run ended before word {at} of its progress"
    assert os.WTERMSIG(status) == signal.SIGKILL


def refused(source, tmp_path, error, match, *args, **named):
    """The error, the source as it was, and nothing left that could be taken for a result."""
    before = contents(source)
    with pytest.raises(error, match=match):
        prune_checkpoint(source, tmp_path / "out", *(args or (0.5,)), **named)
    assert contents(source) == before
    assert not (tmp_path / "out").exists()
    return tmp_path / ".out.secateur-partial"


def with_weight(folder, name, change, first=()) -> None:
    """Rewrite one tensor of a checkpoint, after some files got back their bytes."""
    from safetensors.torch import load_file, save_file

    for path, content in dict(first).items():
        path.write_bytes(content)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / places[name])
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / places[name], metadata={"format": "pt"})
