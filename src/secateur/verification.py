"""`secateur verify`: a run's folder is what it was when it was written."""

from __future__ import annotations

from pathlib import Path

from secateur.core.masks import Masks
from secateur.errors import InputError, SecateurError
from secateur.folder import verify

__all__ = ["problems"]


def problems(folder: str | Path) -> list[str]:
    """What is wrong with a run's folder; an empty list when nothing is.

    Every file is compared with the manifest; the masks are read; every weight that a mask prunes must be
    stored as exactly zero, and no weight is read into a model for that.

    Raises:
        UsageError: this is no folder.
        InputError: it has no manifest.
    """
    folder = Path(folder)
    found = verify(folder)
    path = folder / "run" / "masks.safetensors"
    if not path.is_file():
        return found
    try:
        masks = Masks.load(path)
    except SecateurError as error:
        return [*found, str(error)]
    return [*found, *_not_zero(folder, masks)]


def _not_zero(folder: Path, masks: Masks) -> list[str]:
    """Pruned weights that are stored as something else than zero, and masks without a weight."""
    from safetensors import SafetensorError, safe_open

    found, seen = [], set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if name not in masks:
                        continue
                    seen.add(name)
                    weight = file.get_tensor(name)
                    if weight.shape != masks[name].shape:
                        found.append(
                            f"{path.name}: {name} has shape {tuple(weight.shape)}, its mask {tuple(masks[name].shape)}"
                        )
                    elif bool((weight[~masks[name]] != 0).any()):
                        count = int((weight[~masks[name]] != 0).sum())
                        found.append(f"{path.name}: {name} holds {count:,} pruned weights that are not zero")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not readable as safetensors ({error})") from None
    missing = [name for name in masks if name not in seen]
    return found + [
        f"run/masks.safetensors: {name} has a mask, but no file holds its weight" for name in missing
    ]
