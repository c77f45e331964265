import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import InputError, UsageError
from secateur.evaluate import Measurement, Spread

words = st.text(min_size=1, max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers() | finite
spreads = st.builds(
    lambda ends, kind, repeats: Spread(min(ends), max(ends), kind, repeats),
    st.tuples(finite, finite),
    st.sampled_from(Spread.KINDS),
    st.integers(1, 10**6),
)
measurements = st.builds(
    Measurement,
    words,
    numbers,
    words,
    st.dictionaries(words, st.booleans() | numbers | st.text(max_size=12), max_size=5),
    st.none() | spreads,
)


@given(measurements)
def test_a_measurement_survives_json_pickle_and_copying(measurement):
    written = json.dumps(measurement.to_dict(), allow_nan=False)
    for twin in (
        Measurement.from_dict(json.loads(written)),
        pickle.loads(pickle.dumps(measurement)),
        copy.deepcopy(measurement),
    ):
        assert twin == measurement
        assert hash(twin) == hash(measurement)
        assert type(twin.value) is type(measurement.value)
    assert isinstance(str(measurement), str)


def test_the_text_is_the_one_a_paper_would_print():
    conditions = {
        "protocol": "non-overlapping windows of 1024",
        "dataset": "",
        "context": 1024,
        "tokens": 286221,
    }
    conditions |= {"windows": 280, "batch": 2, "dtype": "float32", "device": "cpu"}
    text = str(Measurement("perplexity", 29.4134, "1", conditions))
    assert text == "perplexity 29.41 (non-overlapping windows of 1024, 286,221 tokens)"


@pytest.mark.parametrize(
    ("measurement", "text"),
    [
        (Measurement("nonzeros", 104690000, "1"), "nonzeros 104,690,000"),
        (Measurement("perplexity", 140123.4, "1"), "perplexity 140,123"),
        (Measurement("rate", 0.00012345, "Hz"), "rate 0.0001234 Hz"),
        (Measurement("files", 2, "1", {"examples": 1, "threads": 2}), "files 2 (1 example, 2 threads)"),
        (Measurement("x", 1, "s", {"cold": True, "warm": False}), "x 1 s (cold, not warm)"),
        (Measurement("x", 1, "s", {"cpu": "Z80", "torch": "2", "seed": 3}), "x 1 s (seed 3)"),
        (
            Measurement("latency", 12.3, "ms", {"batch": 4}, Spread(12, 13.5, "interquartile", 20)),
            "latency 12.3 ms (interquartile 12 to 13.5 of 20, batch 4)",
        ),
    ],
)
def test_texts(measurement, text):
    assert str(measurement) == text


def test_numpy_numbers_become_plain_ones():
    measurement = Measurement("x", np.float32(0.5), "1", {"n": np.int64(3)})
    assert (type(measurement.value), type(measurement.conditions["n"])) == (float, int)


def test_nothing_in_a_measurement_can_be_changed():
    conditions = {"seed": 1}
    measurement = Measurement("x", 1.0, "1", conditions)
    conditions["seed"] = 2
    assert measurement.conditions["seed"] == 1
    with pytest.raises(TypeError):
        measurement.conditions["seed"] = 3
    with pytest.raises(AttributeError):
        measurement.value = 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, "1"), "the name of a measurement must be a text that is not empty, got ''"),
        (("x", 1, ""), "the unit of a measurement must be a text that is not empty, got ''"),
        (("x", math.nan, "1"), "x: the value must be finite, got nan"),
        (("x", math.inf, "1"), "x: the value must be finite, got inf"),
        (("x", True, "1"), "x: the value must be a number, got bool True"),
        (("x", torch.tensor(1.0), "1"), r"x: the value must be a number, got Tensor tensor\(1.\)"),
        (("x", "1", "1"), "x: the value must be a number, got str '1'"),
        (("x", 1, "1", 5), "x: conditions must be a mapping, got int"),
        (("x", 1, "1", {"": 1}), "x: a condition's key must be a text that is not empty, got ''"),
        (("x", 1, "1", {"k": [1]}), "x: condition 'k' must be a text, a number or a yes/no, got list"),
        (("x", 1, "1", {"k": math.nan}), "x, condition 'k': the value must be finite, got nan"),
        (("x", 1, "1", {}, (1, 2)), "x: spread must be a Spread or None, got tuple"),
    ],
)
def test_what_is_no_measurement_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Measurement(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 1, "range", 3), "a spread runs from low to high, got 2 to 1"),
        ((1, math.inf, "range", 3), "the upper end of a spread: the value must be finite, got inf"),
        ((1, 2, "sigma", 3), "unknown kind of spread 'sigma'; known: interquartile, range, standard error"),
        ((1, 2, "range", 0), "a spread needs at least one repeat, got 0"),
        ((1, 2, "range", True), "a spread needs at least one repeat, got True"),
    ],
)
def test_what_is_no_spread_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Spread(*arguments)


GOOD = {"name": "x", "value": 1, "unit": "1", "conditions": {}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "a measurement must be an object with named entries, got list"),
        ({"name": "x"}, r"this measurement misses \['conditions', 'unit', 'value'\]; expected"),
        ({**GOOD, "extra": 1}, r"this measurement has unknown \['extra'\]; expected"),
        ({**GOOD, "value": "1"}, "this entry is no measurement: x: the value must be a number, got str '1'"),
        (
            {**GOOD, "conditions": None},
            "this entry is no measurement: x: conditions must be a mapping, got NoneType",
        ),
        ({**GOOD, "spread": 3}, "a spread must be an object with named entries, got int"),
        ({**GOOD, "spread": {"low": 1}}, r"this spread misses \['high', 'kind', 'repeats'\]"),
        (
            {**GOOD, "spread": {"low": "a", "high": 2, "kind": "range", "repeats": 1}},
            "this entry is no measurement: the lower end of a spread: the value must be a number, got str 'a'",
        ),
    ],
)
def test_a_damaged_entry_is_an_input_error(entry, message):
    with pytest.raises(InputError, match=message):
        Measurement.from_dict(entry)
