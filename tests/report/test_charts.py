"""The parts of a page that are new numbers: Pareto fronts, pictures of masks, heat maps, sensitivity."""

from __future__ import annotations

import base64
import itertools
import json
import re
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.report import (
    HeatMap,
    LayerRow,
    Point,
    Sensitivity,
    Tradeoff,
    heat_section,
    histogram,
    page,
    picture,
    picture_section,
    sensitivity_section,
    sparsity_section,
    tradeoff_section,
)

from .pages import heads, sensitivity, weights

WAYS = list(itertools.product(("lower", "higher"), repeat=2))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=14), st.sampled_from(WAYS))
def test_the_front_is_what_no_other_point_beats(places, better):
    points = [Point(x, y) for x, y in places]
    half = len(points) // 2
    front = Tradeoff("t", "x", "y", {"a": points[:half], "b": points[half:]}, better=better).front()
    signs = [1 if way == "higher" else -1 for way in better]
    worth = [(signs[0] * x, signs[1] * y) for x, y in places]
    best = {
        one for one in worth if not any(two != one and two[0] >= one[0] and two[1] >= one[1] for two in worth)
    }
    assert {(signs[0] * p.x, signs[1] * p.y) for p in front} == best
    assert len(front) == len(best)
    assert [p.x for p in front] == sorted(p.x for p in front)


def test_the_front_is_told_in_the_table_and_absent_without_a_direction():
    lines = {"a": [Point(0.5, 2.0), Point(0.7, 9.0)], "b": [Point(0.5, 3.0)]}
    body = tradeoff_section(Tradeoff("t", "x", "y", lines, better=("higher", "lower"))).body
    assert body.count("on the front") == 2
    assert "Pareto front" in body
    plain = tradeoff_section(Tradeoff("t", "x", "y", lines)).body
    assert "front" not in plain.replace('"front":[]', "")


def cells(stored: dict) -> list[int]:
    both = [part for byte in base64.b64decode(stored["cells"]) for part in (byte >> 4, byte & 15)]
    return both[: stored["height"] * stored["width"]]


def stored(body: str, anchor: str) -> dict:
    found = re.search(rf'id="{anchor}-data">(.*?)</script>', body, re.DOTALL)
    assert found
    return json.loads(found.group(1))


@settings(max_examples=8)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_a_picture_tells_which_part_of_each_cell_is_kept(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    held = picture(mask)
    assert (held.rows, held.columns) == (rows, columns)
    assert held.kept == int(mask.sum())
    assert held.exact == (rows <= 48 and columns <= 48)
    for at, value in list(enumerate(held.cells))[:: max(1, len(held.cells) // 40)]:
        row, column = divmod(at, held.width)
        top, bottom = row * rows // held.height, -(-(row + 1) * rows // held.height)
        left, right = column * columns // held.width, -(-(column + 1) * columns // held.width)
        assert abs(value / 15 - float(mask[top:bottom, left:right].float().mean())) <= 0.5 / 15 + 1e-6
    kept = cells(stored(picture_section({"a": held}).body, "masks")["pictures"][0])
    assert bytes(kept) == held.cells


def test_the_shape_of_a_mask():
    mask = torch.ones(4, 2, 3, dtype=torch.bool)  # a convolution: four outputs of six inputs
    mask[1] = False
    mask[:, 0, 0] = False
    mask[2, 1] = False
    held = picture(mask)
    assert (held.rows, held.columns, held.empty_rows, held.empty_columns) == (4, 6, 1, 1)
    assert (held.low, held.high) == (pytest.approx(1 / 6), 1.0)
    body = picture_section({"conv": held}).body
    assert "4 × 6" in body
    assert "16.7 % to 100 %" in body
    for wrong in (torch.ones(3), torch.ones(0, 3, dtype=torch.bool), torch.tensor(True)):
        with pytest.raises(UsageError, match="a picture is made of a boolean mask with weights"):
            picture(wrong)
    with pytest.raises(UsageError, match="there are no masks to show"):
        picture_section({})


def test_a_heat_map_keeps_its_numbers_and_marks():
    body = heat_section(heads()).body
    data = stored(body, "heat")
    assert data["values"] == [[0.125, 4.0, None, 1.0], [3.5, 2.0, 0.5, 1.5]]
    assert data["marked"] == [[0, 0], [1, 2]]
    assert re.findall(r'data-value="([^"]+)"', body) == ["0.125", "4.0", "1.0", "3.5", "2.0", "0.5", "1.5"]
    assert body.count(" removed</span>") == 2
    assert "A cross marks what was removed" in body
    empty = HeatMap("t", ["a"], ["b"], [[None]], "q")
    assert "no numbers" in heat_section(empty).body
    with pytest.raises(UsageError, match="heat map 't': 1 rows of numbers for 2 names"):
        HeatMap("t", ["a", "b"], ["c"], [[1.0]], "q")
    with pytest.raises(UsageError, match="row 'a': 1 numbers under 2 columns"):
        HeatMap("t", ["a"], ["b", "c"], [[1.0]], "q")
    with pytest.raises(UsageError, match=r"the mark at \(0, 1\) lies outside"):
        HeatMap("t", ["a"], ["b"], [[1.0]], "q", marked=frozenset({(0, 1)}))


def test_numbers_in_a_heat_map_stand_out_from_every_shade():
    """The page takes whichever of two inks contrasts more with the cell; WCAG 2 asks for 4.5."""
    css = resources.files("secateur.report").joinpath("page.css").read_text()

    def luminance(rgb: list[float]) -> float:
        parts = [p / 255 / 12.92 if p <= 0.03928 * 255 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in rgb]
        return sum(part * weight for part, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))

    def colors(name: str) -> list[list[float]]:
        return [
            [int(hex[i : i + 2], 16) for i in (0, 2, 4)] for hex in re.findall(rf"--{name}: #(\w{{6}})", css)
        ]

    light_and_dark = zip(
        *(colors(name) for name in ("heat-0", "heat-1", "heat-ink-0", "heat-ink-1")), strict=True
    )
    themes = list(light_and_dark)
    assert len(themes) == 2
    for pale, dark, *inks in themes:
        for step in range(101):
            cell = luminance([a + (b - a) * step / 100 for a, b in zip(pale, dark, strict=True)])
            ratios = [(max(cell, luminance(i)) + 0.05) / (min(cell, luminance(i)) + 0.05) for i in inks]
            assert max(ratios) >= 4.5, (step, ratios)


def test_sensitivity_lists_the_most_sensitive_first_and_says_what_is_missing():
    content = sensitivity(weights())
    first, second = weights()
    assert content.ranked() == [second, first]
    body = sensitivity_section(content).body
    assert "Not measured yet: 1 point." in body
    data = stored(body, "sensitivity")
    assert data["names"] == [second, first]
    assert data["values"] == [[0.02, 0.125, 2.0], [0.01, 0.02, None]]
    with pytest.raises(UsageError, match="a: 1 values for 2 sparsities"):
        Sensitivity([0.1, 0.2], {"a": [1.0]}, "q")
    for wrong in ([], [0.5, 0.1], [0.1, 0.1]):
        with pytest.raises(UsageError, match="expected ascending numbers"):
            Sensitivity(wrong, {}, "q")


def test_what_layers_lost_is_told_where_it_was_measured():
    rows = [LayerRow("a", (2,), "", 2, 1, lost=0.25), LayerRow("b", (2,), "", 2, 1)]
    body = sparsity_section(rows, lost="output error").body
    assert stored(body, "sparsity")["lost"] == [0.25, None]
    assert "Output error" in body
    assert "25.0 %" in body
    assert stored(sparsity_section(rows[1:]).body, "sparsity")["lost"] is None


def test_an_unfinished_run_says_so():
    assert "Not finished. </b>3 of 9" in page("t", summary="s", unfinished="3 of 9 points are done.")
    assert "Not finished" not in page("t", summary="s")


def test_more_of_the_same_get_anchors_of_their_own():
    text = page("t", summary="s", heat_maps=[heads(), heads()])
    assert 'id="heat"' in text
    assert 'id="heat-2"' in text
    assert histogram(torch.ones(1)).n == 1
