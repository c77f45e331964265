"""What lies in a checkpoint's folder, looked at before any library builds something from it.

Everything here treats the files as hostile: sizes are checked before memory is spent, paths stay in the
folder, no file is unpickled unless the user insists, and every file used is hashed, and compared with the
folder's manifest where a run wrote one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import own
from secateur.errors import InputError, UsageError
from secateur.manifest import check_listed, sha256

__all__ = [
    "INTEGERS",
    "OTHER_FILES",
    "TOKENIZER_FILES",
    "Checkpoint",
    "headers",
    "look_through",
    "one_line",
    "read_checkpoint",
    "read_object",
    "read_state",
    "weight_file",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "tekken.json",
    "bpe.codes",
    "chat_template.jinja",
)
INTEGERS = "quantized.safetensors"  # in place of the weights, where an experiment ends in integers
OTHER_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_WEIGHTS = (*_PICKLES, ".safetensors")
_JSON_LIMIT = 512 * 2**20  # bytes; the largest tokenizer.json in use has about 40 MB
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face format whose files have been found sound.

    Attributes:
        folder: where the files lie.
        config: the parsed config.json.
        weights: the weight files, in order.
        tensors: how many tensors they hold; 0 where they are pickles, which are not opened here.
        elements: how many numbers.
        dtype: the floating-point type of most of the numbers; None for pickles.
        files: name -> SHA-256 of every file that loading uses.
        described_in: the file that holds the config.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: int
    elements: int
    dtype: torch.dtype | None
    files: dict[str, str]
    described_in: str = "config.json"

    @property
    def pickled(self) -> bool:
        """Whether the weights are pickles."""
        return self.weights[0].suffix != ".safetensors"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weight file; of the lines `SHA-256, two blanks, name` where there are several."""
        digests = [(self.files[path.name], path.name) for path in self.weights]
        return (
            digests[0][0]
            if len(digests) == 1
            else _digest_of(f"{digest}  {name}\n" for digest, name in digests)
        )


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Look through a folder in Hugging Face format without building anything from it.

    Args:
        folder: holds config.json and safetensors files.
        allow_pickle: accept pytorch_model.bin where there is no safetensors file.

    Raises:
        InputError: a file is missing, truncated, garbled, refused, or altered since a run wrote the folder.

    Cost:
        One read of all weight files, for their digests.
    """
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder} holds an adapter (adapter_config.json); merge it into its model first.")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no config.json, so this is no folder in Hugging Face format. For weights of your own "
            f"architecture give file.py:function@{folder / 'model.safetensors'}."
        )
    config = read_object(folder / "config.json")
    index, weights = _weight_files(folder, allow_pickle)
    return look_through(folder, config, weights, index)


def look_through(
    folder: Path,
    config: dict[str, Any],
    weights: list[Path],
    index: list[Path],
    described_in: str = "config.json",
) -> Checkpoint:
    """Check every file of a checkpoint whose weight files are known, and hash them.

    Raises:
        InputError: a file is truncated, garbled, or altered since a run wrote the folder.
    """
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        if name.endswith(".json") and (folder / name).is_file():
            read_object(folder / name)
    tensors = elements = 0
    types: Counter[str] = Counter()
    for path in weights:
        if path.suffix == ".safetensors":
            for dtype, size in headers(path).values():
                tensors, elements = tensors + 1, elements + size
                types[dtype] += size
    floating = [_DTYPES[name] for name, _ in types.most_common() if name in _DTYPES]
    others = dict.fromkeys((described_in, *OTHER_FILES, *TOKENIZER_FILES))
    used = [folder / name for name in others if (folder / name).is_file()]
    files = _digests(folder, [*used, *index, *weights])
    return Checkpoint(
        folder,
        config,
        tuple(weights),
        tensors,
        elements,
        floating[0] if floating else None,
        files,
        described_in,
    )


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises:
        InputError: the file is missing, too large, garbled, or holds something else.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise InputError(f"{path}: larger than {_JSON_LIMIT >> 20} MiB, which no such file is.")
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not readable as JSON ({one_line(error)}); restore or download it again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected, found {type(value).__name__}.")
    return value


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.")


def weight_file(place: Path) -> Path:
    """The file of weights of a module of one's own: the path itself, or what lies in that folder."""
    if not place.is_dir():
        return place
    whole = place / "model.safetensors"
    return place / INTEGERS if (place / INTEGERS).is_file() and not whole.is_file() else whole


def headers(path: Path) -> dict[str, tuple[str, int]]:
    """Name -> (type in safetensors' spelling, number of elements) of a safetensors file found sound.

    Raises:
        InputError: the header lies about its length, is garbled, tensors overlap, or data is missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # safetensors calls a file missing that may not be read
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found = {name: (part.get_dtype(), math.prod(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        reason = one_line(error).removeprefix("Error while deserializing header: ")
        raise InputError(
            f"{path}: not a sound safetensors file ({reason}); restore or download it again."
        ) from error
    if not found:
        raise InputError(f"{path}: a safetensors file without a single tensor.")
    return found


def read_state(path: Path, *, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one weight file as name -> tensor, and its tied names as alias -> name.

    Args:
        path: a safetensors file, or a pickle of tensors where `allow_pickle` says so. A pickle is opened with
            `weights_only=True`; the tensors may lie under the key "state_dict".
        allow_pickle: accept pickles.

    Raises:
        UsageError: there is no such file.
        InputError: the file is unsound, or a pickle that is refused.
    """
    if not path.is_file():
        near = own.near(path.name, [p.name for p in path.parent.glob("*") if p.suffix in _WEIGHTS])
        raise UsageError(f"{path}: no such file.{near}")
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        headers(path)
        with safe_open(path, framework="pt") as file:
            tied = _tied((file.metadata() or {}).get("tied", "{}"), path)
            return {name: file.get_tensor(name) for name in file.keys()}, tied  # noqa: SIM118
    _refuse_pickle(path, allow_pickle)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not readable as a file of tensors alone ({one_line(error)}).") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()
    ):
        raise InputError(f"{path}: a dictionary of tensors is expected, found something else.")
    return state, {}


def one_line(error: BaseException) -> str:
    """What an error says in one line of at most 300 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:300].rstrip(".: ") or type(error).__name__


def _weight_files(folder: Path, allow_pickle: bool) -> tuple[list[Path], list[Path]]:
    """The index file where there is one, and the weight files, in order."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(_DISTRIBUTED.fullmatch(name) for name in names):
        raise InputError(
            f"{folder}: a distributed checkpoint (shard-...); merge it into model.safetensors first."
        )
    for whole in ("model.safetensors", "pytorch_model.bin"):
        for name in (whole, f"{whole}.index.json"):
            if name in names:
                if whole.endswith(".bin"):
                    _refuse_pickle(folder / name, allow_pickle)
                return ([], [folder / name]) if name == whole else ([folder / name], _shards(folder / name))
    if INTEGERS in names:
        return [], [folder / INTEGERS]
    for name in names:
        if name.endswith(_PICKLES):
            _refuse_pickle(folder / name, allow_pickle)
    if "model.sparse.safetensors" in names:
        what = "packed without its zeros; secateur.load runs it, `secateur evaluate` and `secateur bench` measure it"
        raise UsageError(f"{folder}: {what}. Give the folder that it was packed from.")
    raise InputError(
        f"{folder}: no weights; model.safetensors or model.safetensors.index.json is expected, found "
        f"{', '.join(names[:8]) or 'nothing'}."
    )


def _shards(index: Path) -> list[Path]:
    content = read_object(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(content.get("metadata"), dict):
        raise InputError(f'{index}: "weight_map" and "metadata" are expected to be objects.')
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    shards = []
    for name in sorted({str(name) for name in places.values()}):
        if Path(name).name != name or not name.endswith(suffix):
            raise InputError(f"{index}: names {name!r}, which is no {suffix} file in the same folder.")
        if not (index.parent / name).is_file():
            raise InputError(
                f"{index.parent / name}: missing, though {index.name} names it; download it again."
            )
        shards.append(index.parent / name)
    return shards


def _refuse_pickle(path: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise InputError(
            f"{path}: a pickle, which can run code when it is opened, is refused. Convert it to safetensors, "
            f"or insist with allow_pickle=True (--allow-pickle), which still opens it with weights_only."
        )


def _digests(folder: Path, paths: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, compared with the folder's manifest where a run wrote one."""
    found = {path.name: sha256(path) for path in paths}
    check_listed(folder, found)
    return found


def _tied(text: str, path: Path) -> dict[str, str]:
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise InputError(f'{path}: the entry "tied" of its metadata is no table of names.')
    return tied


def _digest_of(lines: Iterator[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()
