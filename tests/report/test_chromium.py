"""The page in a real browser: charts drawn, numbers right, nothing executed, nothing asked of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur import prune_, threshold
from secateur.report import Cut, Stage, histogram, page

from .pages import HOSTILE, halved, hostile, neurons, usual, weights

pytestmark = pytest.mark.chromium

_HERE = Path(__file__).parent
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine: install it to test the report in a browser")
    return found


def prepared(folder: Path, html: str, script: str) -> Path:
    """A copy of the page that notes what goes wrong and ends with a script of the test's own."""
    before = (_HERE / "before.js").read_text()
    after = (_HERE / "after.js").read_text().replace("/*TEST*/", script)
    for text in (before, after):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    html = html.replace("<title>", f"<script>{before}</script><title>", 1)
    html = html.replace("</body></html>", f"<script>{after}</script></body></html>")
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    return page


def probe(
    browser: str, folder: Path, html: str, script: str, *, width: int, at: str = "", dark: bool = False
) -> Any:
    """Open a copy of the page, run a script after its own, and return what the script and `after.js` saw."""
    page = prepared(folder, html, script)
    if width < 500:  # no window is narrower than that, but a frame is
        page = folder / "frame.html"
        page.write_text(
            f"<iframe src=page.html{at} width={width} height=1200 style='border:0'></iframe>"
            "<script>onmessage = (left) => { document.body.insertAdjacentHTML('beforeend',left.data)}</script>"
        )
    flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},1200"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    run = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri() + at], capture_output=True, timeout=900, check=False
    )
    said = run.stderr.decode(errors="replace")
    found = re.search(r'<pre id="probe">(.*?)</pre>', run.stdout.decode(errors="replace"), re.DOTALL)
    assert found, f"the page did not finish:\n{said[-2000:]}"
    console = [line for line in said.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(found.group(1))) | {"console": console}


def assert_quiet(seen: dict[str, Any]) -> None:
    assert (seen["errors"], seen["violations"], seen["requests"], seen["console"]) == ([], [], [], [])


STATES = """
  const states = [];
  const look = () => {
    const box = document.querySelector("#weights-bins .scroll");
    states.push({
      layer: document.querySelector("#weights select").selectedOptions[0].text,
      hash: decodeURIComponent(location.hash), width: Number(box.dataset.width), half: Number(box.dataset.half),
      bins: numbers("#weights-bins"), readout: numbers("#weights-readout"),
      spike: texts("#weights .annotation-text"),
    });
  };
  look();
  document.querySelector("#weights [data-step='1']").click(); look();
  document.querySelector("#weights [data-option=whole]").click();
  document.querySelector("#weights [data-stage='0']").click(); look();
  document.querySelector("#weights-thumbnails button").click(); look();
  const result = () => ({
    states, bars: texts("#sparsity .bartext"), points: all("#tradeoff .scatterlayer .point").length,
    log: document.querySelector("#tradeoff [data-option=log]").checked,
    ticks: (document.querySelector("#tradeoff [data-option=log]").click(), texts("#tradeoff .ytick text")),
    unreachable: all("main button, main select, main input, main summary, main .scroll, main .tall")
      .filter((element) => element.tabIndex < 0 && !element.closest("[aria-hidden]")).length,
    unnamed: all("main button, main select, main input").filter((element) => !(element.labels?.length ||
      element.getAttribute("aria-label") || element.textContent.trim())).length,
  });
"""


@pytest.mark.thorough
def test_charts_numbers_and_controls(browser, tmp_path):
    at = "#weights=blocks.0.attn.weight&tradeoff.log=0"
    seen = probe(browser, tmp_path, usual(), STATES, width=1600, at=at)
    assert_quiet(seen)
    assert seen["charts"] >= 3
    assert (seen["inner"], seen["dark"], seen["log"]) == (1600, False, False)
    assert seen["wide"] <= 1600
    assert seen["bars"] == ["50.0 %", "50.0 %"]
    assert seen["points"] >= 3
    assert seen["ticks"] == ["13", "14", "15", "16"]
    assert (seen["unreachable"], seen["unnamed"]) == (0, 0)
    assert len(seen["contrasts"]) > 50
    assert min(seen["contrasts"]) >= 4.5

    first, second = weights()
    assert [state["layer"] for state in seen["states"]] == [first, second, second, first]
    assert seen["states"][1]["hash"] == f"#weights={second}&tradeoff.log=0"
    assert [len(state["bins"][0]) for state in seen["states"]] == [2, 2, 1, 1]
    for state in seen["states"]:
        assert_bins(state)


def assert_bins(state: dict[str, Any]) -> None:
    """The counts that the page shows are those of the tensors, counted anew."""
    before = weights()[state["layer"]]
    both = [before.numpy(), halved(before).numpy()]
    zeros = [int((values == 0).sum()) for values in both]
    assert [row[:3] for row in state["readout"]] == [
        [values.size, zero, zero / values.size] for values, zero in zip(both, zeros, strict=True)
    ]
    assert state["spike"] == ["50.0 % zero"]
    shown = len(state["bins"][0])
    assert state["bins"][0] == zeros[-shown:]
    half, width = state["half"], state["width"]
    for column, values in enumerate(both[-shown:]):
        kept = values[values != 0].astype(np.float64)
        index = np.floor(np.abs(kept) / width).astype(int)
        index = np.where(kept > 0, half + index, half - 1 - index)
        inside = (index >= 0) & (index < 2 * half)
        counts = [row[column] for row in state["bins"][1:]]
        assert counts[: 2 * half] == np.bincount(index[inside], minlength=2 * half).tolist()
        assert sum(counts[2 * half :]) == int((~inside).sum())


NARROW = """
  for (const details of all("details")) details.open = true;
  const result = () => ({
    made: all("main img, main iframe, svg a, main a, figure b, figure sub").length,
    chosen: document.querySelector("#weights select").selectedOptions[0].text,
    labels: texts("#weights-thumbnails bdi"), ticks: texts("#sparsity .ytick text"),
    axes: texts(".ytitle"),
    spread: all("main *").filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5 &&
      !element.closest(".scroll, .tall, .unseen, svg")).map((element) => element.outerHTML.slice(0, 120)),
  });
"""


@pytest.mark.thorough
def test_hostile_names_in_a_narrow_dark_window_without_the_policy(browser, tmp_path):
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile())
    seen = probe(browser, tmp_path, html, NARROW, width=400, dark=True)
    assert_quiet(seen)
    assert seen["title"] == f"{HOSTILE[0]} · secateur"
    assert seen["made"] == 0
    assert seen["chosen"] == HOSTILE[0]
    assert seen["labels"][1:3] == HOSTILE[1:3]
    assert seen["axes"][:4] == [*HOSTILE[:3], "weights per bin"]
    assert seen["ticks"][2] == "…" + HOSTILE[2][-17:]
    assert (seen["inner"], seen["dark"]) == (400, True)
    assert (seen["wide"], seen["spread"]) == (400, [])
    assert min(seen["contrasts"]) >= 4.5


@pytest.mark.thorough
def test_the_policy_stops_what_would_slip_through(browser, tmp_path):
    slipped = (
        "<script>document.title = 'taken'</script>"
        "<img src='http://127.0.0.1:9/a' onerror=\"document.title = 'taken'\">"
        "<link rel=stylesheet href='http://127.0.0.1:9/b'><iframe src='http://127.0.0.1:9/c'></iframe>"
    )
    html = usual().replace("<main ", slipped + "<main ", 1)
    script = "fetch('http://127.0.0.1:9/d').catch(() => {}); const result = () => ({});"
    seen = probe(browser, tmp_path, html, script, width=800)
    assert seen["title"] == "toy model · secateur"
    stopped = {violation.split()[0] for violation in seen["violations"]}
    assert stopped >= {"script-src-elem", "img-src", "style-src-elem", "frame-src", "connect-src"}
    assert seen["charts"] >= 3


SLIDER = """
  const threshold = document.querySelector("#threshold");
  const slider = threshold.querySelector("[data-part=slider]");
  const part = (name) => threshold.querySelector(`[data-part=${name}]`);
  const moved = [];
  const sentence = (anchor) => document.querySelector(`#${anchor}-sentence`);
  const read = (anchor, key) => ({
    ...Object.fromEntries(Object.entries(sentence(anchor).dataset).map(([name, value]) => [name, Number(value)])),
    hash: new URLSearchParams(location.hash.slice(1)).get(key), said: sentence(anchor).textContent,
    rows: numbers(`#${anchor}-layers`), errors: texts(`#${anchor}-layers tbody tr td:nth-child(4)`),
    shares: texts(`#${anchor}-layers tbody tr td:nth-child(2)`), told: slider.getAttribute("aria-valuetext"),
    marker: document.querySelector(`#${anchor} .marker`).getBoundingClientRect().left,
  });
  const change = (control, value, kind) => { control.value = value; control.dispatchEvent(new Event(kind)); };
  const first = read("threshold", "tau");
  const places = [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1].map((share) => Math.round(share * slider.max));
  const move = (control, place) => { change(control, place, "input"); control.dispatchEvent(new Event("change")); };
  for (const place of places) { move(slider, place); moved.push(read("threshold", "tau")); }
  change(part("share"), "50", "change"); const half = read("threshold", "tau");
  change(part("value"), "0,25", "change"); const typed = read("threshold", "tau");
  change(part("value"), "nonsense", "change"); const nonsense = read("threshold", "tau");
  change(part("stage"), "1", "change"); const after = read("threshold", "tau");
  const lambda = document.querySelector("#activations [data-part=slider]");
  const neurons = [];
  for (const share of [0.2, 0.5, 0.8]) {
    move(lambda, Math.round(share * lambda.max)); neurons.push(read("activations", "lambda"));
  }
  const result = () => ({
    first, moved, half, typed, nonsense, after, neurons, value: part("value").value,
    curve: numbers("#threshold-curve"), stops: Number(slider.max),
    cells: texts("#heat .annotation-text"), picture: texts("#masks-said"),
    front: all("#tradeoff .scatterlayer .trace").length,
  });
"""


def removed(layers: dict[str, torch.Tensor], tau: float) -> list[int]:
    """What `threshold(tau)` prunes of each layer, by the masks."""
    model = nn.ModuleDict(
        {str(at): nn.Linear(*weight.T.shape, bias=False) for at, weight in enumerate(layers.values())}
    )
    with torch.no_grad():
        for layer, weight in zip(model.values(), layers.values(), strict=True):
            layer.weight.copy_(weight)
    if all(bool((weight.abs() > tau).all()) for weight in layers.values()):
        return [0] * len(layers)
    masks = prune_(model, recipe=threshold(tau), only="all")
    return [int((~mask).sum()) for mask in masks.values()]


@pytest.mark.thorough
def test_the_slider_shows_what_the_masks_of_threshold_hold(browser, tmp_path):
    seen = probe(browser, tmp_path, usual(), SLIDER, width=1600, at="#tau=0.03125")
    assert_quiet(seen)
    layers = weights()
    sizes = [weight.numel() for weight in layers.values()]
    held = [histogram(weight) for weight in layers.values()]
    certain = 0
    for state in (*seen["moved"], seen["half"]):
        tau = float(state["hash"])
        true = removed(layers, tau)
        assert tau == state["tau"]
        assert state["low"] <= sum(true) <= state["high"]
        assert [row[1] for row in state["rows"]] == sizes
        for row, error, many, one in zip(state["rows"], state["errors"], true, held, strict=True):
            stated = 0 if error == "exact" else int(error.removeprefix("± ").replace(",", ""))
            assert abs(row[0] - many) <= stated  # the error that the page states covers the masks
            assert stated == 0 or tau < 2.0**one.exponent
        exact = state["errors"] == ["exact", "exact"]
        certain += exact
        assert exact == state["said"].endswith("(exact).") == (state["low"] == state["high"])
        assert f"{state['estimate']:,} of {sum(sizes):,} weights in 2 layers" in state["said"]
    assert certain >= 6
    totals = [state["estimate"] for state in seen["moved"]]
    assert totals == sorted(totals)
    assert totals[-1] == sum(sizes)
    markers = [state["marker"] for state in seen["moved"]]
    assert markers == sorted(markers)
    assert seen["half"]["estimate"] / sum(sizes) == pytest.approx(0.5, abs=0.01)
    assert seen["half"]["estimate"] >= sum(sizes) / 2
    for state, tau in ((seen["first"], 0.03125), (seen["typed"], 0.25)):
        assert float(state["hash"]) == state["tau"] == tau
        assert state["low"] <= sum(removed(layers, tau)) <= state["high"]
        assert state["high"] - state["low"] < 0.02 * sum(sizes)
        assert "at least" in state["said"]
        cut = Cut.of({name: histogram(weight) for name, weight in layers.items()}, tau)
        assert [row[0] for row in state["rows"]] == [found.estimate for found in cut.layers.values()]
    assert seen["nonsense"] == seen["typed"]
    assert seen["value"] == "0.25"
    pruned = {name: halved(weight) for name, weight in layers.items()}
    after = seen["after"]
    assert after["low"] <= sum(removed(pruned, 0.25)) <= after["high"]
    assert after["low"] > seen["typed"]["low"]
    for state in seen["neurons"]:
        true = [int((values <= float(state["hash"])).sum()) for values in neurons().values()]
        assert [row[0] for row in state["rows"]] == true
        assert "neurons in 2 layers" in state["said"]
    assert len(seen["curve"]) >= 10
    assert "4" in seen["cells"]
    assert any(text.startswith("×") for text in seen["cells"])
    assert seen["picture"][0].startswith(
        "1,537 of 3,072 weights are kept, sparsity 50.0 %. A cell is 1.3 weights"
    )


TIMED = """
  // The real clock: everything happens before the page has loaded, without virtual time.
  const threshold = document.querySelector("#threshold");
  const slider = threshold.querySelector("[data-part=slider]");
  const took = [];
  for (let at = 0; at < 60; at++) {
    slider.value = Math.round((0.2 + 0.012 * at) * slider.max);
    const began = performance.now();
    slider.dispatchEvent(new Event("input"));
    document.querySelector("#threshold-layers").getBoundingClientRect();  // the layout is done when this returns
    took.push(performance.now() - began);
  }
  const left = document.createElement("pre");
  left.id = "timed";
  left.textContent = JSON.stringify(took);
  document.body.append(left);
  const result = () => ({});
"""


@pytest.mark.thorough
def test_the_slider_answers_within_50_milliseconds_for_a_twelve_layer_transformer(browser, tmp_path):
    random = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{p}.weight" for i in range(12) for p in ("q", "k", "v", "o", "up", "down")]
    held = {name: histogram(torch.randn(4096, generator=random) * 0.02) for name in names}
    html = page("large", summary="s", stages=[Stage("before", held), Stage("after", held)])
    file = prepared(tmp_path, html, TIMED)
    flags = [flag for flag in _FLAGS if not flag.startswith("--virtual-time")]
    run = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        timeout=900,
        check=False,
    )
    found = re.search(r'<pre id="timed">(.*?)</pre>', run.stdout.decode(errors="replace"))
    assert found, run.stderr.decode(errors="replace")[-2000:]
    took = sorted(json.loads(found.group(1)))
    print(f"slider: {took[0]:.1f} ms at best, median {took[30]:.1f} ms, worst {took[-1]:.1f} ms")
    # on a machine that others load, some answers wait for the processor: the quickest quarter does not
    assert took[15] < 50
