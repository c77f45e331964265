"""`secateur export`: a pruned model's whole units taken out for good, in a folder that loads again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import data as texts
from secateur import evaluate, own
from secateur import measure as measuring
from secateur import model as models
from secateur.card import shrunk_card
from secateur.checkpoint import read_object
from secateur.compressed import layout_of
from secateur.core.masks import Masks
from secateur.core.unit_masks import PartialUnitsError
from secateur.deploy import Shrunk, shrink, shrunk
from secateur.deploy.slots import ATTRIBUTE
from secateur.errors import UsageError
from secateur.evaluate import Measurement
from secateur.folder import new_folder, write_json, write_text
from secateur.manifest import check_run
from secateur.measure import Tell, Yardstick
from secateur.request import spec_name
from secateur.run import check_apart
from secateur.shrunken import check_form
from secateur.sources import input_of

__all__ = [
    "Exported",
    "check_source",
    "example_inputs",
    "export_plain",
    "export_to",
    "is_compressed",
    "write_shrunk",
]

LENGTH = 13  # tokens of a made-up example: no width of a model


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        form: "hf", "padded" or "compact".
        note: what was taken out, and how that was checked.
        measurements: of the `masked` model and the `shrunk` one.
    """

    form: str
    note: Shrunk
    measurements: dict[str, list[Measurement]]


def export_to(
    spec: str,
    out: str | Path,
    *,
    to: str = "auto",
    data: str | None = None,
    speed: bool = True,
    if_exists: str = "fail",
    device: str = "cpu",
    seed: int = 0,
    tell: Tell,
    **loading: Any,
) -> Exported:
    """Load a pruned model with its masks, take the pruned units out, and write what is left.

    Args:
        spec: a run's folder, or `file.py:function@FOLDER/model.safetensors` of one; a compact folder is written in
            another form.
        out: the folder to write.
        to: see `secateur.save`.
        data: `file.py:function` that gives batches, for models of inputs that cannot be made up.
        speed: also measure latency, in turns with the masked model.
        if_exists: "fail" or "overwrite".
        device: where it is run.
        seed: of made-up inputs.
        tell: progress.
        loading: `offline`, `trust_remote_code`, `allow_pickle`.

    Raises:
        UsageError: no masks, masks that are not whole units, or a form that cannot say the result.
        InputError: a file of the run is altered.
    """
    check_form(to)
    check_apart(spec.partition("@")[2] if own.is_own(spec) else spec, out)
    with new_folder(out, if_exists) as folder:
        tell("loading the model", 0, 1)
        loaded = models.load(
            spec, dtype=None if own.is_own(spec) else "auto", device=device, seed=seed, **loading
        )
        tell("loading the model", 1, 1)
        check_source(loaded)
        before = vars(loaded.model).get(ATTRIBUTE)
        path = _masks_of(loaded)
        if path is None and isinstance(before, Shrunk):
            small, example = loaded.model, None
        elif path is None:
            raise UsageError(
                f"{spec}: no run/masks.safetensors beside the weights, so nothing says which units go. Give the folder "
                "of a run that cut whole units, such as secateur prune --pattern heads,neurons"
            )
        else:
            masks = Masks.load(path)
            example = example_inputs(loaded, data, seed=seed)
            tell("taking units out", 0, 1)
            try:
                small = shrink(loaded.model, masks, example, homogeneous=to == "padded")
            except PartialUnitsError as error:
                raise UsageError(f"{error} Single zeros are left out by --to sparse") from error
            tell("taking units out", 1, 1)
        return write_shrunk(loaded, small, example, folder, to=to, speed=speed, tell=tell)


def write_shrunk(
    loaded: models.Loaded,
    small: nn.Module,
    example: Any,
    folder: Path,
    *,
    to: str,
    speed: bool = True,
    tell: Tell,
) -> Exported:
    """Measure what `shrink` made beside the masked model, and write it into a folder that is there.

    Args:
        loaded: the masked model, and where it came from.
        small: what `shrink` made of it; the loaded model itself where that was shrunk before.
        example: inputs to count and to time on; None for none.
        folder: written into.
        to: see `secateur.save`.
        speed: also measure latency.
        tell: progress.
    """
    pair = {"masked": loaded.model, "shrunk": small} if small is not loaded.model else {"shrunk": small}
    by = Yardstick(example=example, tell=tell)
    found = {name: measuring.measure(model, by, None) for name, model in pair.items()}
    for name, latency in (measuring.compare_speed(pair, by) if speed else {}).items():
        found[name] += latency
    source = {"name": spec_name(loaded.spec), "sha256": loaded.fingerprint}
    tell("writing", 0, 1)
    form = models.save(small, loaded.tokenizer, folder, source=loaded.folder, to=to, made_from=source)
    tell("writing", 1, 1)
    found["shrunk"] += measuring.weight_files(folder)
    note = shrunk(small)
    (folder / "run").mkdir(exist_ok=True)
    said = {
        "form": form,
        "source": source,
        "difference": note.difference,
        "exact": note.exact,
        "axes": [dict(vars(axis)) for axis in note.axes],
        "measurements": {name: [m.to_dict() for m in each] for name, each in found.items()},
        "machine": evaluate.hardware("cpu"),
    }
    write_json(folder / "run" / "export.json", said)
    write_text(folder / "README.md", shrunk_card(loaded, form, note, found))
    return Exported(form, note, found)


def check_source(loaded: models.Loaded) -> None:
    """Refuse to export what is no longer what its run wrote: weights, masks, metrics, anything that it lists.

    Raises:
        InputError: a file is altered, by name.
    """
    folder = _folder_of(loaded)
    if folder is not None:
        check_run(folder, loaded.files)


def _folder_of(loaded: models.Loaded) -> Path | None:
    """The folder in which the weights lie; None where a function made them."""
    place = loaded.weights
    return place if place is None or place.is_dir() else place.parent


def _masks_of(loaded: models.Loaded) -> Path | None:
    """The masks of the run that wrote the weights."""
    folder = _folder_of(loaded)
    path = None if folder is None else folder / "run" / "masks.safetensors"
    return path if path is not None and path.is_file() else None


def is_compressed(folder: str | Path) -> bool:
    """Whether a folder leaves zeros out as compressed-tensors did."""
    config = Path(folder).expanduser() / "config.json"
    return config.is_file() and layout_of(read_object(config)) is not None


def export_plain(spec: str, out: str | Path, *, if_exists: str = "fail", tell: Tell, **loading: Any) -> None:
    """Write such a folder as a plain checkpoint, zeros and all, that stock `from_pretrained` loads."""
    check_apart(spec, out)
    with new_folder(out, if_exists) as folder:
        tell("loading the model", 0, 1)
        loaded = models.load(spec, dtype="auto", **loading)
        tell("loading the model", 1, 1)
        check_source(loaded)
        models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder)


def example_inputs(loaded: models.Loaded, data: str | None, *, seed: int = 0) -> Any:
    """Inputs on which a model can be analysed: the user's, or made up from what its config says.

    Raises:
        UsageError: the model wants something that cannot be made up.
    """
    if data is not None:
        if not own.is_own(data):
            raise UsageError(f"--data {data}: expected file.py:function that gives batches of inputs")
        return input_of(texts.read_batches(data, seed=seed, limit=1)[0])
    if loaded.example is not None:
        return loaded.example
    model: Any = loaded.model
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(seed)
    wanted = getattr(model, "main_input_name", "")
    vocabulary = getattr(config, "vocab_size", None)
    if wanted == "input_ids" and isinstance(vocabulary, int):
        ids = torch.randint(0, vocabulary, (2, LENGTH), generator=generator)
        if config.is_encoder_decoder:
            return {"input_ids": ids, "decoder_input_ids": ids[:, :-2].clone()}
        return {"input_ids": ids}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if wanted == "pixel_values" and isinstance(channels, int):
        high, wide = size if isinstance(size, (list, tuple)) else (size or 224, size or 224)
        return {"pixel_values": torch.randn(2, channels, high, wide, generator=generator)}
    raise UsageError(
        f"{loaded.spec}: the inputs of {type(model).__name__} cannot be made up; give --data file.py:function with "
        "batches of them, or let the function return the model and example inputs"
    )
