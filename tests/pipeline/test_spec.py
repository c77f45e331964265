"""The schema of an experiment: what is understood, what is refused and where the file is wrong."""

from __future__ import annotations

import pytest
import yaml

from secateur.errors import UsageError
from secateur.pipeline.document import parse
from secateur.pipeline.spec import Loss, Scheme, experiment, read_experiment
from secateur.recover.losses import LOSSES

from .support import spec


def of(text: str):
    document = parse(text, "f.yaml")
    return experiment(document.value, document)


def names(text: str) -> list[str]:
    return [stage.name for stage in of(text).stages]


def test_a_list_is_carried_out_as_it_stands():
    assert names("model: m\nstages: [quantize, fine-tune]") == ["quantize", "fine-tune"]
    assert names("model: m\nstages:\n- prune: {sparsity: 0.5}\n- fine-tune:\n- quantize") == [
        "prune",
        "fine-tune",
        "quantize",
    ]


def test_a_mapping_is_carried_out_in_the_recommended_order():
    assert names("model: m\nstages: {export: , fine-tune: , quantize: , prune: {sparsity: 0.5}, train: }") == [
        "train",
        "prune",
        "quantize",
        "fine-tune",
        "export",
    ]


def test_distillation_from_another_model_comes_first_and_from_itself_after_pruning():
    stages = "{fine-tune: , prune: {sparsity: 0.5}, distil: %s}"
    assert names("model: m\nstages: " + stages % "{teacher: t}") == ["distil", "prune", "fine-tune"]
    assert names("model: m\nstages: " + stages % "") == ["prune", "distil", "fine-tune"]


def test_what_was_asked_reads_again_as_the_same(tmp_path):
    given = spec(
        seed=3, context=16, stages=[{"prune": {"method": "gradual", "sparsity": 0.5, "epochs": 2}}, "export"]
    )
    first = experiment(given)
    assert first.common.seed == 3
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(first.plain()))
    assert read_experiment(tmp_path / "e.yaml") == first


def test_gradual_is_magnitude_with_a_cubic_schedule():
    for stage in ("{method: gradual, sparsity: 0.5}", "{schedule: cubic, sparsity: 0.5}"):
        (pruned,) = of("model: m\nstages:\n- prune: " + stage).stages
        assert (pruned.settings.asked.method, pruned.settings.gradually.schedule) == ("magnitude", "cubic")
    (pruned,) = of("model: m\nstages:\n- prune: {schedule: linear, method: taylor, sparsity: 0.5}").stages
    assert (pruned.settings.asked.method, pruned.settings.gradually.schedule) == ("taylor", "linear")
    assert of("model: m\nstages:\n- prune: {sparsity: 0.5}").stages[0].settings.gradually is None


def test_structured_is_a_short_word_for_whole_units():
    (pruned,) = of("model: m\nstages:\n- prune: {method: structured, sparsity: 0.5}").stages
    assert (pruned.settings.asked.method, pruned.settings.gradually) == ("l2", None)


def test_words_of_the_schema_are_those_of_the_library():
    from secateur.deploy.quantize import SCHEMES

    assert set(Loss.__args__) == set(LOSSES)
    assert set(Scheme.__args__) == set(SCHEMES)


WRONG = [
    (
        "model: m\nstages:\n- prune:\n    sparsity: 50",
        "f.yaml, line 4: sparsity: 50 is not in [0, 1]. Did you mean 0.5",
    ),
    (
        "model: m\nstages:\n- prune:\n    sparsity: 0.5\n    metod: wanda",
        "f.yaml, line 5: metod is no setting; nearest: method",
    ),
    ("model: m\nsede: 1\nstages: [export]", "f.yaml, line 2: sede is no setting; nearest: seed"),
    ("stages: [export]", "f.yaml, line 1: model: Field required"),
    (
        "model: m\nseed: -1\nstages: [export]",
        "line 2: seed: Input should be greater than or equal to 0, got -1",
    ),
    (
        "model: m\nstages:\n- fine-tune: {epochs: 1.5}",
        "line 3: epochs: Input should be a valid integer, got 1.5",
    ),
    ("model: m\nstages:\n- distil: {loss: mse}\n", "line 3: loss: Input should be"),
    ("model: m\nstages:\n- prune", "f.yaml, line 3: how much is to be cut? Give sparsity 0.5"),
    ("model: m\nstages:\n- pune: {sparsity: 0.5}", "f.yaml, line 3: pune is no stage; nearest: prune"),
    ("model: m\nstages:\n- prune: 0.5", "f.yaml, line 3: prune is 0.5; expected its settings"),
    ("model: m\nstages:\n- {a: 1, b: 2}", "line 3: a stage is one name with its settings"),
    ("model: m\nstages: 3", "line 2: stages is 3; expected a list"),
    ("- model", "line 1: an experiment is a mapping with model and stages"),
    ("model: m\nstages:\n- prune: {sparsity: 0.5, seed: 1}", "line 3: seed holds for the whole experiment"),
    ("model: m\nstages:\n- prune: {sparsity: 0.5, stream: true}", "line 3: stream is no setting here"),
    ("model: m\nstages:\n- prune: {pattern: '2:4', permute: true}", "line 3: permute is no setting here"),
    (
        "model: m\nstages:\n- prune:\n    sparsity: 0.5\n    epochs: 2",
        "line 5: epochs belongs to pruning while the model trains; give schedule: cubic",
    ),
    (
        "model: m\nstages:\n- quantize\n- fine-tune\n- prune: {sparsity: 0.5}",
        "line 5: prune comes after quantize, and masks do not apply to integers",
    ),
    ("model: m\nstages:\n- quantize\n- quantize", "line 4: the model is quantized already"),
    ("model: m\nstages:\n- export\n- fine-tune", "line 4: fine-tune comes after export"),
    ("model: m\nstages:\n- distil", "line 3: the teacher is the model as it was loaded"),
    (
        "model: m\nstages: [prune: {method: wand, sparsity: 0.5}]",
        "line 2: method: 'wand' is no method; nearest: wanda",
    ),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_is_said_with_its_line(text, said):
    with pytest.raises(UsageError) as caught:
        of(text)
    assert said in str(caught.value)


def test_every_fault_is_said():
    with pytest.raises(UsageError, match=r"line 3: epochs.*; f.yaml, line 4: lr"):
        of("model: m\nstages:\n- fine-tune: {epochs: 0,\n    lr: -1}")


def test_a_surprising_order_is_remarked():
    found = of("model: m\nstages:\n- fine-tune\n- prune: {sparsity: 0.5}")
    assert found.notes == (
        "Stage 1 fine-tunes before anything is pruned; what pruning costs does not come back by it.",
    )
