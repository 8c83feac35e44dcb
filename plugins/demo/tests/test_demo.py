"""The page of ``demo``: what it computes; and in Chromium, where that, Gradio and Playwright are installed."""

import csv
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightning_lora import LoadedRun, load_run
from lightning_lora.cli import main, plugin_commands
from lightning_lora.errors import UserError
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.inference.explain import Explanation
from lightning_lora_demo.page import Demo
from tests.conftest import make_rows, write_csv

ROOT = Path(__file__).parents[3]
TEXT = "the film was awful and dull in town"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def loaded(place: Path) -> LoadedRun:
    return load_run(place / "run", accelerator="cpu")


def test_bars_are_the_probabilities_of_each_run(loaded: LoadedRun) -> None:
    demo = Demo({"one": loaded, "two": loaded}, ["text"], [])
    one, two = demo.classify(TEXT)
    expected = dict(zip(loaded.label_names, loaded.predict([TEXT]).probabilities[0], strict=True))
    assert one == two == pytest.approx(expected)
    legend, *words = demo.explain(TEXT)
    assert "speaks for the label" in legend and len(words) == 2 and ">awful<" in words[0]


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_file_is_labelled_as_predict_does(loaded: LoadedRun, place: Path) -> None:
    write_csv(Path("in.csv"), [("x", TEXT), ("y", "")], ("id", "review"))
    found = Demo({"run": loaded}, ["text"], []).label_file("run", "in.csv", "review")
    assert (
        main(
            [
                "predict",
                "--run",
                str(place / "run"),
                "--input",
                "in.csv",
                "--text_column",
                "review",
                "--output",
                "o.csv",
            ]
        )
        == 0
    )
    mine, theirs = (read(Path(each)) for each in (found, "o.csv"))
    assert [*mine[0]] == [*theirs[0]] and Path(found).name == "in-labelled.csv"
    for one, other in zip(mine, theirs, strict=True):
        assert {k: v for k, v in one.items() if "p" not in k} == {k: v for k, v in other.items() if "p" not in k}
        np.testing.assert_allclose(*([float(row["p(pos)"] or 0) for row in (one, other)]), atol=1e-5)
    with pytest.raises(UserError, match="no column 'text'"):
        Demo({"run": loaded}, ["text"], []).label_file("run", "in.csv", "")


def test_several_labels_are_written_with_the_separator_of_the_run_and_shown_as_text() -> None:
    names, model = ["<i>a", "b"], SimpleNamespace(task="multi_label")
    logits, half = np.array([[3.0, 2.0]], np.float32), np.full(2, 0.5)
    found = Predictions(logits, None, task="multi_label", thresholds=half, label_names=names, rows=np.arange(1))
    told = Explanation(TEXT, names[0], 3.0, [], np.zeros(0), np.zeros(0, bool))
    run: Any = SimpleNamespace(label_names=names, model=model, input_format=SimpleNamespace(keep="head"))
    vars(run).update(dataset=list, predict_dataset=lambda rows: found, explain=lambda texts: [told])
    write_csv(Path("in.csv"), [(TEXT,)], ("text",))
    demo = Demo({"run": run}, ["text"], [], {"run": ";"})
    assert read(Path(demo.label_file("run", "in.csv", "")))[0]["prediction"] == "<i>a;b"
    assert "<b>&lt;i&gt;a, probability" in demo.explain(TEXT)[1]


@pytest.fixture(scope="module")
def address(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of two runs, shown by the command line."""
    if "demo" not in plugin_commands():
        pytest.skip("the plugin 'demo' is not installed (make test-demo)")
    second = shutil.copytree(place / "run", tmp_path_factory.mktemp("second") / "second")
    assert main(["test", "--run", str(place / "run"), "--before", "false"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(ROOT / "main.py"), "demo", "--run", str(place / "run"), "--run", str(second)]
    with subprocess.Popen([*words, "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("on this machine alone" in line for line in lines), "the page was not shown"
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="its extra 'browser' is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [380, 1440])
def test_in_chromium(address: str, browser: Any, loaded: LoadedRun, width: int) -> None:
    faults, outside = [], []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request",
        lambda asked: outside.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None,
    )
    page.goto(address)
    for element in ("#classify", "tbody tr"):  # Gradio draws the page piece by piece, and drops the focus meanwhile
        page.locator(element).first.wait_for()
    for _ in range(10):
        page.get_by_label("text", exact=True).fill(TEXT)
        page.keyboard.press("Tab")  # the keyboard alone: to the button, and on it
        if page.evaluate("document.activeElement.id") == "classify":
            break
        page.wait_for_timeout(500)
    assert page.evaluate("document.activeElement.id") == "classify"
    page.keyboard.press("Enter")
    predicted = loaded.predict([TEXT])
    percent = f"{round(100 * predicted.probabilities.max())}%"
    page.get_by_text(percent).nth(1).wait_for()  # of both runs
    assert page.locator("h2", has_text=predicted.names[0]).count() == 2
    page.get_by_label("text", exact=True).fill("a fine and charming film")
    page.keyboard.press("Shift+Enter")
    other = f"{round(100 * loaded.predict(['a fine and charming film']).probabilities.max())}%"
    page.get_by_text(other).nth(1).wait_for()
    page.get_by_label("text", exact=True).fill(TEXT)
    page.click("#explain")
    page.locator(".words span", has_text="awful").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.locator("tbody tr").first.click()
    truth = page.get_by_label("truth of the example")
    truth.wait_for()
    assert truth.input_value() in loaded.label_names

    write_csv(Path("in.csv"), make_rows(5, seed=9))
    page.get_by_role("tab", name="A file").click()
    page.locator("input[type=file]").first.set_input_files("in.csv")
    page.get_by_text("in.csv").first.wait_for()
    page.click("#label")
    with page.expect_download() as download:
        page.locator("a[download]", has_text="KB").or_(page.locator("a[download*=labelled]")).first.click()
    rows = read(download.value.path())
    assert [row["prediction"] for row in rows] == loaded.predict([text for text, _ in make_rows(5, seed=9)]).names
    assert not faults and not outside


def test_what_cannot_be_done_is_said_on_the_page(address: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(address)
    page.click("#classify")
    page.get_by_text("Nothing is given yet.").wait_for()
