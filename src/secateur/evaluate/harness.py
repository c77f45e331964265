"""Tasks of lm-evaluation-harness, run by its own package, as Measurements."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from secateur.core.forward import device_of, dtype_of, undisturbed
from secateur.errors import UsageError, nearest
from secateur.measurement import Condition, Measurement, Spread

__all__ = ["harness"]


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[Any],
    *,
    shots: int | None = None,
    limit: int | None = None,
    context: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    task_folder: str | None = None,
) -> dict[str, Measurement]:
    """Run tasks of lm-evaluation-harness on a transformers model.

    Nothing is computed here: the package does it all, including the download of the tasks' data where they
    are not cached. The model's mode and the random generators, which the package seeds, are put back.

    Args:
        model: a causal or sequence-to-sequence language model of transformers.
        tokenizer: its tokenizer.
        tasks: a name, several names, or the package's own task objects or dictionaries.
        shots: examples in the prompt; None leaves each task's own number.
        limit: judge only so many examples of each task; for trying out, never for publishing.
        context: tokens the model may read; None leaves it to the package.
        batch_size: sequences per forward pass.
        seed: for the choice of examples in the prompt.
        task_folder: a folder with task files of your own. A task file may name Python code, which runs.

    Returns:
        `task/metric` (`task/metric (filter)` where a task has several filters) to its Measurement, with the
        standard error as spread where the package gives one.

    Raises:
        UsageError: the package is missing, no task, an unknown task, a model that is not of transformers, or
            data that cannot be had.
    """
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    if not wanted:
        raise UsageError("no task named; see `lm_eval ls tasks` for the list")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("harness tasks need lm-eval: pip install 'secateur[harness]'") from error
    if not hasattr(model, "config"):
        raise UsageError(f"harness tasks need a model of transformers, got {type(model).__name__}")
    manager = _manager(TaskManager, wanted, task_folder)
    with undisturbed(model), _generators():
        # The package gives the tokenizer a padding token, so it gets a copy.
        options = {"tokenizer": deepcopy(tokenizer), "batch_size": batch_size, "max_length": context}
        wrapped: Any = HFLM(pretrained=cast(Any, model), **options)
        try:
            results = simple_evaluate(
                model=wrapped,
                tasks=wanted,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise UsageError(f"the data of these tasks cannot be had: {error}") from error
    conditions: dict[str, Condition] = {"protocol": f"lm-evaluation-harness {_version()}", "batch": batch_size}
    conditions |= {"seed": seed, "dtype": dtype_of(model), "device": device_of(model).type}
    return _measurements(results, conditions, limit)


def _manager(make: Any, wanted: Sequence[Any], task_folder: str | None) -> Any:
    """The package's index of tasks; the own folder's alone where that suffices (the full one takes seconds)."""
    if task_folder is not None:
        if not Path(task_folder).is_dir():
            raise UsageError(f"{task_folder}: no such folder of tasks")
        own = make(include_path=task_folder, include_defaults=False)
        if all(isinstance(task, str) and task in own.all_subtasks for task in wanted):
            return own
    full = make(include_path=task_folder)
    for task in wanted:
        if isinstance(task, str) and task not in full.all_tasks:
            raise UsageError(f"unknown task {task!r}; {nearest(task, full.all_tasks)}")
    return full


@contextmanager
def _generators() -> Iterator[None]:
    """The package seeds Python's and numpy's generators as well as torch's; give them back as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _measurements(
    results: Mapping[str, Any], conditions: Mapping[str, Condition], limit: int | None
) -> dict[str, Measurement]:
    """The package's table `{task: {"metric,filter": value, "metric_stderr,filter": error}}` as Measurements."""
    found: dict[str, Measurement] = {}
    for task, row in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        judged = counts.get("effective", row.get("sample_len"))
        filters = {key.partition(",")[2] for key in row if "," in key}
        for key, value in row.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            said = {"task": task, **conditions, **_task_conditions(results, task, judged, limit)}
            name = f"{task}/{metric}" + (f" ({chosen})" if len(filters) > 1 else "")
            error = row.get(f"{metric}_stderr,{chosen}")
            spread = None
            if _is_number(error) and judged:
                spread = Spread(value - error, value + error, "standard error", repeats=int(judged))
            found[name] = Measurement(name, value, "1", said, spread)
    if not found:
        raise UsageError("the harness returned no number for these tasks")
    return found


def _task_conditions(
    results: Mapping[str, Any], task: str, judged: Any, limit: int | None
) -> dict[str, Condition]:
    found: dict[str, Condition] = {}
    if isinstance(judged, int):
        found["examples"] = judged
    for key, table in (("shots", "n-shot"), ("version", "versions")):
        value = results.get(table, {}).get(task)
        if _is_number(value):
            found[key] = value
    if limit is not None:
        found["limit"] = limit
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
