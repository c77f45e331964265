"""transformers models: a checked folder becomes the very model its config names, or a clear error.

transformers loads what it can and warns about the rest; a head that was not in the file is then random. Here
every missing, unexpected or misshapen tensor is an error. The class comes from the fixed table of the
library, which the config only selects from, and a model that outgrows its weight files is stopped while it
is built.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint import INTEGERS, TOKENIZER_FILES, Checkpoint, read_object
from secateur.compressed import layout_of, read_compressed
from secateur.core.quiet import quiet as hushed
from secateur.deploy import load_quantized_
from secateur.errors import InputError
from secateur.manifest import write_json
from secateur.named_class import bounded, class_and_config, import_transformers, told

__all__ = ["build", "is_pretrained", "quiet", "read_generation_", "save_pretrained", "some"]
_COMPRESSION = ("quantization_config", "compression_config")
_COPIED = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json", "generation_config.json")
_WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")


def build(
    checkpoint: Checkpoint, *, dtype: torch.dtype | str, trust_remote_code: bool, drop_unexpected: bool
) -> tuple[nn.Module, Any]:
    """Build the model that the config names, with the weights of the folder, and its tokenizer.

    Args:
        checkpoint: the folder, looked through.
        dtype: type of the parameters, or "auto" for what the config says.
        trust_remote_code: run Python files that lie in the folder where its config asks for that.
        drop_unexpected: leave out tensors of the file that the model has no place for.

    Returns:
        The model in eval mode; the tokenizer, None where the folder has none.

    Raises:
        InputError: config, weights and tokenizer do not make the model that the config names.
        UsageError: the model needs the folder's own code, or is quantized.
        ResourceError: too little memory.
    """
    import_transformers()
    if checkpoint.weights and checkpoint.weights[0].name == INTEGERS:
        return _of_integers(checkpoint, dtype, trust_remote_code)
    layout = layout_of(checkpoint.config)
    state = None if layout is None else read_compressed(checkpoint.weights, layout)
    if state is not None:
        config = {k: v for k, v in checkpoint.config.items() if k not in _COMPRESSION}
        numbers = sum(tensor.numel() for tensor in state.values())
        checkpoint = replace(checkpoint, config=config, tensors=len(state), elements=numbers)
    with quiet():
        model_class, config = class_and_config(checkpoint, trust_remote_code)
        with told(checkpoint, f"cannot be loaded as {model_class.__name__}"), bounded(checkpoint):
            model, report = model_class.from_pretrained(
                None if state is not None else checkpoint.folder,
                state_dict=state,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=not checkpoint.pickled,
                weights_only=True,
                ignore_mismatched_sizes=True,  # so that the report names them
                output_loading_info=True,
            )
        _refuse_gaps(checkpoint.folder, model_class.__name__, report, drop_unexpected)
        if state is not None:
            read_generation_(model, checkpoint)
        return model.eval(), tokenizer_of(checkpoint, config, trust_remote_code)


def _of_integers(
    checkpoint: Checkpoint, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """The model whose weights lie there as integers, with the floating-point weights that they stand for."""
    roomy = replace(checkpoint, elements=8 * checkpoint.elements)  # a byte holds up to eight weights
    with quiet():
        model_class, config = class_and_config(checkpoint, trust_remote_code)
        kind = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None) or torch.float32
        with told(checkpoint, f"cannot be built as {model_class.__name__}"), bounded(roomy):
            model = model_class._from_config(config, dtype=kind)
        load_quantized_(model, checkpoint.weights[0], dense=True)
        read_generation_(model, checkpoint)
        return model.eval(), tokenizer_of(checkpoint, config, trust_remote_code)


def read_generation_(model: Any, checkpoint: Checkpoint) -> None:
    """Give a model that was not built by `from_pretrained` the generation config of its folder."""
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        with told(checkpoint, "makes no config of generation", generation.name):
            kind: Any = import_transformers().GenerationConfig
            model.generation_config = kind.from_dict(read_object(generation))


def save_pretrained(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
    config: Any = None,
) -> None:
    """Write a transformers model so that stock `from_pretrained` loads the same numbers.

    Args:
        model: a transformers model; not changed.
        tokenizer: its tokenizer or None.
        folder: written into.
        dtype: type in which floating-point tensors are stored; None keeps the model's.
        source: folder from which tokenizer, generation and preprocessor files are copied as they are.
        config: written in place of the model's own.
    """
    with quiet():
        state = None if dtype is None else _cast(model.state_dict(), dtype)
        own = model.config
        before = own.dtype, own.architectures
        try:
            model.config = own if config is None else config
            model.save_pretrained(folder, state_dict=state)
        finally:
            model.config = own
            own.dtype, own.architectures = before
        if dtype is not None:
            write_json(
                folder / "config.json",
                read_object(folder / "config.json") | {"dtype": str(dtype).removeprefix("torch.")},
            )
        copied = [name for name in _COPIED if source is not None and (source / name).is_file()]
        for name in copied:
            shutil.copyfile(source / name, folder / name)  # type: ignore[operator]
        if tokenizer is not None and not set(copied) & set(TOKENIZER_FILES):
            tokenizer.save_pretrained(folder)


def is_pretrained(model: object) -> bool:
    """Whether `model` is a transformers model; does not import transformers for the answer."""
    return any(
        kind.__name__ == "PreTrainedModel" and "transformers" in kind.__module__ for kind in type(model).__mro__
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log, progress bars and warnings, and restore their settings afterwards.

    What it imports on the way (torchao) is silenced as well.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    with hushed():
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
            (enable_progress_bars if hub_bars else disable_progress_bars)()


def some(names: Any, count: int = 5) -> str:
    """The first few of many names, sorted."""
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _refuse_gaps(folder: Path, name: str, report: dict[str, Any], drop_unexpected: bool) -> None:
    """Missing tensors would be random and unexpected ones lost; both are errors, tied ones are neither."""
    said = []
    if report["missing_keys"]:
        said.append(f"missing in the files, so random: {some(report['missing_keys'])}")
    if report["mismatched_keys"]:
        shapes = [
            f"{key} {tuple(found)} instead of {tuple(made)}" for key, found, made in report["mismatched_keys"]
        ]
        said.append(f"of another shape than the config says: {some(shapes)}")
    if report["unexpected_keys"] and not drop_unexpected:
        said.append(
            f"without a place in the model: {some(report['unexpected_keys'])} (drop_unexpected=True "
            f"(--drop-unexpected) loads without them)"
        )
    if report["error_msgs"]:
        said.append(some(report["error_msgs"], 2))
    if said:
        raise InputError(f"{folder}: the weight files do not fit {name}. Tensors {'; tensors '.join(said)}.")


def tokenizer_of(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> Any:
    """The folder's tokenizer; None without a vocabulary, for which transformers would make an empty one."""
    from transformers import AutoTokenizer

    present = [name for name in TOKENIZER_FILES if name in checkpoint.files]
    vocabulary = [
        name for name in present if not name.endswith(("_config.json", "_map.json", "tokens.json", ".jinja"))
    ]
    if not vocabulary:
        said = (
            read_object(checkpoint.folder / "tokenizer_config.json")
            if "tokenizer_config.json" in present
            else {}
        )
        if said.get("tokenizer_class") not in _WITHOUT_FILES:
            return None
    with told(checkpoint, "makes no tokenizer", ", ".join(vocabulary or present)):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")
    return tokenizer


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in another type; names that share memory still share it."""
    done: dict[tuple[object, ...], Tensor] = {}
    for tensor in state.values():
        key = _place(tensor)
        if key not in done:
            done[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: done[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    if not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
