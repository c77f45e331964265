"""A request of the command line as a streamed run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from secateur import pretrained
from secateur.checkpoint import Checkpoint
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.model import Loaded, folder_of
from secateur.own import is_own
from secateur.request import UNITS_METHOD, PruneRequest, build_recipe, check_target
from secateur.sources import calibration
from secateur.stream.choosing import prepare_units
from secateur.stream.job import Prepared, prepare
from secateur.stream.opened import open_units, read_source
from secateur.stream.smaller import Shrinking

__all__ = ["prepare_as_asked", "prepare_units_as_asked"]

# settings that a streamed run cannot follow, and what to do instead
_REFUSED = {
    "evaluate": "measure the result afterwards with `secateur evaluate OUT`",
    "evaluate_tokens": "measure the result afterwards with `secateur evaluate OUT`",
    "labelled": "measure the result afterwards with `secateur evaluate OUT --labelled`",
    "evolution": "it belongs to method best, which compares whole models in memory",
    "dtype": "weights keep the types in which they are stored, and are computed with in float32",
}


def prepare_as_asked(
    asked: PruneRequest,
    *,
    memory: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    tell: Tell,
) -> Prepared:
    """Decide what a streamed run will do; nothing is written.

    Args:
        asked: the request.
        memory: what may be used; it decides nothing but whether the run is started.

    Raises:
        UsageError, InputError, ResourceError: whatever is wrong with the request, the files or the data.
    """
    check_target(asked)
    _check(asked)
    settled, notes = _with_method(asked)
    recipe = build_recipe(settled)
    folder = folder_of(asked.model, offline=offline, allow_pickle=False, trust_remote_code=trust_remote_code)
    checkpoint = read_source(folder, tell)

    def data(model: Any) -> Iterable[Any]:
        return _data(settled, checkpoint, model, trust_remote_code, tell)

    prepared = prepare(
        checkpoint,
        asked.sparsity,
        recipe,
        nonzero=asked.nonzero,
        data=data,
        only=list(asked.only) or None,
        skip=list(asked.skip) or None,
        permute=asked.permute,
        seed=asked.seed,
        memory=memory,
        trust_remote_code=trust_remote_code,
        tell=tell,
    )
    return replace(prepared, notes=(*notes, *prepared.notes))


def prepare_units_as_asked(
    asked: PruneRequest,
    *,
    memory: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    tell: Tell,
) -> Shrinking:
    """The same for whole units that are taken out of the files.

    Raises:
        UsageError, InputError, ResourceError: whatever is wrong with the request, the files or the data.
    """
    check_target(asked)
    _check(asked)
    if trust_remote_code:
        raise UsageError("--trust-remote-code does not go with --stream --shrink; leave --stream out")
    settled, notes = _with_units_method(asked)
    recipe = build_recipe(settled)
    folder = folder_of(asked.model, offline=offline, allow_pickle=False, trust_remote_code=False)
    opened = open_units(folder, tell)

    def data(model: Any) -> Iterable[Any]:
        return _data(settled, opened.checkpoint, model, False, tell)

    choosing = prepare_units(
        opened,
        asked.sparsity,
        recipe,
        target=asked.target,
        data=data,
        only=list(asked.only) or None,
        skip=list(asked.skip) or None,
        seed=asked.seed,
        memory=memory,
        tell=tell,
    )
    return Shrinking(choosing, tuple(notes))


def _with_units_method(asked: PruneRequest) -> tuple[PruneRequest, list[str]]:
    """The request with its method settled: flap without its mending where there are data, none is good without."""
    if asked.method == "best":
        raise UsageError("method best is for single weights; name a method for whole units, such as flap")
    if asked.method is not None:
        return asked, []
    if asked.data is None:
        raise UsageError(
            "which units? Give --data TEXT, for method flap, or name a method that needs none: --method l2, magnitude "
            "or random. For heads and neurons of language models those are no better than chance"
        )
    mend = asked.mend or "none"
    note = "No --method was given: flap; what stays is not mended, fine-tune the small model"
    return asked.model_copy(update={"method": UNITS_METHOD, "mend": mend}), [note]


def _with_method(asked: PruneRequest) -> tuple[PruneRequest, list[str]]:
    """The request with its method settled; `best` compares whole models, so it cannot be streamed."""
    if asked.method == "best":
        raise UsageError(
            "method best compares whole models in memory and does not go with --stream; name the one it starts from, "
            "--method alps"
        )
    if asked.method is not None:
        return asked, []
    method = "magnitude" if asked.data is None else "alps"
    why = "without --data" if asked.data is None else "what best starts from"
    return asked.model_copy(update={"method": method}), [f"No --method was given: {method}, {why}"]


def _check(asked: PruneRequest) -> None:
    for name, advice in _REFUSED.items():
        if getattr(asked, name) != PruneRequest.model_fields[name].default:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} does not go with --stream; leave it out: {advice}")
    if asked.device != "cpu":
        raise UsageError(f"--device {asked.device} does not go with --stream, which works on the CPU")
    if is_own(asked.model):
        raise UsageError(f"{asked.model}: --stream needs a folder with safetensors files; leave --stream out")


def _data(
    asked: PruneRequest, checkpoint: Checkpoint, model: Any, trust_remote_code: bool, tell: Tell
) -> Iterable[Any]:
    """Calibration batches from the user's text or function, as without `--stream`."""
    if asked.data is None:
        raise UsageError(
            f"method {asked.method} needs calibration data, and a streamed model writes no text of its own; give "
            "--data TEXT, for example --data python-docs"
        )
    tokenizer = None
    if not is_own(asked.data):
        tokenizer = pretrained.tokenizer_of(checkpoint, model.config, trust_remote_code)
        if tokenizer is None:
            raise UsageError(
                f"--data {asked.data}: this model has no tokenizer and reads no text; give batches with --data "
                "file.py:function"
            )
    loaded = Loaded(
        model,
        tokenizer,
        asked.model,
        "transformers",
        checkpoint.fingerprint,
        checkpoint.folder,
        checkpoint.files,
    )
    return calibration(asked, loaded, tell).batches()
