"""Static int8 through torchao's PT2E path: weights and activations as integers in a graph that torch.compile takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.quiet import quiet
from secateur.errors import InputError, NumericError, UsageError

__all__ = ["load_static", "quantize_static", "save_static"]

FORMAT = "secateur.static.v1"


@torch.no_grad()
def quantize_static(model: nn.Module, data: Iterable[Any]) -> nn.Module:
    """A copy of a pruned model as an exported graph of static int8: activations get fixed scales from the data.

    Weights are symmetric, a scale for each output, so every pruned weight stays exactly zero, which is checked;
    activations are asymmetric, a scale for each tensor. The graph runs as it is, slowly, and through `torch.compile`
    in integer kernels where the processor has them.

    Args:
        model: takes one tensor; not changed. Convolutions and linear layers become integers.
        data: batches, as tensors or pairs (input, labels); the first dimension is the batch and may vary.

    Raises:
        UsageError: torchao is missing, no data, or a model that cannot be exported or takes more than a tensor.
        NumericError: a scale that is not symmetric about zero.

    Cost: one export of the model and a forward pass of the data; the float weights once more while it works.

    Source: torchao's X86InductorQuantizer and PT2E (torch.ao's eager quantization is deprecated).
    """
    batches = [_input_of(batch) for batch in data]
    if not batches:
        raise UsageError("data holds no batch; static scales come from data")
    prepared = _prepared(model, batches[0])
    for batch in batches:
        prepared(batch)
    return _converted(prepared)


def save_static(model: nn.Module, path: str | Path) -> None:
    """Write what `quantize_static` returned as one safetensors file: integers, scales, and the constants as JSON.

    Raises:
        UsageError: a model that `quantize_static` did not make.
    """
    from safetensors.torch import save_file

    constants = {node.name: [float(node.args[1]), int(node.args[2])] for node in _constant(model)}
    tensors = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    if not constants or not any(tensor.dtype == torch.int8 for tensor in tensors.values()):
        raise UsageError("the model holds no static integers; make them with quantize_static")
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    header = json.dumps({"format": FORMAT, "constants": constants}, sort_keys=True)
    try:
        save_file(tensors, beside, metadata={"secateur": header})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@torch.no_grad()
def load_static(model: nn.Module, example: Any, path: str | Path) -> nn.Module:
    """What `save_static` wrote, in the graph of a model of the same architecture.

    Args:
        model: as it is built, whatever its weights; not changed.
        example: an input, for the export.
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
    prepared = _prepared(model, _input_of(example))
    prepared(_input_of(example))
    graph = _converted(prepared)
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


def _input_of(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        raise UsageError(
            f"static quantization takes models of one tensor; got a batch of {type(first).__name__}. Weight-only "
            "int8 and int4 (quantize_) take any"
        )
    return first


def _prepared(model: nn.Module, example: Tensor) -> Any:
    """The exported model with an observer wherever something becomes integers."""
    parts = _torchao()
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    rows = (
        example if len(example) > 1 else torch.cat([example, example])
    )  # a batch of one would be taken for fixed
    modes = [(module, module.training) for module in model.modules()]
    try:
        exported = torch.export.export(model.eval(), (rows,), dynamic_shapes=({0: batch},)).module()
    except Exception as error:  # torch.export raises whatever the model's own code does
        raise UsageError(
            f"the model cannot be exported ({type(error).__name__}: {' '.join(str(error).split())[:200]}); weight-only "
            "int8 and int4 (quantize_) need no export"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    quantizer = parts["quantizer"]()
    quantizer.set_global(parts["config"]())
    with quiet():
        return parts["prepare"](exported, quantizer)


def _converted(prepared: Any) -> Any:
    """Integers in place of observed weights, the floats that nobody reads any more dropped."""
    parts = _torchao()
    with quiet():
        graph = parts["convert"](prepared)
    parts["to_eval"](graph)
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
            from torchao.quantization.pt2e import move_exported_model_to_eval
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
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
        "convert": convert_pt2e,
        "to_eval": move_exported_model_to_eval,
        "quantizer": X86InductorQuantizer,
        "config": get_default_x86_inductor_quantization_config,
    }
