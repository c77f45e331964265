"""Packages that talk while they are imported or work, kept quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """No warning and no log up to a level, from anybody; both settings are as before afterwards.

    For imports: torchao tells of kernels for other machines, and torch of its own next release. For what torch logs of
    an exception before it raises it, which is told in one line.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, level))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
