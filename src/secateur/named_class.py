"""Which class of transformers a folder's config names, from the library's own tables, and building it within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.checkpoint import Checkpoint, one_line
from secateur.errors import InputError, ResourceError, SecateurError, UsageError, nearest

__all__ = ["bounded", "class_and_config", "classes_of", "import_transformers", "told"]

# Keys that choose kernels, code or other places; none of them belongs to what the model is.
_DROPPED = (
    "attn_impl",
    "experts_impl",
    "fusion_config",
    "distributed_config",
    "transformers_weights",
    "auto_map",
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


def class_and_config(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
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
    known = classes_of(kind)
    if names[0] not in known:
        said = f'architectures names "{names[0]}"' if names[0] else "no architectures, so the head is not known"
        raise InputError(f"{path}: {said}; for {kind} {nearest(names[0], known)}.")
    with told(checkpoint, f"makes no {kind} config", checkpoint.described_in):
        _refuse_sizes(raw, checkpoint, path)
        config = CONFIG_MAPPING[kind].from_dict(_cleaned(raw))
    return getattr(import_transformers(), names[0]), config


def classes_of(kind: str) -> list[str]:
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
    with told(checkpoint, f"{name} cannot be loaded from the folder's code"):
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
def bounded(checkpoint: Checkpoint) -> Iterator[None]:
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


@contextmanager
def told(checkpoint: Checkpoint, what: str, name: str = "") -> Iterator[None]:
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
