"""The report in a real browser, where there is one: no errors, nothing overflows, tables sort."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_lora.evaluation.metric_table import metrics_for
from lightning_lora.experiments.results import compare_arms
from lightning_lora.reports.ablation import Report
from lightning_lora.reports.ablation_pages import as_html
from lightning_lora.reports.tables import COST_COLUMNS
from tests.experiments.test_results import PLAN, VAL, cells

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
#: Put at the top of the page: keeps errors. Put at its end: presses the second heading and says what came.
WATCH = "<script>window.faults = []; window.onerror = m => { faults.push(m) };</script>"
ASK = """<script>
document.querySelectorAll("details").forEach(each => each.open = true);
const table = document.querySelector("#arms"), column = () => [...table.tBodies[0].rows].map(r => r.cells[2].innerText);
const before = column(); table.querySelectorAll("th button")[2].click(); const up = column();
table.querySelectorAll("th button")[2].click(); const down = column();
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, svg, .axis"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
const pictures = [...document.querySelectorAll("figure svg")].map(e => Math.round(e.getBoundingClientRect().width));
const said = {faults, up, down, wide, pictures, page: document.documentElement.scrollWidth, window: innerWidth};
document.title = "SAID" + JSON.stringify(said);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
@pytest.mark.parametrize("width", [500, 1440])  # headless Chromium has no window below 500; see the next test
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    said = ask(tmp_path, page(), width)
    assert said["faults"] == [] and said["wide"] == []
    assert said["page"] <= said["window"] and len(said["pictures"]) == 4 and min(said["pictures"]) > 200
    assert said["up"] == sorted(said["up"]) and said["down"] == said["up"][::-1]


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_the_page_on_a_telephone(tmp_path: Path) -> None:
    """In a frame of 380 pixels, which the page takes for its window."""
    (tmp_path / "inner.html").write_text(
        page().replace("</head>", f"{WATCH}</head>").replace("</body>", f"{ASK}</body>")
    )
    frame = (
        '<title>x</title><iframe src=inner.html width=380 height=900 onload="document.title = '
        'this.contentDocument.title"></iframe>'
    )
    said = dumped(tmp_path, frame, 800, "--allow-file-access-from-files")
    assert said["window"] == 380 and said["page"] <= 380 and said["wide"] == [] and said["faults"] == []


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_many_metrics_with_intervals_fit_on_a_desktop(tmp_path: Path) -> None:
    names = [name for name, spec in metrics_for("multi_label").items() if spec.heading]
    after = {"after": dict.fromkeys(names, 0.5), "after_interval": {name: [0.25, 0.75] for name in names}}
    costs = {column.key: 123456.7 for column in COST_COLUMNS}
    record = {"data": {"task": "multi_label"}, "evaluations": {"test": after}, "costs": costs}
    found = [
        replace(cell, record=record if cell.cell.seed == 1 else {}) for cell in cells(VAL, test={"2": 0.6, "8": 0.8})
    ]
    html = as_html(Report("a", PLAN, "ablate", compare_arms(PLAN, found), found, (6, 6), {}))
    assert html.count("0.5000\n[0.250, 0.750]") == 2 * len(names) > 16
    box = "document.querySelector('#metrics').parentElement"
    fits = f"said.fits = [{box}.scrollWidth, {box}.clientWidth]; document.title ="
    said = ask(tmp_path, html, 1440, ASK.replace("document.title =", fits))
    assert said["fits"][0] <= said["fits"][1] and said["wide"] == []


def page() -> str:
    found = cells(VAL, test={"2": 0.62, "8": 0.8})
    return as_html(
        Report("a", PLAN, "python main.py ablate " + "x" * 300, compare_arms(PLAN, found), found, (6, 6), {})
    )


def ask(folder: Path, html: str, width: int, asked: str = ASK) -> dict:
    return dumped(folder, html.replace("</head>", f"{WATCH}</head>").replace("</body>", f"{asked}</body>"), width)


def dumped(folder: Path, html: str, width: int, *options: str) -> dict:
    path = folder / "page.html"
    path.write_text(html)
    assert BROWSER is not None
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    words += [*options, f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<title>SAID(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
