"""Schedules end exactly, never fall, and are refused before training when they could not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import constant, cubic, exponential, geometric, linear, points
from secateur.errors import UsageError
from secateur.schedule import Due, targets

RAMPS = st.sampled_from([linear, cubic, exponential])
PROGRESS = st.floats(0, 1)


@st.composite
def ramps(draw):
    curve = draw(RAMPS)
    ends = st.floats(0, 0.999) if curve is exponential else st.floats(0, 1)
    start, end = sorted((draw(ends), draw(ends)))
    return curve(start, end), start, end


@given(ramps())
def test_a_ramp_starts_and_ends_exactly(given):
    ramp, start, end = given
    assert ramp(0.0) == start
    assert ramp(0) == start
    assert ramp(1.0) == end
    assert ramp(1) == end


@given(ramps(), st.lists(PROGRESS, min_size=2, max_size=20))
def test_a_ramp_stays_between_its_ends_and_hardly_falls(given, places):
    """Rounding may let two neighbours fall by an ulp, which `targets` mends."""
    ramp, start, end = given
    values = [ramp(t) for t in sorted(places)]
    assert all(start - 1e-12 <= value <= end + 1e-12 for value in values)
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


@given(ramps(), st.integers(1, 50), st.integers(1, 20), st.integers(0, 1000))
def test_targets_of_every_update(given, updates, every, begin):
    ramp, start, end = given
    found = targets(ramp, Due(begin, begin + updates * every, every))
    assert len(found) == updates + 1
    assert (found[0], found[-1]) == (start, end)
    assert list(found) == sorted(found)
    assert all(0 <= sparsity <= 1 for sparsity in found)


def test_the_published_cubic():
    """Zhu and Gupta 2017, equation 1, for s_i = 0.1, s_f = 0.9, n = 10."""
    for k in range(11):
        expected = 0.9 + (0.1 - 0.9) * (1 - k / 10) ** 3
        assert cubic(0.1, 0.9)(k / 10) == pytest.approx(expected, abs=1e-15)


@given(st.floats(0, 0.9), st.floats(0.01, 0.99), st.integers(2, 30))
def test_exponential_prunes_the_same_fraction_of_what_is_left(start, fraction, updates):
    end = 1 - (1 - start) * fraction
    values = [exponential(start, end)(k / updates) for k in range(updates + 1)]
    shares = [(b - a) / (1 - a) for a, b in pairwise(values)]
    assert max(shares) - min(shares) < 1e-9


def test_constant_is_all_at_once():
    assert [constant(0.7)(t) for t in (0, 0.3, 1)] == [0.7] * 3
    assert repr(constant(0.7)) == "linear(0.7, 0.7)"


def test_points_are_met_and_joined_by_lines():
    schedule = points((0, 0.1), (0.25, 0.6), (1, 0.9))
    assert [schedule(t) for t in (0, 0.25, 1)] == [0.1, 0.6, 0.9]
    assert schedule(0.125) == pytest.approx(0.35)
    assert schedule(0.625) == pytest.approx(0.75)
    assert repr(schedule) == "points((0, 0.1), (0.25, 0.6), (1, 0.9))"
    assert schedule == points((0.0, 0.1), (0.25, 0.6), (1.0, 0.9))


@pytest.mark.parametrize(
    "given",
    [(), ((0, 0.1),), ((0, 0.1), (0.9, 0.5)), ((0.1, 0.1), (1, 0.5)), ((0, 0), (0.5, 0.1), (0.5, 0.2), (1, 1))],
)
def test_points_that_do_not_span_training(given):
    with pytest.raises(UsageError, match="expected at least two, rising, the first at 0 and the last at 1"):
        points(*given)


def test_points_that_are_no_pairs():
    with pytest.raises(UsageError, match=r"expected pairs of \(progress, sparsity\)"):
        points(0.1, 0.2)
    with pytest.raises(UsageError, match=r"points: sparsity 50 is not in \[0, 1\]. Did you mean 0.5\?"):
        points((0, 0), (1, 50))


@given(st.floats(0.001, 0.999), st.integers(1, 40))
def test_geometric_removes_a_fraction_of_what_is_left(fraction, rounds):
    left, found = 1.0, list(geometric(fraction, rounds))
    assert len(found) == rounds
    for sparsity in found:
        left *= 1 - fraction
        assert 1 - sparsity == pytest.approx(left, abs=1e-12)


@given(st.floats(0.001, 0.999), st.integers(1, 40))
def test_geometric_to_an_end_ends_there(end, rounds):
    found = list(geometric(rounds=rounds, end=end))
    assert found[-1] == end
    assert all(a <= b for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either the fraction that each round prunes or end="),
        ({"fraction": 0.2, "end": 0.5}, "give either the fraction"),
        ({"fraction": 20}, r"fraction 20 is not in \(0, 1\)"),
        ({"end": 1.0}, r"end 1.0 is not in \(0, 1\)"),
        ({"fraction": "a"}, r"fraction 'a' is not in \(0, 1\)"),
        ({"fraction": 0.2, "rounds": 0}, "rounds is 0; expected a whole number of at least 1"),
        ({"fraction": 0.2, "rounds": 2.5}, "rounds is 2.5; expected a whole number"),
    ],
)
def test_geometric_that_makes_no_sense(given, message):
    with pytest.raises(UsageError, match=message):
        geometric(**given)


@pytest.mark.parametrize("curve", [linear, cubic, exponential])
def test_ramps_out_of_range_or_falling(curve):
    with pytest.raises(UsageError, match=r"sparsity 50 is not in \[0, 1\]. Did you mean 0.5\?"):
        curve(0.0, 50)
    with pytest.raises(UsageError, match=r"sparsity nan is not in \[0, 1\]"):
        curve(0.0, math.nan)
    with pytest.raises(UsageError, match=r"sparsity -0.1 is not in \[0, 1\]$"):
        curve(-0.1, 0.5)
    with pytest.raises(UsageError, match=r"sparsity would fall from 0.9 to 0.5"):
        curve(0.9, 0.5)


def test_a_fraction_of_what_is_left_never_reaches_everything():
    with pytest.raises(UsageError, match="never reaches sparsity 1; end below 1, or take linear or cubic"):
        exponential(0.0, 1)


def test_due_counts_from_begin_to_end():
    due = Due(3, 9, 2)
    assert due.updates == 3
    assert [due.update(k) for k in range(12)] == [-1, -1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 3]


@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 100))
def test_an_interval_is_accepted_just_when_its_updates_fall_on_the_end(begin, span, every):
    reached = begin + span in range(begin, begin + span + 1, every)
    if reached:
        assert Due(begin, begin + span, every).update(begin + span) == span // every
    else:
        with pytest.raises(UsageError, match="the schedule never reaches its end: updates every"):
            Due(begin, begin + span, every)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, 5, 1), "begin 5 is not before end 5"),
        ((6, 5, 1), "begin 6 is not before end 5"),
        ((-1, 5, 1), "begin is -1; expected a whole number of steps, at least 0"),
        ((0, 5.0, 1), "end is 5.0; expected a whole number"),
        ((0, 5, 0), "every is 0; expected a whole number of steps, at least 1"),
        ((0, 5, True), "every is True"),
        ((0, 100, 30), "fall on 90 and 120, not on 100. Set end to one of these, or every to a divisor of 100"),
    ],
)
def test_intervals_that_make_no_sense(given, message):
    with pytest.raises(UsageError, match=message):
        Due(*given)


def test_a_schedule_of_the_users_own():
    def wave(progress):
        return 0.5 * progress**2

    assert targets(wave, Due(0, 4, 1)) == (0.0, 0.03125, 0.125, 0.28125, 0.5)
    with pytest.raises(UsageError, match=r"schedule <lambda> falls from 0.5 to 0.25 at progress 0.5"):
        targets(lambda t: 0.5 * (1 - t), Due(0, 2, 1))
    with pytest.raises(UsageError, match=r"schedule <lambda> at progress 0: sparsity None is not in \[0, 1\]"):
        targets(lambda t: None, Due(0, 2, 1))
    with pytest.raises(UsageError, match=r"schedule is 0.9; expected a function of progress"):
        targets(0.9, Due(0, 2, 1))


@given(steps=st.integers(2, 400), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), updates=st.integers(1, 50))
def test_updates_are_spread_over_part_of_a_training(steps, ends, updates):
    begin, end = sorted(ends)
    if round(end * steps) - round(begin * steps) < 1:
        with pytest.raises(UsageError):
            Due.spread(steps, begin, end, updates)
        return
    due = Due.spread(steps, begin, end, updates)
    assert due.begin == round(begin * steps)
    assert due.end <= round(end * steps)
    assert round(end * steps) - due.end < due.every
    assert updates <= due.updates < 2 * updates or due.every == 1


def test_a_training_too_short_for_its_schedule():
    with pytest.raises(
        UsageError, match=r"never reaches its end: no step of 4 lies between 0\.3 and 0\.35 of them"
    ):
        Due.spread(4, 0.3, 0.35)
    with pytest.raises(
        UsageError, match=r"begin 0\.7, end 0\.2 and 20 updates; expected 0 <= begin < end <= 1"
    ):
        Due.spread(100, 0.7, 0.2)
