"""The report in a real browser: laid out, complete, readable in both themes and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from report_runs import make_run, records

from npmoe.reporting import html_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser: chromium (apt-get install chromium)"
)
# Measures the page from inside; the page itself has no script and forbids any.
PROBE = """<script>addEventListener("load", () => {
const rgb = (e, what) => getComputedStyle(e)[what].match(/[\\d.]+/g).slice(0, 3).map(Number);
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = c => c.map(v => linear(v / 255)).reduce(
  (sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const contrast = (a, b) => { const [x, y] = [light(a), light(b)];
  return (Math.max(x, y) + .05) / (Math.min(x, y) + .05); };
const paper = rgb(document.body, "backgroundColor");
const panel = rgb(document.querySelector("figure"), "backgroundColor");
const shown = [...document.querySelectorAll("svg[role=img]")];
const found = {
  width: document.documentElement.offsetWidth, paper,
  right: Math.max(...[...document.querySelectorAll("main *")].filter(
    e => !e.closest(".scroll")).map(e => e.getBoundingClientRect().right)),
  charts: shown.length,
  named: shown.filter(s => s.getAttribute("aria-label")).length,
  laidOut: shown.filter(s => s.getBoundingClientRect().height > 40).length,
  pictures: [...document.images].map(i => i.naturalWidth),
  ink: contrast(rgb(document.body, "color"), paper),
  dim: contrast(rgb(document.querySelector("figure .dim"), "color"), panel),
  labels: contrast(rgb(document.querySelector("svg text"), "fill"), panel),
  curve: Math.min(...[...document.querySelectorAll(".curve")].map(
    c => contrast(rgb(c, "stroke"), panel))),
  columns: getComputedStyle(document.querySelector(".grid2")).gridTemplateColumns.split(" ").length,
  outside: performance.getEntriesByType("resource").filter(
    e => !e.name.startsWith("data:")).length,
  smallest: Math.min(...[...document.querySelectorAll("td, p")].map(
    e => parseFloat(getComputedStyle(e).fontSize))),
};
document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>"; })</script>"""


def open_page(path, profile, *options, window="1280,2400"):
    """Run the browser on a file, without a network."""
    return subprocess.run(
        [
            BROWSER,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"),
            f"--user-data-dir={profile}",
            f"--window-size={window}",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("browser") / "run", records())
    # A real picture, as `npmoe train` leaves it.
    from npmoe.reporting.charts import _png

    pixels = (np.arange(300 * 200 * 3) % 251).astype(np.uint8).reshape(200, 300, 3)
    (folder.path / "curves.png").write_bytes(_png(pixels))
    return html_report(folder)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_laid_out_in_both_themes_and_widths(page, theme, width, tmp_path):
    probed = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", f"{PROBE}</body>")
    # The browser's window is at least 500 pixels wide; no rule of the page asks for its width.
    assert "(max-width" not in probed
    assert "vw" not in probed
    probed = probed.replace("</head>", f"<style>html {{ width: {width}px }}</style></head>")
    path = tmp_path / "probed.html"
    path.write_text(probed, encoding="utf-8")
    done = open_page(
        path,
        tmp_path / "profile",
        "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}",
        window=f"{width},1000",
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout.decode())
    assert match, done.stderr.decode()[-2000:]
    found = json.loads(match[1])
    assert found["width"] == width
    assert found["right"] <= width
    assert found["charts"] == found["named"] == found["laidOut"] == 15
    assert found["pictures"] == [300]
    assert found["outside"] == 0
    assert (sum(found["paper"]) < 128 * 3) == (theme == "dark")
    assert found["columns"] == {1280: 3, 390: 1}[width]
    # WCAG 2.1: 4.5 for text (AA), 3 for graphics.
    assert min(found["ink"], found["dim"], found["labels"]) >= 4.5, found
    assert found["curve"] >= 3, found
    assert found["smallest"] >= 13


def test_the_page_itself_is_drawn_under_its_own_policy(page, tmp_path):
    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(page, encoding="utf-8")
    done = open_page(
        path, tmp_path / "profile", f"--screenshot={shot}", "--enable-logging=stderr", "--v=0"
    )
    errors = done.stderr.decode()
    assert shot.exists(), errors[-2000:]
    assert "Content Security Policy" not in errors
    assert "CONSOLE" not in errors
    image = pytest.importorskip("matplotlib.image").imread(shot)
    assert image.shape[:2] == (2400, 1280)
    colours = {tuple(c) for c in (image[::3, ::3, :3].reshape(-1, 3) * 255).astype(int).tolist()}
    for wanted in ((31, 111, 180), (200, 80, 30), (143, 183, 221), (214, 40, 76)):
        # The first two curves, a plan's rows, and the expert that nobody chose.
        assert any(max(abs(a - b) for a, b in zip(wanted, c, strict=True)) <= 2 for c in colours)
