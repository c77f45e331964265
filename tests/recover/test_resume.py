"""Training killed anywhere and resumed gives the same bits; anything else than what was begun is refused."""

from __future__ import annotations

import json
import struct
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur import evaluate
from secateur.core.masks import Masks
from secateur.errors import InputError, ResourceError, UsageError
from secateur.prune import prune_
from secateur.recover import distill_, finetune_
from secateur.recover import state as states

from .problems import batches, classifier, examples


class Killed(BaseException):
    pass


def start(seed=0):
    torch.manual_seed(seed)
    model = classifier(dropout=0.3)
    return model, prune_(model, 0.5)


def killing(at):
    def tell(label, done, total):
        if done == at:
            raise Killed

    return tell


def noisy_loader():
    """Shuffles, and draws noise for every example from torch's own generator."""
    x, y = examples(80)

    class Noisy(TensorDataset):
        def __getitem__(self, place):
            return x[place] + 0.1 * torch.randn(8), y[place]

    return DataLoader(Noisy(x, y), batch_size=16, shuffle=True)


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


HOW = {"epochs": 3, "lr": 0.02, "seed": 7}
# before anything, inside an epoch, at its last step, inside the second, at the very last step
KILLED_AT = [1, 4, 5, 8, 15]


@pytest.mark.parametrize("data", [partial(batches, 80), noisy_loader])
@pytest.mark.thorough
def test_killed_and_resumed_is_as_if_never_stopped(tmp_path, data):
    judged = {"validation": batches(seed=1), "metric": evaluate.accuracy}
    whole, masks = start()
    expected = finetune_(whole, data(), masks, **HOW, **judged)
    for at in KILLED_AT:
        path = tmp_path / f"{at}.safetensors"
        model, masks = start()
        with pytest.raises(Killed):
            finetune_(model, data(), masks, **HOW, **judged, checkpoint=path, every=3, tell=killing(at))
        again, masks = start()
        told: list[int] = []
        tell = partial(lambda told, *said: told.append(said[1]), told)
        tuned = finetune_(again, data(), masks, **HOW, **judged, checkpoint=path, every=3, tell=tell)
        assert tuned == expected, at
        assert same(values(again), values(whole)), at
        assert told[0] >= at - 3 or at < 3  # no more than `every` steps are done again


def test_accumulation_momentum_and_a_generator_in_the_middle(tmp_path):
    """SGD's momentum, four batches a step, three steps an epoch of which the last is not full."""
    how = {**HOW, "accumulate": 4, "optimizer": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)}
    whole, masks = start()
    finetune_(whole, batches(), masks, **how)
    model, masks = start()
    with pytest.raises(Killed):
        finetune_(model, batches(), masks, **how, checkpoint=tmp_path / "c", every=1, tell=killing(5))
    again, masks = start()
    finetune_(again, batches(), masks, **how, checkpoint=tmp_path / "c", every=1)
    assert same(values(again), values(whole))


def test_distillation_resumes_with_its_learned_map(tmp_path):
    teacher = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    how = {**HOW, "hidden": 1.0, "pairs": {"0": "0"}}
    whole, masks = start()
    distill_(whole, teacher, batches(), masks, **how)
    model, masks = start()
    with pytest.raises(Killed):
        distill_(model, teacher, batches(), masks, **how, checkpoint=tmp_path / "c", every=2, tell=killing(13))
    again, masks = start()
    distill_(again, teacher, batches(), masks, **how, checkpoint=tmp_path / "c", every=2)
    assert same(values(again), values(whole))
    with torch.no_grad():
        teacher[0].bias[0] += 1
    with pytest.raises(UsageError, match="belongs to another run \\(the teacher changed\\)"):
        distill_(start()[0], teacher, batches(), masks, **how, checkpoint=tmp_path / "c", every=2)


def test_a_finished_run_is_not_run_again(tmp_path):
    model, masks = start()
    tuned = finetune_(model, batches(), masks, **HOW, checkpoint=tmp_path / "c")
    again, masks = start()
    told = []
    assert (
        finetune_(again, batches(), masks, **HOW, checkpoint=tmp_path / "c", tell=lambda *s: told.append(s))
        == tuned
    )
    assert same(values(again), values(model))
    assert told == [("fine-tuning", 30, 30)]


@pytest.fixture
def begun(tmp_path):
    path = tmp_path / "c.safetensors"
    model, masks = start()
    with pytest.raises(Killed):
        finetune_(model, batches(), masks, **HOW, checkpoint=path, tell=killing(15), validation=batches(seed=1))
    return path


def changed_data():
    found = batches()
    found[3][0][2, 1] += 1e-3
    return found


def test_what_changed_is_refused_and_named(begun):
    model, masks = start()
    more = Masks({**masks, "0.weight": masks["0.weight"] & (torch.rand(24, 8) > 0.1)})
    how = {**HOW, "checkpoint": begun, "validation": batches(seed=1)}
    for data, kept, options, said in [
        (changed_data(), masks, how, "the data changed"),
        (batches(), more, how, "the masks changed"),
        (batches(), masks, {**how, "validation": batches(seed=2)}, "the validation changed"),
        (batches(), masks, {**how, "lr": 0.03}, "lr was 0.02, now 0.03"),
        (batches(), masks, {**how, "seed": 8, "epochs": 4}, "epochs was 3, now 4; seed was 7, now 8"),
        (batches(), masks, {**how, "optimizer": torch.optim.SGD}, "optimizer was 'AdamW', now 'SGD'"),
        (batches(), masks, {**how, "loss": "single-label"}, "loss was 'by shape', now 'single_label'"),
    ]:
        before = values(model)
        with pytest.raises(UsageError) as told:
            finetune_(model, data, kept, **options)
        assert f"{begun}: this checkpoint belongs to another run ({said}" in str(told.value)
        assert "or delete it to start anew" in str(told.value)
        assert same(values(model), before)
    other, masks = start(seed=1)
    with pytest.raises(UsageError, match="the model changed"):
        finetune_(other, batches(), masks, **how)


def test_the_checkpoint_is_one_safetensors_file_and_nothing_lies_beside_it(begun):
    assert [path.name for path in begun.parent.iterdir()] == [begun.name]
    with safe_open(begun, "pt") as file:
        names = set(file.keys())
        plain = json.loads(file.metadata()["secateur"])
    assert {"model.0.0.weight", "good.0.0.weight", "rng.torch", "rng.numpy", "optimizer.0.exp_avg"} <= names
    assert plain["about"]["epochs"] == 3


def rewritten(path, change):
    tensors, plain = states.read_state(path)
    change(tensors, plain)
    plain.pop("format")
    states.write_state(path, tensors, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, plain: tensors.pop("model.0.0.weight"),
        lambda tensors, plain: tensors.update({"model.0.0.weight": torch.zeros(2, 2)}),
        lambda tensors, plain: plain.pop("counts"),
        lambda tensors, plain: plain["optimizer"].update(groups=[]),
        lambda tensors, plain: plain.update(history=[{"number": 1}]),
        lambda tensors, plain: plain.update(optimizer={"state": {"x": 1}, "groups": 3}),
        lambda tensors, plain: plain.pop("generators"),
    ],
)
def test_an_altered_checkpoint_is_told(begun, change):
    rewritten(begun, change)
    model, masks = start()
    with pytest.raises(InputError, match=r"this checkpoint was altered .*; delete it to start anew"):
        finetune_(model, batches(), masks, **HOW, checkpoint=begun, validation=batches(seed=1))


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "c"
    header = json.dumps({"__metadata__": {"secateur": "[1]"}}).encode()
    for content in (b"", b"no safetensors", struct.pack("<Q", len(header)) + header):
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=r"c: no (readable )?checkpoint of training .*delete it to start anew"
        ):
            finetune_(start()[0], batches(), **HOW, checkpoint=path)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"c: cannot be written here \(Not a directory\)"):
        finetune_(start()[0], batches(), **HOW, checkpoint=tmp_path / "file" / "c")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match="no space left on the disk; the earlier file is intact"):
        finetune_(start()[0], batches(), **HOW, checkpoint=tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_generators_go_back_to_where_they_were():
    import random

    import numpy as np

    random.gauss(0, 1), np.random.randn()  # half a pair of normals is kept by both
    tensors, plain = states.generators()
    plain = json.loads(json.dumps(plain))
    expected = [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)]
    states.set_generators(tensors, plain)
    assert [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)] == expected
