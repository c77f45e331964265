"""How a long text is cut into windows that fit a model: pure counting, no model in sight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from secateur.errors import UsageError

__all__ = ["Window", "chunks", "rolling_windows", "sliding_windows"]


@dataclass(frozen=True)
class Window:
    """One forward pass over the tokens `begin` to `end` of a text, of which the last `scored` are judged.

    The model reads tokens `begin .. end-2` and its last `scored` predictions are compared with tokens
    `end-scored .. end-1`. The last token is never read: nothing after it is judged.
    """

    begin: int
    end: int
    scored: int

    @property
    def read(self) -> int:
        """How many tokens the model reads."""
        return self.end - self.begin - 1


def sliding_windows(length: int, context: int, stride: int, *, drop_last: bool = False) -> Iterator[Window]:
    """Windows of `context` tokens that start `stride` tokens apart; each judges only what is new in it.

    With `stride == context` the windows do not overlap and the first token of each is not judged (nothing
    comes before it). With a smaller stride every token of the text but its very first is judged exactly once.

    Args:
        length: tokens in the text.
        context: tokens per window, at least 2.
        stride: tokens between two starts, 1 to `context`.
        drop_last: leave out a last window that is shorter than `context`, as the code of the pruning papers
            does.

    Raises:
        UsageError: context below 2, or a stride outside 1 to `context` (a larger one would skip tokens).

    Source: Hugging Face, "Perplexity of fixed-length models" (the windows; for their weights see
        `perplexity`).

    Example:
        >>> [(w.begin, w.end, w.scored) for w in sliding_windows(10, context=4, stride=2)]
        [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
        >>> [(w.begin, w.end, w.scored) for w in sliding_windows(10, context=4, stride=4)]
        [(0, 4, 3), (4, 8, 3), (8, 10, 1)]
    """
    if context < 2:
        raise UsageError(f"context {context} leaves nothing to predict from; use at least 2 tokens")
    if not 1 <= stride <= context:
        raise UsageError(
            f"stride {stride} is not in 1 to {context}, the context; a larger one would skip tokens"
        )
    judged = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        scored = min(end - judged, end - begin - 1)
        if scored > 0 and not (drop_last and end - begin < context):
            yield Window(begin, end, scored)
        judged = end
        if end == length:
            return


def rolling_windows(length: int, context: int) -> Iterator[Window]:
    """The windows of the evaluation harness over a text that has one prefix token in front.

    Positions count the prefix token as 0, so the text is 1 to `length` and every token of it is judged. All
    windows read `context` tokens; the last one reaches back into what was judged before, so that it too reads
    a full context where the text is long enough.

    Args:
        length: tokens in the text, without the prefix.
        context: tokens the model may read, at least 1.

    Raises:
        UsageError: context below 1.

    Source: lm-evaluation-harness, `get_rolling_token_windows` with `context_len=1`.

    Example:
        >>> [(w.begin, w.end, w.scored) for w in rolling_windows(10, context=4)]
        [(0, 5, 4), (4, 9, 4), (6, 11, 2)]
    """
    if context < 1:
        raise UsageError(f"context {context} leaves nothing to predict from; use at least 1 token")
    judged = 0
    while judged < length:
        scored = min(length - judged, context)
        judged += scored
        yield Window(max(0, judged - context), judged + 1, scored)


def chunks(length: int, context: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the pieces of at most `context` tokens that a text falls into.

    Example:
        >>> list(chunks(10, 4))
        [(0, 4), (4, 8), (8, 10)]
    """
    if context < 1:
        raise UsageError(f"context {context} is not a number of tokens; use at least 1")
    for begin in range(0, length, context):
        yield begin, min(begin + context, length)
