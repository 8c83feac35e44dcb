"""``main.py data``: what it prints, the page, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.reports.data_card import Histogram
from tests.conftest import make_rows, write_csv
from tests.experiments.test_page import BROWSER, WATCH, dumped

ASK = """<script>
const column = () => [...document.querySelector("#classes").tBodies[0].rows].map(r => r.cells[1].innerText);
document.querySelectorAll("#classes th button")[1].click(); const up = column();
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
const bars = document.querySelectorAll(".bars span").length;
const page = document.documentElement.scrollWidth;
document.title = "SAID" + JSON.stringify({faults, up, wide, bars, page, window: innerWidth});
</script>"""


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    """Rows with faults, of classes with names that are no markup, and a config that trains on them."""
    rows = make_rows(300, ("neg", "pos", "mixed"))
    names = {"neg": "[bold]neg[/bold]", "pos": "<i>pos & " + "long name " * 9, "mixed": "mixed"}
    rows = [(text, names[label]) for text, label in rows]
    rows += [(rows[0][0], "mixed"), ("", "mixed"), ("<script>faults.push('x')</script> in town", "mixed")]
    write_csv(tmp_path / "my rows.csv", rows)
    settings = {
        "model": {"base_model": str(tiny_base), "adapter": {"rank": 4}},
        "data": {"source": "my rows.csv", "max_length": 16},
        "trainer": {"accelerator": "gpu", "devices": 4},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_card_fits_into_80_columns_and_what_is_suspicious_is_first(config: Path, capsys) -> None:
    assert main(["data", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "my rows.csv: suspicious (5):" and max(map(len, lines[:-1])) <= 80
    words = " ".join(printed.split())
    assert "1. fit stops, as rows have no text or label (1, left out here): my rows.csv, line 303, column" in words
    assert (
        any(line.lstrip().startswith("[bold]neg[/bold]") for line in lines)
        and "at most 16 (head)" in words
        and "terms" in words
    )
    assert lines[-1].startswith("the card as a page: python main.py data --config") and "card.html" in lines[-1]
    assert {path.name for path in config.parent.iterdir()} == {"my rows.csv", "own.yaml", "cache"}  # no run, no page
    assert main(["fit", "--config", str(config), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]) == 2
    assert "my rows.csv, line 303" in capsys.readouterr().err  # as the card says


def test_nothing_suspicious_and_many_classes(tmp_path: Path, tiny_base: Path, capsys) -> None:
    fillers = [" ".join(text.split()[:6]) for text, _ in make_rows(400)]
    rows = [(f"{text} of row {i * 7919}", f"class {i % 25}") for i, text in enumerate(fillers)]
    path = write_csv(tmp_path / "rows.csv", rows)
    words = ["data", "--data.source", str(path), "--model.base_model", str(tiny_base), "--data.max_length", "64"]
    Path("sizes.yaml").write_text("data: {source: x}\nmodel: {base_model: y}\n")
    assert main([*words, "--config", "sizes.yaml"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "nothing suspicious was found" in printed and "and 5 more classes, which the page shows" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.adapter.rank", "8"], "--model.adapter.rank: data does not use it"),
        (["--trainer.max_epochs=8"], "--trainer.max_epochs: data does not use it"),
        (["--output", "card.pdf"], "--output: a file that ends with .html is needed, got card.pdf"),
        (["--run", "logs/x"], "no option --run"),
        (["--data.source", "missing.csv"], "missing.csv"),
        (["--data.bad_rows", "keep"], "data.bad_rows"),
        (["--data.max_length", "1000"], "takes at most 64 tokens"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str, config: Path, capsys) -> None:
    assert main(["data", "--config", str(config), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_odd_label_is_refused_as_fit_does(tmp_path: Path, tiny_base: Path, capsys) -> None:
    write_csv(tmp_path / "rows.csv", [(text, str(i / 7)) for i, (text, _) in enumerate(make_rows(60))])
    Path("own.yaml").write_text(f"data: {{source: rows.csv}}\nmodel: {{base_model: {tiny_base}}}\n")
    said = []
    for command in ("fit", "data"):
        assert main([command, "--config", "own.yaml"]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and "data.task=regression" in said[0]


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_the_page_in_a_browser(config: Path, tmp_path: Path) -> None:
    """As wide as a telephone in a frame, which the page takes for its window, and as a screen."""
    assert main(["data", "--config", str(config), "--output", "card.html"]) == 0
    html = Path("card.html").read_text()
    assert "&lt;script&gt;" in html and "http" not in html.replace("http-equiv", "")
    shown = html.replace("</head>", f"{WATCH}</head>").replace("</body>", f"{ASK}</body>")
    (tmp_path / "inner.html").write_text(shown)
    frame = "<title>x</title><iframe src=inner.html width=380 height=900 onload="
    frame += '"document.title = this.contentDocument.title"></iframe>'
    for page, width, options in ((frame, 800, ["--allow-file-access-from-files"]), (shown, 1440, [])):
        said = dumped(tmp_path, page, width, *options)
        assert said["window"] == (380 if options else 1440) and said["page"] <= said["window"]
        assert said["faults"] == [] and said["wide"] == [] and said["bars"] > 10
        assert said["up"] == sorted(said["up"]) and len(said["up"]) == 3
    shutil.rmtree(tmp_path / "profile")


@pytest.mark.parametrize(
    "values", [np.arange(100), np.array([5]), np.array([3, 900]), np.linspace(-1, 2, 77), np.array([0.5])]
)
def test_bars_count_every_value(values: np.ndarray) -> None:
    bars = Histogram("x", values, limit=50).bars
    assert sum(int(bar["said"].split(": ")[1].split()[0].replace(",", "")) for bar in bars) == len(values)
    assert len(bars) <= 41 and max(bar["height"] for bar in bars) == 100
    if len(values) == 100:  # three whole numbers to each bar
        assert {bar["said"].split(": ")[1] for bar in bars[:-1]} == {"3 rows"}
        assert sum(bar["beyond"] for bar in bars) == 17  # from 51 on
