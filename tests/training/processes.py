"""Run by test_processes: one of several processes that train the same model on their parts of each batch."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Gradual, Recipe, RigL, cubic, linear, movement, prune_, random, wanda
from secateur.core.sharded import whole

STEPS, BATCH = 8, 8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, rank: int, processes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs, labels = (
        torch.randn(BATCH, 12, generator=generator),
        torch.randint(0, 3, (BATCH,), generator=generator),
    )
    part = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    return inputs[part], labels[part]


def wrapped(kind: str, processes: int) -> nn.Module:
    model = network()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes,))
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model, optimizer, pruner, rank, processes, steps=range(STEPS)) -> list[int]:
    zeros = []
    for step in steps:
        inputs, labels = batch(step, rank, processes)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pruner.step()
        zeros.append(pruner.masks.zeros)
    return zeros


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in bare(model).named_parameters()}


def ordinary(kind: str, rank: int, processes: int) -> dict:
    model = wrapped(kind, processes)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    pruner = Gradual(model, movement_and_size, cubic(0.0, 0.8), 2, 6, 2, optimizer=optimizer)
    zeros = train(model, optimizer, pruner, rank, processes)
    return {"weights": weights(model), "masks": dict(pruner.masks), "zeros": zeros}


def both(weight, movement, grad):
    return weight.abs() + 1e-3 * movement + 1e-3 * grad.abs()


movement_and_size = Recipe(both)


def own_data(kind: str, rank: int, processes: int) -> dict:
    model = wrapped(kind, processes)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = [torch.randn(16, 12, generator=torch.Generator().manual_seed(rank)) * torch.logspace(-2, 2, 12)]
    pruner = Gradual(model, wanda, linear(0.2, 0.5), 1, 3, 1, optimizer=optimizer, data=data)
    train(model, optimizer, pruner, rank, processes, range(4))
    return {"weights": weights(model), "masks": dict(pruner.masks)}


def resumed(rank: int, processes: int) -> dict:
    """A state taken in the middle and loaded into a second model; then RigL, whose counts must stay."""
    ends = []
    for interrupted in (False, True):
        model = wrapped("fsdp", processes)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        pruner = Gradual(model, movement, cubic(0.0, 0.8), 2, 6, 2, optimizer=optimizer)
        train(model, optimizer, pruner, rank, processes, range(4))
        if interrupted:
            state = copy.deepcopy(pruner.state_dict())
            pruner.remove()
            pruner = Gradual(model, movement, cubic(0.0, 0.8), 2, 6, 2, optimizer=optimizer)
            pruner.load_state_dict(state)
        train(model, optimizer, pruner, rank, processes, range(4, STEPS))
        ends.append(weights(model))
        pruner.remove()
    masks = prune_(model, 0.8, random)
    grower = RigL(model, masks, optimizer, 1, 5, 2)
    train(model, optimizer, grower, rank, processes, range(6))
    same = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    kept, now = grower.masks, weights(model)
    held = all(not now[name].view(torch.int32)[~mask].any() for name, mask in kept.items())
    asked = {name: int(mask.sum()) for name, mask in masks.items()}
    moved = any(not torch.equal(kept[name], mask) for name, mask in masks.items())
    return {
        "same": same,
        "held": held,
        "moved": moved,
        "asked": asked,
        "kept": {n: int(m.sum()) for n, m in kept.items()},
        "masks": dict(kept),
    }


def main() -> None:
    kind, folder, rank, processes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    if kind.endswith("-data"):
        found = own_data(kind.removesuffix("-data"), rank, processes)
    elif kind == "fsdp-state":
        found = resumed(rank, processes)
    else:
        found = ordinary(kind, rank, processes)
    torch.save(found, folder / f"{rank}.pt")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
