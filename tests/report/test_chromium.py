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

from .pages import HOSTILE, halved, hostile, usual, weights

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


def probe(
    browser: str, folder: Path, html: str, script: str, *, width: int, at: str = "", dark: bool = False
) -> Any:
    """Open a copy of the page, run a script after its own, and return what the script and `after.js` saw."""
    before = (_HERE / "before.js").read_text()
    after = (_HERE / "after.js").read_text().replace("/*TEST*/", script)
    for text in (before, after):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    html = html.replace("<title>", f"<script>{before}</script><title>", 1)
    html = html.replace("</body></html>", f"<script>{after}</script></body></html>")
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    if width < 500:  # no window is narrower than that, but a frame is
        page = folder / "frame.html"
        page.write_text(
            f"<iframe src=page.html{at} width={width} height=1200 style='border:0'></iframe>"
            "<script>onmessage = (left) => { document.body.insertAdjacentHTML('beforeend',left.data)}</script>"
        )
    flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},1200"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    run = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri() + at], capture_output=True, timeout=60, check=False
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


def test_hostile_names_in_a_narrow_dark_window_without_the_policy(browser, tmp_path):
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile())
    seen = probe(browser, tmp_path, html, NARROW, width=400, dark=True)
    assert_quiet(seen)
    assert seen["title"] == f"{HOSTILE[0]} · secateur"
    assert seen["made"] == 0
    assert seen["chosen"] == HOSTILE[0]
    assert seen["labels"][1:3] == HOSTILE[1:3]
    assert seen["axes"] == [*HOSTILE[:3], "weights per bin"]
    assert seen["ticks"][2] == "…" + HOSTILE[2][-17:]
    assert (seen["inner"], seen["dark"]) == (400, True)
    assert (seen["wide"], seen["spread"]) == (400, [])
    assert min(seen["contrasts"]) >= 4.5


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
