"""Distillation: each thing that a teacher shows by hand, what is paired with what, and what does not compare."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import UsageError
from secateur.prune import prune_
from secateur.recover import distill_, multi_label, regression
from secateur.recover.distill import answer_gap
from secateur.recover.matching import Watched, attention_gap, hidden_gap, pairs_of

from .problems import batches, classifier


def tower(depth, width=16):
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, width), *blocks, nn.Linear(width, 3))


def test_answers_are_compared_at_a_temperature():
    mine, theirs = torch.randn(6, 5), torch.randn(6, 5)
    expected = 9 * F.kl_div(
        (mine / 3).log_softmax(-1), (theirs / 3).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert torch.allclose(answer_gap(mine, theirs, 3.0, None), expected)
    assert answer_gap(theirs, theirs, 3.0, None) == 0


def test_padding_has_no_answer():
    mine, theirs, mask = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    real = mask.bool()
    found = answer_gap(mine, theirs, 1.0, None, {"attention_mask": mask})
    assert torch.allclose(found, answer_gap(mine[real], theirs[real], 1.0, None))


def test_labels_at_once_and_real_numbers():
    mine, theirs = torch.randn(6, 5), torch.randn(6, 5)
    p, q = theirs.sigmoid(), mine.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert torch.allclose(answer_gap(mine, theirs, 1.0, multi_label), expected, atol=1e-6)
    assert torch.allclose(answer_gap(mine, theirs, 4.0, regression), F.mse_loss(mine, theirs))
    assert torch.allclose(
        answer_gap(mine[:, :1], theirs[:, :1], 4.0, None), F.mse_loss(mine[:, 0], theirs[:, 0])
    )


def test_maps_of_classes_are_compared_at_each_place():
    mine, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flat = [x.movedim(1, -1).reshape(-1, 3) for x in (mine, theirs)]
    assert torch.allclose(answer_gap(mine, theirs, 2.0, None), answer_gap(*flat, 2.0, None))


def test_hidden_states_are_compared_relative_to_the_teacher():
    mine, theirs = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    expected = (mine - theirs).square().sum() / theirs.square().sum()
    assert torch.allclose(hidden_gap(mine, theirs, None, {}), expected)
    assert torch.allclose(hidden_gap(100 * mine, 100 * theirs, None, {}), expected)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    real = mask.bool()
    expected = (mine[real] - theirs[real]).square().sum() / theirs[real].square().sum()
    assert torch.allclose(hidden_gap(mine, theirs, None, {"attention_mask": mask}), expected)


def test_channels_are_mapped_where_they_are():
    mine, theirs, map_ = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 5, 5), nn.Linear(6, 4, bias=False)
    mapped = torch.einsum("bchw,dc->bdhw", mine, map_.weight)
    expected = (mapped - theirs).square().sum() / theirs.square().sum()
    assert torch.allclose(hidden_gap(mine, theirs, map_, {}), expected)


def test_attention_is_compared_by_its_rows():
    mine, theirs = (torch.randn(2, 3, 4, 4).softmax(-1) for _ in range(2))
    expected = (theirs * (theirs / mine).log()).sum(-1).mean()
    assert torch.allclose(attention_gap([mine], [theirs], {}), expected, atol=1e-6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = (theirs * (theirs / mine).log()).sum(-1)
    expected = torch.cat([rows[0].flatten(), rows[1, :, :2].flatten()]).mean()
    assert torch.allclose(attention_gap([mine], [theirs], {"attention_mask": mask}), expected, atol=1e-6)
    wide = theirs.repeat_interleave(2, dim=1)  # other numbers of heads: their means
    expected = (theirs.mean(1) * (theirs.mean(1) / mine.mean(1)).log()).sum(-1).mean()
    assert torch.allclose(attention_gap([mine], [wide], {}), expected, atol=1e-6)
    assert attention_gap([mine], [torch.rand(2, 3, 4, 4), mine], {}).abs() < 1e-6  # the last imitates the last


def test_blocks_are_paired_evenly():
    assert pairs_of(tower(2), tower(4)) == {"1": "2", "2": "4"}
    assert pairs_of(tower(3), tower(3)) == {"1": "1", "2": "2", "3": "3"}
    with pytest.raises(
        UsageError, match=r"blocks of the student \(none\) and of the teacher \(2 in its encoder\)"
    ):
        pairs_of(nn.Linear(8, 3), tower(2))


def test_a_student_learns_what_its_teacher_says_and_keeps_its_zeros():
    """No labels: the teacher's answers are all there is."""
    teacher = classifier()
    student = copy.deepcopy(teacher)
    masks = prune_(student, 0.7)
    inputs = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in batches()]
    state, teaching = copy.deepcopy(teacher.state_dict()), teacher.training
    tuned = distill_(student, teacher, inputs, masks, epochs=6, lr=0.02, validation=inputs)
    assert tuned.history[-1].measurements[-1].value < 0.5 * tuned.history[0].measurements[-1].value
    assert all(not student.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())
    assert teacher.training == teaching


@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
def test_hidden_states_alone_teach(widths):
    student, teacher = tower(2, widths[0]), tower(4, widths[1])
    names = set(student.state_dict())
    tuned = distill_(
        student, teacher, batches(), soft=0, hidden=1.0, epochs=5, lr=0.02, validation=batches(seed=1)
    )
    assert tuned.history[-1].measurements[-1].value < 0.7 * tuned.history[0].measurements[-1].value
    assert set(student.state_dict()) == names  # the learned map is thrown away
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_hard_labels_share_in_the_loss():
    """With the labels alone the result is that of fine-tuning."""
    from secateur.recover import finetune_

    models = [classifier() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    distill_(models[0], classifier(), batches(), soft=0, hard=1.0, epochs=1, lr=0.01)
    finetune_(models[1], batches(), epochs=1, lr=0.01)
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_a_transformer_learns_from_attention_and_blocks():
    hf = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 50,
        "n_positions": 16,
        "n_embd": 16,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    teacher = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, n_layer=2))
    student = hf.GPT2LMHeadModel(hf.GPT2Config(**{**shape, "n_embd": 12}, n_layer=1))
    before = student.config._attn_implementation
    ids = torch.randint(0, 50, (8, 10))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    data = [{"input_ids": ids, "attention_mask": mask}]
    how = {"soft": 1.0, "hard": 0.5, "hidden": 1.0, "attention": 1.0, "epochs": 8, "lr": 0.02}
    tuned = distill_(student, teacher, data, **how, validation=data)
    assert tuned.history[-1].measurements[-1].value < 0.9 * tuned.history[0].measurements[-1].value
    assert student.config._attn_implementation == before


def test_models_that_do_not_compare():
    teacher, student = tower(3), tower(2)
    with pytest.raises(UsageError, match="teacher and student are one model"):
        distill_(student, student, batches())
    with pytest.raises(UsageError, match=r"the student answers in shape \(16, 3\), the teacher in \(16, 24\)"):
        distill_(student, nn.Linear(8, 24), batches())
    with pytest.raises(UsageError, match="temperature is 0; expected a number above 0"):
        distill_(student, teacher, batches(), temperature=0)
    for weights in ({"soft": -1}, {"soft": 0}, {"hidden": math.inf}):
        with pytest.raises(
            UsageError, match="weights of what is learned must be at least 0, and one of them above"
        ):
            distill_(student, teacher, batches(), **weights)
    with pytest.raises(UsageError, match="pairs: there is no module '7' in Sequential; known: "):
        distill_(student, teacher, batches(), hidden=1.0, pairs={"7": "1"})
    with pytest.raises(UsageError, match="Sequential gives no attention maps; leave attention= at 0"):
        distill_(student, teacher, batches(), attention=1.0)


def test_modules_that_show_nothing():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return {"logits": self.used(x)}

    with pytest.raises(UsageError, match="module unused was not used by Odd for this batch"):
        Watched(Odd(), ["unused"])(torch.randn(2, 8))
    with pytest.raises(UsageError, match="module  returns dict; expected a tensor"):
        Watched(Odd(), [""])(torch.randn(2, 8))
    with pytest.raises(UsageError, match="differ in more than their width"):
        hidden_gap(torch.randn(2, 4, 6), torch.randn(2, 5, 6), None, {})
    with pytest.raises(UsageError, match="do not compare"):
        attention_gap([torch.rand(2, 1, 4, 4)], [torch.rand(2, 1, 5, 5)], {})
