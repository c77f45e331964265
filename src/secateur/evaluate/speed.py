"""How fast a model runs: times with their spread and with what they depend on, comparisons taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from secateur.core.forward import call, device_of, dtype_of, input_of, move, undisturbed
from secateur.errors import UsageError
from secateur.evaluate.machine import hardware
from secateur.measurement import Condition, Measurement, Spread

__all__ = ["PairedLatency", "latency", "paired_latency", "throughput"]


class PairedLatency(NamedTuple):
    """Latencies of several models taken in turns, and the speed-up of each over the first.

    Args:
        latency: by name, in ms.
        speedup: by name, without the first: its time divided by the other's, round by round.
    """

    latency: dict[str, Measurement]
    speedup: dict[str, Measurement]


def latency(model: nn.Module, example: Any, *, repeats: int = 20, warmup: int = 3) -> Measurement:
    """Median wall-clock time of one forward pass, in ms, with the interquartile spread.

    Args:
        model: any model, in evaluation mode for the time being.
        example: one input: a tensor, a tuple of arguments, or a mapping of named arguments.
        repeats: timed passes, at least 1.
        warmup: passes before them that do not count.

    Raises:
        UsageError: no repeat, or a negative warm-up.

    Cost: `warmup + repeats` forward passes.
    """
    times = _interleaved({"model": _forward(model, example)}, repeats, warmup, [model])["model"]
    return _in_ms("latency", times, _conditions(model, example))


def paired_latency(
    models: Mapping[str, nn.Module], example: Any, *, repeats: int = 20, warmup: int = 3
) -> PairedLatency:
    """Latencies of several models measured in turns in one process, and the speed-up over the first.

    Machines drift: clocks change and neighbours come and go. So each round times every model once, in an
    order that rotates, and a speed-up is the median of the ratios within rounds, never the ratio of two
    numbers from different times.

    Args:
        models: by name; the first is the control, usually the dense model.
        example: one input that fits all of them.
        repeats: rounds, at least 2 so that there is a spread.
        warmup: rounds before them that do not count.

    Returns:
        Latencies with their spread, and for every model but the first `speedup` with the interquartile
        spread of its ratios.

    Raises:
        UsageError: fewer than two models, fewer than two rounds, a negative warm-up, or models on different
            devices.

    Cost: `(warmup + repeats)` forward passes of each model.
    """
    if len(models) < 2:
        raise UsageError(f"a paired latency compares at least two models, got {len(models)}")
    if repeats < 2:
        raise UsageError(f"a speed-up needs its spread, so at least 2 repeats, got {repeats}")
    places = {str(device_of(model)) for model in models.values()}
    if len(places) > 1:
        raise UsageError(
            f"the models lie on different devices ({', '.join(sorted(places))}); move them together"
        )
    runs = {name: _forward(model, example) for name, model in models.items()}
    times = _interleaved(runs, repeats, warmup, list(models.values()))
    control, *others = models
    said = {name: {"model": name, **_conditions(model, example)} for name, model in models.items()}
    found = {name: _in_ms("latency", times[name], said[name]) for name in models}
    ratios = {}
    for name in others:
        rounds = [mine / own for mine, own in zip(times[control], times[name], strict=True)]
        conditions = said[name] | {"over": control}
        ratios[name] = Measurement("speedup", statistics.median(rounds), "1", conditions, _quartiles(rounds))
    return PairedLatency(found, ratios)


def throughput(
    model: nn.Module, ids: Tensor, *, new_tokens: int | None = None, repeats: int = 5, warmup: int = 1
) -> Measurement:
    """Tokens per second: read in one forward pass, or written by greedy generation.

    Args:
        model: a language model that takes ids `(batch, tokens)`; one with `generate` for `new_tokens`.
        ids: the input, or the prompt.
        new_tokens: tokens to generate per sequence, exactly that many; None measures reading.
        repeats: timed runs, at least 1.
        warmup: runs before them that do not count.

    Returns:
        `throughput` in tokens/s with the interquartile spread. For generation only new tokens are counted,
        while the time includes reading the prompt.

    Raises:
        UsageError: ids that are not two-dimensional, no repeat, a negative warm-up, no new token, or a model
            that cannot generate.

    Cost: `warmup + repeats` runs.
    """
    if ids.dim() != 2 or not ids.numel():
        raise UsageError(f"throughput needs ids of shape (batch, tokens), got {tuple(ids.shape)}")
    conditions: dict[str, Condition] = {"method": "forward pass", "prompt": ids.shape[1]}
    if new_tokens is None:
        count, run = ids.numel(), _forward(model, ids)
    else:
        if new_tokens < 1:
            raise UsageError(f"new_tokens must be at least 1, got {new_tokens}")
        if not callable(getattr(model, "generate", None)):
            raise UsageError(
                f"{type(model).__name__} has no generate(); leave new_tokens= out to measure reading"
            )
        count, run = ids.shape[0] * new_tokens, _generation(model, ids, new_tokens)
        conditions |= {"method": "greedy generation", "tokens": new_tokens}
    times = _interleaved({"model": run}, repeats, warmup, [model])["model"]
    rates = [count / seconds for seconds in times]
    conditions |= _conditions(model, ids)
    return Measurement("throughput", statistics.median(rates), "tokens/s", conditions, _quartiles(rates))


def _forward(model: nn.Module, example: Any) -> Callable[[], Any]:
    ready = move(example, device_of(model))
    return lambda: call(model, ready)


def _generation(model: nn.Module, ids: Tensor, new_tokens: int) -> Callable[[], Any]:
    ready = ids.to(device_of(model))
    # A mask and a padding id are given so that nothing is guessed (and warned about) from the ids.
    options = {
        "attention_mask": torch.ones_like(ready),
        "pad_token_id": 0,
        "do_sample": False,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
    }
    return lambda: cast(Any, model).generate(ready, **options)


def _interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int, models: list[nn.Module]
) -> dict[str, list[float]]:
    """Seconds of every run in every round; the order rotates, so that none is always first."""
    if repeats < 1 or warmup < 0:
        raise UsageError(f"expected repeats >= 1 and warmup >= 0, got repeats={repeats}, warmup={warmup}")
    wait = _waiting(device_of(models[0]))
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        for number in range(warmup + repeats):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                wait()
                start = time.perf_counter()
                runs[name]()
                wait()
                seconds = time.perf_counter() - start
                if number >= warmup:
                    times[name].append(seconds)
    return times


def _waiting(device: torch.device) -> Callable[[], Any]:
    """What to call so that work sent to an accelerator is finished before the clock is read."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _conditions(model: nn.Module, example: Any) -> dict[str, Condition]:
    found: dict[str, Condition] = input_of(example)
    device = device_of(model)
    return found | hardware(device) | {"dtype": dtype_of(model), "device": device.type}


def _in_ms(name: str, seconds: list[float], conditions: Mapping[str, Condition]) -> Measurement:
    values = [1000 * value for value in seconds]
    return Measurement(name, statistics.median(values), "ms", conditions, _quartiles(values))


def _quartiles(values: list[float]) -> Spread:
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, high, "interquartile", repeats=len(values))
