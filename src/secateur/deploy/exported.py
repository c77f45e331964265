"""Static int8 through torchao's PT2E path: weights and activations as integers in a graph that torch.compile takes.

After training (`quantize_static`), or with the rounding in view while the graph trains (`quantize_static_aware`).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.example import Example, prepared
from secateur.core.quiet import quiet
from secateur.core.stored import save_tensors
from secateur.errors import InputError, NumericError, UsageError

__all__ = ["load_static", "quantize_static", "quantize_static_aware", "save_static"]

FORMAT = "secateur.static.v1"


@torch.no_grad()
def quantize_static(model: nn.Module, data: Iterable[Any]) -> nn.Module:
    """A copy of a pruned model as an exported graph of static int8: activations get fixed scales from the data.

    Weights are symmetric, a scale for each output, so every pruned weight stays exactly zero, which is checked;
    activations are asymmetric, a scale for each tensor. The graph runs as it is, slowly, and through `torch.compile`
    in integer kernels where the processor has them.

    Args:
        model: not changed. Convolutions and linear layers become integers.
        data: tensors, pairs (input, labels), tuples of inputs, or mappings of keyword inputs, of which
            "labels" is left out. The first size of every tensor is the batch and may vary; lengths are those of the
            first batch.

    Raises:
        UsageError: torchao is missing, no data, batches of different inputs, or a model that cannot be exported.
        NumericError: a scale that is not symmetric about zero.

    Cost: one export of the model and a forward pass of the data; the float weights once more while it works.

    Source: torchao's X86InductorQuantizer and PT2E (torch.ao's eager quantization is deprecated).
    """
    batches = [prepared(model, batch) for batch in data]
    if not batches:
        raise UsageError("data holds no batch; static scales come from data")
    first = len(batches[0].args), set(batches[0].kwargs)
    for number, batch in enumerate(batches):
        if (len(batch.args), set(batch.kwargs)) != first:
            raise UsageError(
                f"batch {number} of the data has other inputs than the first: {len(batch.args)} in place and "
                f"{', '.join(sorted(batch.kwargs)) or 'none'} by name"
            )
    graph = _observed(_torchao(), model, batches[0])
    for batch in batches:
        graph(*batch.args, **batch.kwargs)
    return _converted(graph)


def quantize_static_aware(model: nn.Module, example: Any, train: Callable[[nn.Module], Any]) -> nn.Module:
    """Static int8 of a model that is trained on with weights and activations rounded: what they lose is learned.

    Args:
        model: pruned or not; not changed.
        example: a batch of training, as in the data of `quantize_static`.
        train: gets the graph that trains, every parameter under the name that it has in the model, and trains it in
            place: `lambda graph: finetune_(graph, batches, masks)`. Pruned weights must be held at zero there, as by
            masks; then they are integer zeros in the end.

    Raises:
        UsageError, NumericError: as `quantize_static`.

    Cost: one export and torchao's pattern matching, which takes longer than training a small network: 3 to 50 seconds.

    Source: torchao's prepare_qat_pt2e; batch norms train on and are folded in the end.
    """
    mine = copy.deepcopy(model)  # the graph shares its tensors
    graph = _aware(_torchao(), mine, prepared(mine, example))
    train(graph)
    return _converted(graph, aware=True)


def save_static(model: nn.Module, path: str | Path) -> None:
    """Write what `quantize_static` returned as one safetensors file: integers, scales, and the constants as JSON.

    Raises:
        UsageError: a model that `quantize_static` did not make.
    """
    constants = {node.name: [float(node.args[1]), int(node.args[2])] for node in _constant(model)}
    tensors = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    if not constants or not any(tensor.dtype == torch.int8 for tensor in tensors.values()):
        raise UsageError("the model holds no static integers; make them with quantize_static")
    aware = {"aware": True} if getattr(model, "meta", {}).get("secateur.aware") else {}
    header = json.dumps({"format": FORMAT, "constants": constants, **aware}, sort_keys=True)
    save_tensors(path, tensors, {"secateur": header})


@torch.no_grad()
def load_static(model: nn.Module, example: Any, path: str | Path) -> nn.Module:
    """What `save_static` wrote, in the graph of a model of the same architecture.

    Args:
        model: as it is built, whatever its weights; not changed.
        example: an input, for the export, as the data that it was made with.
        path: the file.

    Raises:
        InputError: no such file, altered content, or another architecture.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("secateur", "null"))
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        constants = {str(name): (float(s), int(z)) for name, (s, z) in header["constants"].items()}
        found = load_file(path)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: no file of a static model ({error})") from None
    given, parts, aware = prepared(model, example), _torchao(), header.get("aware") is True
    observed = _aware(parts, copy.deepcopy(model), given) if aware else _observed(parts, model, given)
    observed(*given.args, **given.kwargs)
    graph = _converted(observed, aware=aware)
    nodes = {node.name: node for node in _constant(graph)}
    wanted = dict((*graph.named_parameters(), *graph.named_buffers()))
    misfit = [
        n for n, t in wanted.items() if n not in found or found[n].shape != t.shape or found[n].dtype != t.dtype
    ]
    if nodes.keys() != constants.keys() or misfit or wanted.keys() != found.keys():
        raise InputError(f"{path} does not fit the model: another architecture, or another version of torchao")
    for name, (scale, zero) in constants.items():
        first, _, _, *rest = nodes[name].args
        nodes[name].args = (first, scale, zero, *rest)
    for name, tensor in wanted.items():
        tensor.copy_(found[name])
    graph.recompile()
    return graph


def _exported(model: nn.Module, example: Example, *, aware: bool = False) -> Any:
    """The model as a graph in which the batch may vary; in evaluation mode, or in that of training."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        exported = torch.export.export(
            model.train(aware), example.args, dict(example.kwargs), dynamic_shapes=_sizes(model, example)
        )
        return exported.module()
    except Exception as error:  # torch.export raises whatever the model's own code does
        raise UsageError(
            f"the model cannot be exported ({type(error).__name__}: {' '.join(str(error).split())[:200]}); weight-only "
            "int8 and int4 (quantize_) need no export"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def _sizes(model: nn.Module, example: Example) -> Any:
    """That the first size of every tensor is the batch, by the names of the inputs where some are keywords."""
    batch = torch.export.Dim("batch", min=1, max=1 << 16)

    def of(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() else None

    if not example.kwargs:
        return tuple(of(value) for value in example.args)
    bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    return {name: of(value) for name, value in bound.items()}


def _observed(parts: dict[str, Any], model: nn.Module, example: Example) -> Any:
    """The exported model with an observer wherever something becomes integers."""
    exported, quantizer = _exported(model, example), _quantizer(parts)
    with quiet():
        return parts["prepare"](exported, quantizer)


def _aware(parts: dict[str, Any], model: nn.Module, example: Example) -> Any:
    """The exported model with a rounding that training sees wherever something becomes integers, in training mode."""
    exported = _exported(model, example, aware=True)
    with quiet():
        graph = parts["prepare_aware"](exported, _quantizer(parts, aware=True))
    parts["modes"](graph)
    graph.train()
    return graph


def _quantizer(parts: dict[str, Any], aware: bool = False) -> Any:
    quantizer = parts["quantizer"]()
    quantizer.set_global(parts["config"](is_qat=aware))
    return quantizer


@torch.no_grad()
def _converted(observed: Any, aware: bool = False) -> Any:
    """Integers in place of observed weights, the floats that nobody reads any more dropped."""
    parts = _torchao()
    if aware:
        parts["to_eval"](observed)
    with quiet():
        graph = parts["convert"](observed)
    parts["to_eval"](graph)
    graph.meta["secateur.aware"] = aware
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers()) if n not in read]:
        path, _, attribute = name.rpartition(".")
        delattr(graph.get_submodule(path), attribute)
    for name, tensor in graph.named_buffers():
        if name.startswith("_zero_point") and bool(tensor.any()):
            raise NumericError(f"{name}: scales are not symmetric, so zeros would not stay zero")
    return graph


def _constant(graph: Any) -> list[Any]:
    """Nodes that hold an activation's scale and zero point."""
    wanted = ("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor")
    nodes = getattr(getattr(graph, "graph", None), "nodes", ())
    return [n for n in nodes if n.op == "call_function" and str(n.target).startswith(wanted)]


def _torchao() -> dict[str, Any]:
    with quiet():
        try:
            from torchao.quantization.pt2e import (
                allow_exported_model_train_eval,
                move_exported_model_to_eval,
            )
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
            from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
                X86InductorQuantizer,
                get_default_x86_inductor_quantization_config,
            )
        except ImportError as error:
            raise UsageError(
                f"static quantization needs torchao 0.18 ({error}): pip install 'secateur[quantize]'"
            ) from error
    return {
        "prepare": prepare_pt2e,
        "prepare_aware": prepare_qat_pt2e,
        "modes": allow_exported_model_train_eval,
        "convert": convert_pt2e,
        "to_eval": move_exported_model_to_eval,
        "quantizer": X86InductorQuantizer,
        "config": get_default_x86_inductor_quantization_config,
    }
