"""A run on pairs of texts by the command line: fit, test with baselines, predict in all its ways, sample, resume."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.evaluation.predictions import Predictions
from tests.conftest import PAIR_HEADER, make_pairs, save_pair_base, write_csv

PAIRS = [row[:2] for row in make_pairs(12, seed=7)]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("pairs")
    base = save_pair_base(tiny_base, place / "base", "bert")
    write_csv(place / "rows.csv", make_pairs(120), PAIR_HEADER)
    data = {"source": str(place / "rows.csv"), "text_column": ["premise", "hypothesis"], "max_length": 40}
    trainer = {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    model = {"base_model": str(base), "learning_rate": 5e-3}
    config = {"model": model, "data": {**data, "cache_dir": str(place / "cache")}, "trainer": trainer}
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(place / "run.yaml"), "--name", "run", "--logs_dir", str(place)]) == 0
    return str(place / "run")


@pytest.fixture(scope="module")
def found(run: str) -> Predictions:
    return load_run(run, accelerator="cpu").predict(PAIRS)


def predict(run: str, *words: str) -> int:
    return main(["predict", "--run", run, *words])


def test_all_ways_to_give_pairs_say_the_same(run: str, found: Predictions, capsys, monkeypatch) -> None:
    lines = "".join(f"{a}\t{b}\n" for a, b in PAIRS)
    write_csv(Path("in.csv"), [(b, "x", a) for a, b in PAIRS], ("second", "id", "first"))
    write_csv(Path("same.csv"), PAIRS, ("premise", "hypothesis"))
    Path("in.txt").write_text(lines)
    ways = {
        "typed": [text for pair in PAIRS for text in pair],
        "piped": [],
        "lines": ["--input", "in.txt"],
        "columns": ["--input", "in.csv", "--text_column", "[first, second]"],
        "same": ["--input", "same.csv"],
    }
    for name, words in ways.items():
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert predict(run, *words, "--format", "csv") == 0, name
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        header = ["first", "second"] if name == "columns" else ["premise", "hypothesis"]
        others = ["id"] * (name == "columns")
        assert list(rows[0]) == [*header, "prediction", "probability", "p(other)", "p(same)", *others], name
        assert [tuple(row[column] for column in header) for row in rows] == PAIRS
        np.testing.assert_allclose([float(row["p(same)"]) for row in rows], found.probabilities[:, 1], atol=1e-5)


def test_the_printed_table_shows_both_texts(run: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert predict(run, "a fine film", "two people in town") == 0
    out = capsys.readouterr().out
    assert re.search(r"premise +│ hypothesis +│ prediction", out) and re.search("a fine film +│ two people in", out)


def test_many_parquet_files_of_pairs(run: str, found: Predictions) -> None:
    Path("in").mkdir()
    first, second = zip(*PAIRS, strict=True)
    pq.write_table(pa.table({"premise": first, "hypothesis": second}), "in/a.parquet")
    pq.write_table(pa.table({"premise": ["a", None], "hypothesis": ["", "b"]}), "in/b.parquet")
    assert predict(run, "--input", "in", "--output", "out") == 0
    said = pq.read_table("out/a.parquet")
    np.testing.assert_allclose(said["p(same)"].to_numpy(), found.probabilities[:, 1], atol=1e-5)
    assert pq.read_table("out/b.parquet")["prediction"].to_pylist() == [None, None]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a fine film"], r"pairs of texts \(premise, hypothesis\): give two texts for each, got 1"),
        (["a fine film", ""], "command line, pair 1, column 'hypothesis': a text is needed, got ''"),
        (["--input", "rows.csv", "--text_column", "premise"], "--text_column: the run reads pairs of texts"),
        (["--input", "rows.csv", "--bad_rows", "error"], r"rows.csv, line 3, column 'premise': a text is needed"),
        (
            ["--data.truncation", "windows", "a", "b"],
            "windows, but the run was trained on pairs of texts .longest_first",
        ),
        (["--input", "lines.txt"], "lines.txt, line 1, .*: give premise and hypothesis with a tab between"),
    ],
)
def test_what_is_no_pair_is_one_line(run: str, capsys, words: list[str], said: str) -> None:
    write_csv(Path("rows.csv"), [("a", "b"), ("", "b")], ("premise", "hypothesis"))
    Path("lines.txt").write_text("no tab in it\n")
    assert predict(run, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line


def test_in_python_what_is_no_pair_is_named(run: str) -> None:
    loaded = load_run(run, accelerator="cpu")
    for texts in (["a", "b"], [("a", "b", "c")], [("a", " ")], [("a", None)]):
        with pytest.raises(UserError, match="text 0: a pair of texts is needed"):
            loaded.predict(texts)  # type: ignore[arg-type]
    assert loaded.predict([["a fine film", "dull"]]).logits.shape == (1, 2)  # type: ignore[list-item]


def test_test_with_baselines_and_sample(run: str, capsys) -> None:
    assert main(["test", "--run", run, "--before", "false", "--baselines", "true"]) == 0
    record = json.loads((Path(run) / "run.json").read_text())
    assert record["evaluations"]["test"]["rows"] == 24
    capsys.readouterr()
    assert main(["sample", "--run", run, "--n", "3"]) == 0
    assert capsys.readouterr().out.count("✓ hit") <= 3


def test_words_of_both_texts_are_explained(run: str, capsys: pytest.CaptureFixture) -> None:
    loaded = load_run(run, accelerator="cpu")
    (found,) = loaded.explain([("a fine film", "an awful story")], "same")
    assert found.words == ["a", "fine", "film", "an", "awful", "story"]
    logits = loaded.predict([("a fine film", "an awful story"), ("a fine film", "an story")]).logits
    same = loaded.label_names.index("same")
    margins = logits[:, same] - logits[:, 1 - same]
    assert found.effects[4] == pytest.approx(margins[0] - margins[1], abs=1e-4)
    assert main(["explain", "--run", run, "a fine film", "an awful story", "--html", "pair.html"]) == 0
    assert Path("pair.html").read_text().count('<p class="words"><span') >= 2
    assert main(["explain", "--run", run, "a fine film"]) == 2
    assert "give two texts for each, got 1" in capsys.readouterr().err
