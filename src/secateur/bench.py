"""`secateur bench DIR`: a pruned model packed, beside the same model dense, in turns in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur import evaluate
from secateur import model as models
from secateur.deploy.sparse import sparsify_
from secateur.deploy.sparse.packed import Block
from secateur.errors import UsageError
from secateur.export import example_inputs
from secateur.measure import Tell, running_on, weight_files
from secateur.measurement import Measurement, Spread
from secateur.packed_folder import FILE, is_packed, load_packed, source_of
from secateur.peers import dynamic_int8, prepared
from secateur.sources import writes_text

__all__ = ["PACKED", "Asked", "Bench", "bench", "undecided"]

PACKED, TORCH, PREPARED, EIGHT = "packed", "dense", "dense, oneDNN", "dense int8"
PROMPT = 16


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        kind, outer, block: how a folder that is not packed yet is packed, as for `sparsify_`.
        prefer: "speed" or "memory", as for `secateur.load`.
        batch: rows of the larger input.
        tokens: written by greedy decoding, by language models; 0 leaves that out.
        threads: numbers of threads.
        rounds: in each, every model runs once.
        data: `file.py:function` giving batches, where inputs cannot be made up.
        seed: of made-up inputs.
    """

    kind: str | None = None
    outer: str | None = None
    block: Block = 1
    prefer: str = "speed"
    batch: int = 16
    tokens: int = 16
    threads: Sequence[int] = (1, 2)
    rounds: int = 10
    data: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        latency: of every model for every input and number of threads; for decoding, of one token.
        speedup: of the packed model over every other, above 1 where it is faster.
        sizes: `state_bytes` of packed and dense weights in memory, dense ones kept beside included, and `disk_bytes`.
        notes: what could not be compared, and what the packing left.
    """

    latency: list[Measurement]
    speedup: list[Measurement]
    sizes: list[Measurement]
    notes: list[str] = field(default_factory=list)

    @property
    def slower(self) -> list[Measurement]:
        """Where the packed model is slower than another."""
        return [each for each in self.speedup if each.value < 1 and not undecided(each)]

    @property
    def alike(self) -> list[Measurement]:
        """Where no difference is seen between the packed model and another."""
        return [each for each in self.speedup if undecided(each)]


def undecided(speedup: Measurement) -> bool:
    """Whether the rounds leave open which of two models is faster: the quartiles of their ratios enclose 1."""
    return speedup.spread is not None and 1 in speedup.spread


@torch.inference_mode()
def bench(spec: str, asked: Asked, *, tell: Tell, **loading: Any) -> Bench:
    """Measure a pruned model packed beside itself dense: as torch runs it, by oneDNN, and in 8 bits by torch.

    Args:
        spec: a run's folder or a packed one, or `file.py:function@` one of them for a module of one's own.
        asked: what to measure.
        tell: progress.
        loading: `offline`, `trust_remote_code`, `allow_pickle`.

    Raises:
        UsageError: no such folder, nothing to pack, or inputs that cannot be made up.

    Cost: `rounds + 2` passes of each model for each input and number of threads; the model four times in memory.
    """
    if asked.batch < 1 or asked.rounds < 2 or asked.tokens < 0 or not asked.threads or min(asked.threads) < 1:
        raise UsageError(f"at least 1 row, 2 rounds, 0 tokens and 1 thread are measured, got {asked}")
    tell("loading the model", 0, 1)
    source = _Source(spec, asked, loading)
    dense = source.dense()
    example = example_inputs(dense, asked.data, seed=asked.seed)
    others = {TORCH: dense.model, PREPARED: prepared(dense.model), EIGHT: dynamic_int8(dense.model)}
    found = Bench([], [], [])
    found.notes.extend(f"{name}: this torch cannot" for name, model in others.items() if model is None)
    tell("loading the model", 1, 1)
    inputs = _inputs(dense.model, example, asked)
    packed: Any = None
    for number, count in enumerate(asked.threads):
        with _threads(count):
            packed = source.packed(dense.model, found.notes)
            candidates = {
                PACKED: packed,
                **{name: model for name, model in others.items() if model is not None},
            }
            for at, (what, wrap, ready, share) in enumerate(inputs):
                tell("measuring", number * len(inputs) + at, len(asked.threads) * len(inputs))
                with running_on("the example input"):
                    run = evaluate.paired_latency(
                        {name: wrap(model) for name, model in candidates.items()},
                        ready,
                        repeats=asked.rounds,
                        warmup=2,
                    )
                _put(found, what, run, share)
    tell("measuring", 1, 1)
    for name, model in ((PACKED, packed), (TORCH, dense.model)):
        found.sizes.append(Measurement("state_bytes", _held(model), "bytes", {"model": name}))
    found.sizes.append(source.on_disk())
    return found


@dataclass
class _Source:
    """The folder, as dense model and as packed one."""

    spec: str
    asked: Asked
    loading: dict[str, Any]

    def __post_init__(self) -> None:
        place, self.build = source_of(self.spec, self.asked.seed)
        self.place = place or Path()

    def dense(self) -> models.Loaded:
        if not is_packed(self.place):
            dtype = None if self.build is not None else "auto"
            return models.load(self.spec, dtype=dtype, seed=self.asked.seed, **self.loading)
        model = load_packed(self.place, self.build, prefer=None, dense=True)
        built = self.build() if self.build is not None else None
        example = built[1] if isinstance(built, tuple) else None
        return models.Loaded(model, None, self.spec, "", "", self.place, example=example)

    def packed(self, dense: nn.Module, notes: list[str]) -> nn.Module:
        asked = self.asked
        if is_packed(self.place):
            return load_packed(self.place, self.build, prefer=asked.prefer)
        model, speed = copy.deepcopy(dense), asked.prefer == "speed"
        how: dict[str, Any] = {"outer": asked.outer, "block": asked.block}
        try:
            done = sparsify_(model, asked.kind, measure=speed, keep_dense=speed, **how)
        except UsageError:
            if not speed:
                raise
            done = sparsify_(model, asked.kind, measure=False, **how)  # or there is nothing to pack at all
            notes.append(f"{torch.get_num_threads()} threads: no layer is faster packed; packed all the same")
        notes.append(f"{torch.get_num_threads()} threads: {done}; {len(done.left_out)} layers left as they are")
        return model

    def on_disk(self) -> Measurement:
        place = self.place
        packed = is_packed(place)
        if packed or place.is_file():
            found = evaluate.disk_bytes(place / FILE if packed else place)
        else:  # masks lie below and do not count
            found = weight_files(place)[0]
        said = {"model": PACKED if packed else TORCH, "pattern": FILE if packed else "*.safetensors"}
        return Measurement("disk_bytes", found.value, "bytes", said)


class _Writes(nn.Module):
    """Greedy decoding as a forward pass."""

    def __init__(self, model: nn.Module, tokens: int):
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        state = self.model(input_ids, use_cache=True)
        for _ in range(self.tokens):
            input_ids = state.logits[:, -1:].argmax(-1)
            state = self.model(input_ids, past_key_values=state.past_key_values, use_cache=True)
        return input_ids


def _inputs(
    model: nn.Module, example: Any, asked: Asked
) -> list[tuple[str, Callable[[nn.Module], nn.Module], Any, int]]:
    """What is run: a name, the model as it is called, its input, and by what a time is divided."""
    found: list[tuple[str, Callable[[nn.Module], nn.Module], Any, int]] = [
        (f"batch {rows}", lambda one: one, _rows(example, rows), 1) for rows in dict.fromkeys((1, asked.batch))
    ]
    if asked.tokens and writes_text(model):
        ids = _rows(example, 1)["input_ids"][:, :PROMPT]
        found.append(("decoding, a token", lambda one: _Writes(one, asked.tokens), ids, asked.tokens))
    return found


def _rows(example: Any, rows: int) -> Any:
    """The first row of an example so many times."""

    def repeated(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        return leaf[:1].repeat(rows, *[1] * (leaf.dim() - 1))

    return pytree.tree_map(repeated, example)


def _put(found: Bench, what: str, run: evaluate.PairedLatency, share: int) -> None:
    """Latencies as they are, and how much faster the first model is than each other."""
    for name, each in run.latency.items():
        spread = each.spread and Spread(
            each.spread.low / share, each.spread.high / share, each.spread.kind, each.spread.repeats
        )
        said = {**each.conditions, "model": name, "what": what}
        found.latency.append(Measurement("latency", each.value / share, "ms", said, spread))
    for name, each in run.speedup.items():
        spread = each.spread and Spread(
            1 / each.spread.high, 1 / each.spread.low, each.spread.kind, each.spread.repeats
        )
        said = {**each.conditions, "model": PACKED, "over": name, "what": what}
        found.speedup.append(Measurement("speedup", 1 / each.value, "1", said, spread))


def _held(model: nn.Module) -> int:
    """Bytes of all tensors, tied ones once, dense weights kept beside included."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
