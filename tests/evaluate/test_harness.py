import json
import random
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.evaluate import harness, loglikelihood_rolling
from secateur.evaluate.harness import _measurements

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="needs lm-eval: pip install 'secateur[harness]'",
)

TASK = """
task: own_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/pages.jsonl
  cache_dir: {folder}/cache
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""

PAGES = ["the cat sat on the mat and looked about", "a dog barked", "x y z"]


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in PAGES))
    (tmp_path / "own.yaml").write_text(TASK.format(folder=tmp_path))
    return str(tmp_path)


@needs_harness
@pytest.mark.filterwarnings("default")  # of the packages that the harness loads
def test_a_task_of_the_harness_agrees_with_our_own_figures(gpt2, byte_tokenizer, tasks):
    gpt2.train()
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    found = harness(gpt2, byte_tokenizer, "own_rolling", task_folder=tasks)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]
    assert gpt2.training
    gpt2.eval()
    assert byte_tokenizer.pad_token is None
    own = loglikelihood_rolling(gpt2, PAGES, byte_tokenizer)
    assert set(found) == {"own_rolling/word_perplexity", "own_rolling/bits_per_byte"}
    for name in ("word_perplexity", "bits_per_byte"):
        assert found[f"own_rolling/{name}"].value == pytest.approx(own[name].value, rel=1e-4)
    conditions = found["own_rolling/bits_per_byte"].conditions
    assert conditions["protocol"].startswith("lm-evaluation-harness 0.")
    assert (conditions["task"], conditions["examples"], conditions["seed"]) == ("own_rolling", 3, 0)


RESULTS = {
    "results": {
        "quiz": {
            "alias": "quiz",
            "acc,none": 0.75,
            "acc_stderr,none": 0.125,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
            "f1,none": float("nan"),
        },
        "sums": {
            "exact,strict": 0.1,
            "exact_stderr,strict": 0.01,
            "exact,loose": 0.2,
            "exact_stderr,loose": 0.02,
        },
    },
    "n-samples": {"quiz": {"original": 90, "effective": 12}, "sums": {"original": 5, "effective": 5}},
    "n-shot": {"quiz": 5},
    "versions": {"quiz": 2.0, "sums": "Yaml"},
}


def test_the_package_s_table_becomes_measurements():
    found = _measurements(RESULTS, {"protocol": "p"}, limit=12)
    assert set(found) == {"quiz/acc", "quiz/acc_norm", "sums/exact (strict)", "sums/exact (loose)"}
    quiz = found["quiz/acc"]
    assert quiz.value == 0.75
    assert (quiz.spread.low, quiz.spread.high) == (0.625, 0.875)
    assert (quiz.spread.kind, quiz.spread.repeats) == ("standard error", 12)
    assert dict(quiz.conditions) == {
        "task": "quiz",
        "protocol": "p",
        "examples": 12,
        "shots": 5,
        "version": 2.0,
        "limit": 12,
    }
    assert found["quiz/acc_norm"].spread is None
    assert "version" not in found["sums/exact (loose)"].conditions
    with pytest.raises(UsageError, match="the harness returned no number for these tasks"):
        _measurements({"results": {"empty": {"alias": "empty"}}}, {}, None)


@needs_harness
def test_mistakes(gpt2, byte_tokenizer, tasks, monkeypatch):
    with pytest.raises(UsageError, match="no task named"):
        harness(gpt2, byte_tokenizer, [])
    with pytest.raises(UsageError, match="harness tasks need a model of transformers, got Linear"):
        harness(nn.Linear(1, 1), byte_tokenizer, "own_rolling")
    with pytest.raises(UsageError, match="no such folder of tasks"):
        harness(gpt2, byte_tokenizer, "own_rolling", task_folder=tasks + "/missing")
    # The full index takes seconds; a small one stands in for it here.
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, **_: real(include_path=tasks, include_defaults=False)
    )
    with pytest.raises(UsageError, match="unknown task 'own_roling'; nearest: own_rolling"):
        harness(gpt2, byte_tokenizer, "own_roling", task_folder=tasks)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"harness tasks need lm-eval: pip install 'secateur\[harness\]'"):
        harness(nn.Linear(1, 1), None, "quiz")
