"""Splits and weights for training on few examples, through scikit-learn: k folds, and classes that count alike."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import UsageError

__all__ = ["class_weights", "folds"]


def folds(labels: Tensor | int, k: int = 5, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Cut examples into k parts; each part is held out once.

    Args:
        labels: one whole number an example, "n": every part then has the classes in equal shares (stratified);
            several 0 or 1 for each, "n labels", or real numbers, or only the number of examples: parts at random.
        k: number of parts, at least 2.
        seed: of the shuffle.

    Returns:
        For each part, the indices to train on and the indices held out.

    Raises:
        UsageError: fewer than two parts, more parts than examples (or than the examples of the smallest class), or
            scikit-learn is missing.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> [sorted(labels[held_out].tolist()) for _, held_out in folds(labels, 2)]
        [[0, 1], [0, 1]]
    """
    selection = _sklearn("model_selection")
    count = labels if isinstance(labels, int) else len(labels)
    whole = not isinstance(labels, int) and labels.dim() == 1 and not labels.is_floating_point()
    if k < 2 or k > count:
        raise UsageError(f"{k} folds of {count} examples: expected at least 2 folds, and an example for each")
    if whole:
        assert isinstance(labels, Tensor)
        smallest = int(labels.unique(return_counts=True)[1].min())
        if smallest < k:
            raise UsageError(
                f"{k} folds: the smallest class has {smallest} examples, fewer than one a fold; use fewer folds, or "
                "give the number of examples instead of labels"
            )
        split = selection.StratifiedKFold(k, shuffle=True, random_state=seed)
        found = split.split(torch.zeros(count, 1).numpy(), labels.cpu().numpy())
    else:
        found = selection.KFold(k, shuffle=True, random_state=seed).split(torch.zeros(count, 1).numpy())
    return [(torch.from_numpy(train), torch.from_numpy(held_out)) for train, held_out in found]


def class_weights(labels: Tensor, classes: int | None = None) -> Tensor:
    """Weights that make every class count alike: n / (classes * examples of the class).

    Give them to a loss: `functools.partial(torch.nn.functional.cross_entropy, weight=class_weights(labels))`.

    Args:
        labels: whole numbers from 0, -100 left out.
        classes: how many there are; default the largest label and one.

    Raises:
        UsageError: no labels, a class without an example, or scikit-learn is missing.

    Example:
        >>> class_weights(torch.tensor([0, 0, 0, 1]))
        tensor([0.6667, 2.0000])
    """
    utils = _sklearn("utils")
    kept = labels[labels != -100].flatten().cpu()
    if not kept.numel() or kept.is_floating_point() or int(kept.min()) < 0:
        raise UsageError("class weights need labels: whole numbers from 0")
    count = int(kept.max()) + 1 if classes is None else classes
    missing = sorted(set(range(count)) ^ set(kept.unique().tolist()))
    if missing:
        raise UsageError(
            f"classes {missing[:5]} of {count} have no example (or are no class), so no weight can be said"
        )
    found = utils.class_weight.compute_class_weight("balanced", classes=kept.unique().numpy(), y=kept.numpy())
    return torch.from_numpy(found).float()


def _sklearn(name: str):
    try:
        import sklearn.model_selection
        import sklearn.utils.class_weight
    except ImportError as error:
        raise UsageError(
            "folds and class weights need scikit-learn: pip install 'secateur[metrics]'"
        ) from error
    return getattr(sklearn, name)
