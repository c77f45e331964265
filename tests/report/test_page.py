from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.report import (
    HeatMap,
    Histogram,
    LayerRow,
    Section,
    Sensitivity,
    Stage,
    Table,
    document,
    histogram,
    page,
    picture,
    sparsity_section,
    table_section,
)
from secateur.report.markup import Html, data_block, named, plain, shown, tag

from .pages import HOSTILE, hostile, rows, usual, weights


class Reader(HTMLParser):
    """The page as a parser sees it: elements with attributes, the text of each script, all other text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        else:
            self.text.append(data)

    def values(self, **wanted: str) -> list[str | None]:
        """`data-value` of the elements with these attributes."""
        found = [a for _, a in self.elements if all(a.get(k.replace("_", "-")) == v for k, v in wanted.items())]
        return [attributes.get("data-value") for attributes in found]


@pytest.fixture(scope="module")
def usual_page() -> str:
    return usual()


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return hostile()


def test_the_policy_names_exactly_the_scripts_of_the_page(usual_page):
    reader = Reader(usual_page)
    policy = next(a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    run = [text for attributes, text in reader.scripts if "type" not in attributes]
    assert len(run) == 2
    digests = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == digests
    assert policy.startswith("default-src 'none';")
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "http" not in policy


def test_nothing_in_the_page_points_elsewhere(usual_page, hostile_page):
    for text in (usual_page, hostile_page):
        for element, attributes in Reader(text).elements:
            assert not attributes.keys() & {"src", "srcset", "action", "data", "poster", "background"}
            assert not any(key.startswith("on") for key in attributes)
            if "href" in attributes:
                assert re.fullmatch(r"#[a-z0-9-]+|data:,", attributes["href"] or ""), element
        style = text.split("<style>")[1].split("</style>")[0]
        assert "url(" not in style
        assert "@import" not in style


def test_the_numbers_of_the_page_are_those_put_in(usual_page):
    reader = Reader(usual_page)
    assert reader.values(data_name="perplexity") == ["12.5", "15.0"]
    assert reader.values(data_name="nonzeros") == ["9216", "4608"]
    data = {a["id"]: json.loads(text) for a, text in reader.scripts if a.get("type") == "application/json"}
    counted = data["weights-data"]["histograms"][0][1]
    assert Histogram.from_dict(counted) == histogram(weights()["blocks.1.ffn.up.weight"])
    assert data["sparsity-data"]["zeros"] == [row.zeros for row in rows(weights())]
    assert data["tradeoff-data"]["lines"][0]["points"][1][:4] == [0.5, 15.0, 14.0, 16.5]
    text = "".join(reader.text)
    for said in ("toy model", "+20.0 %", "▼", "≈ +5.0 %", "Nothing was retrained.", "9,216"):
        assert said in text


def test_the_frame_of_the_page(usual_page):
    reader = Reader(usual_page)
    elements = dict(reversed(reader.elements))
    assert usual_page.startswith('<!doctype html>\n<html lang="en">')
    assert {"header", "nav", "main", "footer", "h1", "h2"} <= elements.keys()
    assert [e for e, _ in reader.elements].count("h1") == 1
    headed = [a.get("aria-labelledby") for e, a in reader.elements if e == "section"]
    assert headed == [
        f"{a}-heading"
        for a in (
            "measurements",
            "tradeoff",
            "sparsity",
            "weights",
            "threshold",
            "masks",
            "sensitivity",
            "heat",
            "activations",
            "table-1",
            "notes",
        )
    ]
    identifiers = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    linked = {a["href"][1:] for e, a in reader.elements if e == "a"}
    assert linked <= set(identifiers)
    assert any(a.get("name") == "viewport" for _, a in reader.elements)


def test_hostile_names_stay_text(hostile_page):
    reader = Reader(hostile_page)
    names = {element for element, _ in reader.elements}
    assert not names & {"img", "sub", "br", "iframe", "object"}
    assert all("onload" not in attributes for _, attributes in reader.elements)
    assert len([1 for attributes, _ in reader.scripts if "type" not in attributes]) == 2
    text = "".join(reader.text)
    assert HOSTILE[0] in text
    assert HOSTILE[1] in text
    assert "\\u202eright to left\\u0000\\u0007" in text
    assert "w" * 79 + "…" in text
    assert "w" * 160 not in hostile_page.split("</style>")[1]
    for character in "\u2028\u2029\u202e\x00\x07\ud800":
        assert character not in hostile_page
    hostile_page.encode("utf-8")
    data = {a["id"]: json.loads(t) for a, t in reader.scripts if a.get("type") == "application/json"}
    assert data["sparsity-data"]["names"][0] == HOSTILE[0]
    for attributes, block in reader.scripts:
        if "type" in attributes:
            assert not set(block) & set("<>&")


@given(st.text(max_size=300))
def test_any_text_comes_out_of_markup_as_it_went_in(text):
    reader = Reader(tag("p", shown(text), title=shown(text)))
    assert "".join(reader.text) == shown(text)
    assert [(e, a["title"]) for e, a in reader.elements] == [("p", shown(text))]
    assert len(shown(text)) <= 6 * 160
    reader = Reader(data_block("d", {"name": text}))
    assert [json.loads(block) for _, block in reader.scripts] == [{"name": text}]
    assert "".join(Reader(named(text)).text) == shown(text)


def test_markup_details():
    assert plain("a\nb\tc") == "a\nb\tc"
    assert plain(Html("<b>")) == "<b>"
    assert (
        tag("input", type="checkbox", checked=True, hidden=False, name=None)
        == '<input type="checkbox" checked>'
    )
    assert shown("x" * 161) == "x" * 79 + "…" + "x" * 79
    assert data_block("d", {"a": [float("inf"), float("nan"), 1.5]}).count("null") == 2


def test_own_data_of_a_twelve_layer_transformer_stays_below_a_megabyte():
    counted = histogram(torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02)
    doubled = counted.merge(counted)
    names = [f"model.layers.{i}.{p}.weight" for i in range(12) for p in ("q", "k", "v", "o", "gate_up", "down")]
    four = [Stage(f"stage {i}", dict.fromkeys(names, doubled)) for i in range(4)]
    random = torch.Generator().manual_seed(1)
    masks = {name: picture(torch.rand(512, 256, generator=random) > 0.5) for name in names}
    curves = Sensitivity([0.1 * i for i in range(1, 10)], {name: [0.123456789] * 9 for name in names}, "KL")
    heads = HeatMap("Heads", names[:12], list("abcdefghijkl"), [[0.123456789] * 12] * 12, "gradient")
    neurons = histogram(torch.rand(3072, generator=random))
    acts = [Stage("trained", dict.fromkeys(names[:12], neurons))]
    layers = [LayerRow(name, (2048, 1024), "ffn", doubled.n, 5) for name in names]
    text = page(
        "large",
        summary="A large model.",
        stages=four,
        layers=layers,
        pictures=masks,
        sensitivity=curves,
        heat_maps=[heads],
        activations=acts,
    )
    scripts = [t for a, t in Reader(text).scripts if "type" not in a]
    assert len(text.encode()) - sum(len(t.encode()) for t in scripts) < 1_000_000


def test_a_page_without_charts_needs_no_plotly(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    text = page("t", summary="s", notes=["only this"])
    assert "<script" not in text
    assert "script-src 'none'" in str(Reader(text).elements)
    with pytest.raises(
        UsageError, match=r"need plotly, which is not installed\. Run: pip install 'secateur\[report\]'$"
    ):
        page("t", summary="s", layers=[LayerRow("a", (2,), "", 2, 1)])


def test_a_plotly_that_would_break_the_page_is_refused(monkeypatch):
    import plotly.offline

    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "'</SCRIPT>'")
    with pytest.raises(UsageError, match="the installed plotly's script cannot stand inside a page"):
        page("t", summary="s", layers=[LayerRow("a", (2,), "", 2, 1)])


def test_own_sections_and_their_anchors():
    one = Section("mine", "Mine", tag("p", "hello"))
    assert 'href="#mine"' in document("t", summary="s", sections=[one, Section("other", "Other", Html(""))])
    with pytest.raises(UsageError, match=r"^2 sections have the anchor 'mine'\. Give each its own\.$"):
        document("t", summary="s", sections=[one, one])
    with pytest.raises(
        UsageError, match=r"^anchor 'a b' of section 'Mine' has more than a-z, 0-9 and hyphens\.$"
    ):
        Section("a b", "Mine", Html(""))


def test_layers_and_tables_that_cannot_be():
    with pytest.raises(UsageError, match=r"^fc: 11 zeros among 10 weights\. Count them again\.$"):
        LayerRow("fc", (10,), "", 10, 11)
    with pytest.raises(
        UsageError, match=r"^table 'T', row 2: 1 cells under 2 columns\. Give every row one cell"
    ):
        Table("T", ["a", "b"], [[1, 2], [1]])


def test_a_table_sets_numbers_right_and_keeps_them_exact():
    cells = [["a", 0.123456789, None, "x"], ["b", 2, True, "y"]]
    reader = Reader(table_section(Table("T", ["n", "value", "flag", "text"], cells)).body)
    assert [a.get("data-value") for e, a in reader.elements if e == "td"] == [
        "0.123456789",
        None,
        None,
        "2",
        None,
        None,
    ]
    assert [a.get("class") for e, a in reader.elements if e == "th"][:4] == [None, "number", None, None]


def test_layers_without_weights_and_no_layers():
    assert "0 of 0 weights in 0 layers are zero: 0 %" in sparsity_section([]).body
    assert LayerRow("empty", (0,), "", 0, 0).sparsity == 0
    assert "1 of 4 weights in 1 layer are zero" in sparsity_section([LayerRow("a", (4,), "", 4, 1)]).body
