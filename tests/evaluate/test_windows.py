import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.evaluate.windows import chunks, rolling_windows, sliding_windows

lengths = st.integers(0, 200)
contexts_and_strides = st.integers(2, 40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c)))


def judged(windows):
    return [at for window in windows for at in range(window.end - window.scored, window.end)]


@given(lengths, contexts_and_strides)
def test_overlapping_windows_judge_every_token_but_the_first_exactly_once(length, sizes):
    context, stride = sizes
    windows = list(sliding_windows(length, context, stride))
    if stride < context:
        assert judged(windows) == list(range(1, length))
    for window in windows:
        assert 1 <= window.read < context
        assert 1 <= window.scored <= window.read
        if window.begin > 0 and stride < context:
            # What is judged has at least context - stride tokens before it.
            assert window.end - window.scored - window.begin >= context - stride


@given(lengths, st.integers(2, 40))
def test_windows_that_do_not_overlap_leave_out_the_first_token_of_each(length, context):
    windows = list(sliding_windows(length, context, context))
    assert judged(windows) == [at for at in range(length) if at % context]
    full = list(sliding_windows(length, context, context, drop_last=True))
    assert full == [window for window in windows if window.end - window.begin == context]
    assert len(full) == length // context


@given(lengths, contexts_and_strides)
def test_sliding_windows_are_the_documented_ones(length, sizes):
    context, stride = sizes
    expected, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        targets = list(range(begin, end))
        kept = targets[-(end - before) :] if end > before else []
        kept = [at for at in kept if at > begin]
        if kept:
            expected.append((begin, end, len(kept)))
        before = end
        if end == length:
            break
    assert [(w.begin, w.end, w.scored) for w in sliding_windows(length, context, stride)] == expected


@given(lengths, st.integers(1, 40))
def test_rolling_windows_judge_every_token_exactly_once(length, context):
    windows = list(rolling_windows(length, context))
    assert judged(windows) == list(range(1, length + 1))
    for window in windows:
        assert window.read == min(context, length)


@given(st.integers(1, 200), st.integers(1, 40))
def test_rolling_windows_are_those_of_the_harness(length, context):
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm-eval: pip install 'secateur[harness]'")
    tokens = list(range(1, length + 1))
    pairs = utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=context, context_len=1)
    with_prefix = [0, *tokens]
    for window, (read, predicted) in zip(rolling_windows(length, context), pairs, strict=True):
        assert with_prefix[window.begin : window.end - 1] == read
        assert with_prefix[window.end - window.scored : window.end] == predicted


@given(lengths, st.integers(1, 40))
def test_chunks_cover_everything_once(length, context):
    pieces = list(chunks(length, context))
    assert [at for begin, end in pieces for at in range(begin, end)] == list(range(length))
    assert all(0 < end - begin <= context for begin, end in pieces)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: list(sliding_windows(5, 1, 1)),
            "context 1 leaves nothing to predict from; use at least 2 tokens",
        ),
        (
            lambda: list(sliding_windows(5, 4, 0)),
            "stride 0 is not in 1 to 4, the context; a larger one would skip",
        ),
        (
            lambda: list(sliding_windows(5, 4, 5)),
            "stride 5 is not in 1 to 4, the context; a larger one would skip",
        ),
        (lambda: list(rolling_windows(5, 0)), "context 0 leaves nothing to predict from; use at least 1 token"),
        (lambda: list(chunks(5, 0)), "context 0 is not a number of tokens; use at least 1"),
    ],
)
def test_impossible_windows_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
