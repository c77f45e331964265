"""A model's folder from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from secateur import own
from secateur.checkpoint import OTHER_FILES, TOKENIZER_FILES, one_line
from secateur.errors import InputError, ResourceError, UsageError

__all__ = ["fetch"]


def fetch(name: str, *, offline: bool, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The folder of a model on the Hugging Face hub: from the cache, or downloaded unless `offline`.

    Raises:
        UsageError: there is no such name, as far as can be told without the network where it is not to be used or
            cannot be reached.
        InputError: a download that had begun failed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UsageError(
            f"{name}: a Hugging Face name needs the extra hf: pip install 'secateur[hf]'."
        ) from error
    wanted = [
        *OTHER_FILES,
        *TOKENIZER_FILES,
        "model*.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
    ]
    wanted += ["pytorch_model*.bin", "pytorch_model.bin.index.json"] * allow_pickle + [
        "*.py"
    ] * trust_remote_code
    local = own.near(name, [path.name for path in Path().iterdir() if path.is_dir()])
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=offline))
    except errors.HFValidationError as error:
        raise UsageError(f'"{name}" is neither a folder nor a Hugging Face name.{local}') from error
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{name}: its owner grants access by request; log in with `hf auth login` first."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f'"{name}" is no folder here and no model on the hub, or a private one.{local}'
        ) from error
    except Exception as error:
        if (isinstance(error, OSError) and error.errno is not None) and "No space left" in str(error):
            raise ResourceError(f"{name}: no space left on the disk for the download.") from error
        if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UsageError(
                f'"{name}" is no folder here and not in the cache, and nothing is downloaded offline.{local}'
            ) from error
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise UsageError(
                f'"{name}" is no folder here and not in the cache, and the hub, where it may be a name, cannot be '
                f"reached ({one_line(error.__cause__ or error)}); check the spelling, or the network.{local}"
            ) from error
        raise InputError(
            f'"{name}" is no folder here, and as a name on the hub its download failed ({one_line(error)}).{local}'
        ) from error
