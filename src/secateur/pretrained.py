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

from secateur.checkpoint import TOKENIZER_FILES, Checkpoint, one_line, read_object
from secateur.compressed import layout_of, read_compressed
from secateur.core.quiet import quiet as hushed
from secateur.errors import InputError, ResourceError, SecateurError, UsageError, nearest
from secateur.manifest import write_json

__all__ = ["build", "is_pretrained", "quiet", "read_generation_", "save_pretrained", "some"]

# Keys that choose kernels, code or other places; none of them belongs to what the model is.
_DROPPED = (
    "attn_impl",
    "experts_impl",
    "fusion_config",
    "distributed_config",
    "transformers_weights",
    "auto_map",
)
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
    layout = layout_of(checkpoint.config)
    state = None if layout is None else read_compressed(checkpoint.weights, layout)
    if state is not None:
        config = {k: v for k, v in checkpoint.config.items() if k not in _COMPRESSION}
        numbers = sum(tensor.numel() for tensor in state.values())
        checkpoint = replace(checkpoint, config=config, tensors=len(state), elements=numbers)
    with quiet():
        model_class, config = _class_and_config(checkpoint, trust_remote_code)
        with _told(checkpoint, f"cannot be loaded as {model_class.__name__}"), _bounded(checkpoint):
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


def read_generation_(model: Any, checkpoint: Checkpoint) -> None:
    """Give a model that was not built by `from_pretrained` the generation config of its folder."""
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        with _told(checkpoint, "makes no config of generation", generation.name):
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


def import_transformers() -> Any:
    """The package transformers, or an error that names the extra."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "Models in Hugging Face format need the extra hf: pip install 'secateur[hf]'."
        ) from error
    return transformers


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


def _class_and_config(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class that config.json's "architectures" names, found in the library's own table, and the config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw, path = checkpoint.config, checkpoint.folder / checkpoint.described_in
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        names = [""]
    if trust_remote_code and isinstance(raw.get("auto_map"), dict):
        return _remote_class_and_config(checkpoint, names[0])
    if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
        raise UsageError(
            f"{path}: the model needs Python code from its folder; read that code, then allow it with "
            f"trust_remote_code=True (--trust-remote-code)."
        )
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(f'{path}: model_type "{kind}" is not known; {nearest(str(kind), CONFIG_MAPPING)}.')
    known = _classes(kind)
    if names[0] not in known:
        said = f'architectures names "{names[0]}"' if names[0] else "no architectures, so the head is not known"
        raise InputError(f"{path}: {said}; for {kind} {nearest(names[0], known)}.")
    with _told(checkpoint, f"makes no {kind} config", checkpoint.described_in):
        _refuse_sizes(raw, checkpoint, path)
        config = CONFIG_MAPPING[kind].from_dict(_cleaned(raw))
    return getattr(import_transformers(), names[0]), config


def _classes(kind: str) -> list[str]:
    """Every class that the library's tables give for a model type."""
    from transformers.models.auto import modeling_auto

    known: set[str] = set()
    for table, content in vars(modeling_auto).items():
        if table.startswith("MODEL_") and table.endswith("_MAPPING_NAMES"):
            found = content.get(kind, ())
            known.update([found] if isinstance(found, str) else found)
    return sorted(known)


def _remote_class_and_config(checkpoint: Checkpoint, name: str) -> tuple[Any, Any]:
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = {key: value for key, value in checkpoint.config["auto_map"].items() if isinstance(value, str)}
    found = [value for key, value in references.items() if key != "AutoConfig" and value.split(".")[-1] == name]
    if not found:
        known = [value.split(".")[-1] for value in references.values()] or ["nothing"]
        raise InputError(
            f'{checkpoint.folder / "config.json"}: auto_map has no class "{name}"; {nearest(name, known)}.'
        )
    with _told(checkpoint, f"{name} cannot be loaded from the folder's code"):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=True, local_files_only=True)
        return get_class_from_dynamic_module(found[0], str(checkpoint.folder), local_files_only=True), config


def _cleaned(value: Any) -> Any:
    """The config without keys that name kernels or code; refused where the weights are quantized."""
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("quantization_config") is not None:
        raise UsageError("the weights are quantized; prune the checkpoint from which they were made.")
    return {key: _cleaned(item) for key, item in value.items() if not key.lstrip("_").startswith(_DROPPED)}


def _refuse_sizes(value: Any, checkpoint: Checkpoint, path: Path, key: str = "") -> None:
    """Numbers of layers and labels far beyond what the weight files can hold would be built for hours."""
    for name, item in value.items() if isinstance(value, dict) else [(key, item) for item in value]:
        if isinstance(item, dict | list):
            _refuse_sizes(item, checkpoint, path, name)
        bound = 1000 + (checkpoint.elements if "label" in name else 10 * checkpoint.tensors)
        counts = "layer" in name or "label" in name or "depth" in name
        if counts and isinstance(item, int) and item > bound and not checkpoint.pickled:
            raise InputError(
                f"{path}: {name} is {item}, but the weight files hold {checkpoint.tensors} tensors."
            )


@contextmanager
def _bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """Stop the construction of a model that grows far beyond its weight files, before it costs memory.

    A parameter is registered when it is made, when its weight is loaded and when it is tied, so a sound model
    registers two to three times what its files hold.
    """
    from torch.nn.modules import module as hooks

    tensors, elements = 1000 + 8 * checkpoint.tensors, 2**26 + 4 * checkpoint.elements
    seen = [0, 0]

    def count(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        seen[0], seen[1] = seen[0] + 1, seen[1] + tensor.numel()
        if seen[0] > tensors or seen[1] > elements:
            raise InputError(
                f"{checkpoint.folder / checkpoint.described_in}: describes a model far larger than the weight files "
                f"({checkpoint.tensors} tensors, {checkpoint.elements:,} numbers); restore or download both."
            )

    if checkpoint.pickled:  # nobody has looked into the file: there is nothing to measure by
        yield
        return
    with (
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ):
        yield


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
    with _told(checkpoint, "makes no tokenizer", ", ".join(vocabulary or present)):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")
    return tokenizer


@contextmanager
def _told(checkpoint: Checkpoint, what: str, name: str = "") -> Iterator[None]:
    """Turn whatever a library raises about the files into one line that names them."""
    place = checkpoint.folder / name if name else checkpoint.folder
    try:
        yield
    except SecateurError as error:
        if str(checkpoint.folder) in str(error):
            raise
        raise type(error)(f"{place}: {error}") from error
    except BaseException as error:
        # A panic of the tokenizers' Rust code is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = one_line(error)
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            raise ResourceError(f"{place}: too little memory ({reason}).") from error
        if isinstance(error, ImportError):
            raise UsageError(f"{place}: {what} without a package that is missing here ({reason}).") from error
        raise InputError(f"{place}: {what} ({type(error).__name__}: {reason}).") from error


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
