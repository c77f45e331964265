from __future__ import annotations

import pytest

from secateur.errors import UsageError
from secateur.report import compare, measurement_section


def entry(name, value, unit="1", spread=None, **conditions):
    held = {"name": name, "value": value, "unit": unit, "conditions": conditions}
    return held | ({"spread": spread} if spread else {})


def cells(row):
    return [None if cell is None else cell["value"] for cell in row.cells]


def test_rows_join_by_name_unit_and_what_tells_them_apart():
    before = [
        entry("perplexity", 10.0, dataset="stories", seed=1),
        entry("perplexity", 30.0, dataset="wiki", seed=1),
        entry("size", 8, "bytes"),
    ]
    after = [
        entry("perplexity", 33.0, dataset="wiki", seed=2),
        entry("perplexity", 11.0, dataset="stories", seed=2),
        entry("kl_divergence", 0.5, "nats"),
    ]
    rows = compare({"before": before, "after": after})
    assert [(row.name, dict(row.telling), cells(row)) for row in rows] == [
        ("perplexity", {"dataset": "stories"}, [10.0, 11.0]),
        ("perplexity", {"dataset": "wiki"}, [30.0, 33.0]),
        ("size", {}, [8, None]),
        ("kl_divergence", {}, [None, 0.5]),
    ]
    assert [row.differing for row in rows] == [["seed"], ["seed"], [], []]
    assert "not the same for all: seed" in measurement_section({"before": before, "after": after}).body


def test_what_a_variant_is_does_not_make_its_values_hard_to_compare():
    variants = {
        name: [
            entry("latency", 9.0, "ms", model=name, batch=1, input="1 x 128", threads=1),
            entry("nonzeros", count, tensors=tensors, of=2 * count),
        ]
        for name, count, tensors in (("dense", 8, 4), ("shrunk", 5, 3))
    }
    assert [row.differing for row in compare(variants)] == [[], []]
    body = measurement_section(variants).body
    assert "not the same for all" not in body
    assert "input 1 x 128" in body


def test_repeats_that_nothing_tells_apart_stay_apart():
    rows = compare(
        {"a": [entry("latency", 1.0, "ms"), entry("latency", 2.0, "ms")], "b": [entry("latency", 3.0, "ms")]}
    )
    assert [cells(row) for row in rows] == [[1.0, 3.0], [2.0, None]]


@pytest.mark.parametrize(
    ("name", "unit", "before", "after", "said"),
    [
        ("perplexity", "1", 10.0, 12.0, ("+20.0 %", "worse")),
        ("top1_agreement", "1", 0.9, 0.85, ("−5.0 points", "worse")),
        ("accuracy", "1", 0.5, 0.75, ("+25.0 points", "better")),
        ("tokens per second", "tokens/s", 100, 250, ("+150.0 %", "better")),
        ("latency", "ms", 10.0, 9.0, ("−10.0 %", "better")),
        ("latency", "ms", 10, 10.0, ("no change", "same")),
        ("novelty", "1", 1.0, 2.0, ("+100.0 %", "")),
        ("perplexity", "1", 20.0, 210346.0, ("× 10,517", "worse")),
    ],
)
def test_what_is_said_of_a_change(name, unit, before, after, said):
    (row,) = compare({"before": [entry(name, before, unit)], "after": [entry(name, after, unit)]})
    assert row.change(1) == said
    assert row.change(0) == ("", "")


def test_overlapping_spreads_are_no_change_to_speak_of():
    def around(low, high):
        return {"low": low, "high": high, "kind": "range", "repeats": 5}

    near = {
        "a": [entry("latency", 10.0, "ms", around(9, 11))],
        "b": [entry("latency", 10.8, "ms", around(10.5, 11.2))],
    }
    far = {
        "a": [entry("latency", 10.0, "ms", around(9, 11))],
        "b": [entry("latency", 12.0, "ms", around(11.5, 12.2))],
    }
    assert compare(near)[0].change(1) == ("≈ +8.0 %", "same")
    assert compare(far)[0].change(1) == ("+20.0 %", "worse")


def test_titles_and_values_as_people_read_them():
    rows = compare(
        {"a": [entry("kl_divergence", 0.25, "nats"), entry("top1_agreement", 0.731), entry("rougeL", 0.4)]}
    )
    assert [(row.title, row.text(0)) for row in rows] == [
        ("KL divergence", "0.25 nats"),
        ("Top-1 agreement", "73.1 %"),
        ("ROUGE-L", "40.0 %"),
    ]


def test_many_variants_become_rows_and_two_become_columns():
    def variant(value):
        return [entry("perplexity", value, dataset="stories", cpu="some", torch="2.13")]

    few = measurement_section({"dense": variant(1.0), "pruned": variant(2.0)}).body
    many = measurement_section({f"v{i}": variant(float(i + 1)) for i in range(5)}).body
    assert "Quantity" in few.split("<tbody>")[0]
    assert "Variant" not in few.split("<tbody>")[0]
    assert "Variant" in many.split("<tbody>")[0]
    assert many.count("<tr>") == 1 + 5 + 1 + 5
    assert "All measured with cpu some, torch 2.13." in few
    assert "Changes are relative to “dense”." in few
    assert "Changes are relative" not in measurement_section({"dense": variant(1.0)}).body


def test_an_incomplete_measurement():
    with pytest.raises(
        UsageError, match=r"^a measurement of 'after' has no 'unit': \{'name': 'size', 'value': 3\}"
    ):
        compare({"after": [{"name": "size", "value": 3}]})


def test_infinite_perplexity_is_shown():
    rows = compare({"a": [entry("perplexity", 3.0)], "b": [entry("perplexity", float("inf"))]})
    assert (rows[0].text(1), rows[0].change(1)) == ("∞", ("", "worse"))
