import csv
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder
from tests.commands.test_fit_test_predict import fitted  # noqa: F401  # a run that was fitted and tested


@pytest.fixture
def run(fitted: RunFolder, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(fitted.path, tmp_path / "run"))


def test_texts_are_a_table_and_a_page(run: Path, capsys: pytest.CaptureFixture) -> None:
    text = "the film was awful\x1b[31m in town"
    capsys.readouterr()
    assert main(["explain", "--run", str(run), text, "a fine film", "--top", "3", "--html", "out/one.html"]) == 0
    out = capsys.readouterr().out
    first, second = load_run(run, precision="32-true").explain([text, "a fine film"])
    rows = re.findall(r"│ (\w+) +│ +(-?\d+\.\d{4}) │ +(\d\.\d{4}) │", out)
    assert [word for word, *_ in rows] == [word for word, _ in [*first.top(3), *second.top(3)]]
    for (_, adds, _), (_, effect) in zip(rows, [*first.top(3), *second.top(3)], strict=True):
        assert float(adds) == pytest.approx(effect, abs=2e-4)
    assert first.summary in out and "\x1b" not in out
    page = Path("out/one.html").read_text()
    assert page.count("<h3>") == 2 and ">awful</span>" in page


def test_evaluated_rows_give_words_and_labels_to_check_with_their_rows(run: Path, capsys) -> None:
    path = run / "predictions" / "test.parquet"
    table = pq.read_table(path)
    sure = [name for name in table.column_names if name.startswith("p(")]
    for name in sure:  # a model that is sure of what each row says, but for the first
        label = ["pos", *table["label"].to_pylist()[1:]] if table["label"][0].as_py() == "neg" else None
        label = label or ["neg", *table["label"].to_pylist()[1:]]
        values = [[0.01, 0.99][f"p({each})" == name] for each in label]
        table = table.set_column(table.column_names.index(name), name, [values])
    pq.write_table(table, path)
    capsys.readouterr()
    assert main(["explain", "--run", str(run), "--rows", "8"]) == 0
    out = capsys.readouterr().out
    assert f"8 of {len(table)} test rows were explained. Without the 10% of the words" in out
    assert f"1 of {len(table)} labels are to be checked" in out
    (issue,) = csv.DictReader((run / "explain" / "test-labels.csv").open(newline=""))
    source = Path(issue["origin"]).read_text().splitlines()
    assert source[int(issue["row"]) - 1] == f"{issue['text']},{issue['label']}"
    assert float(issue["quality"]) == pytest.approx(0.01)
    words = list(csv.DictReader((run / "explain" / "test-words.csv").open(newline="")))
    assert {row["label"] for row in words} <= {"neg", "pos"} and all(int(row["texts"]) >= 3 for row in words)
    assert issue["text"] in (run / "explain" / "test.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fine", "--rows", "3"], "--rows: of evaluated rows, which are explained where no text is given"),
        (["fine", "--top", "0"], "--top: a number of at least 1 is needed, got 0"),
        (["fine", "--label", "poss"], "no label 'poss'; did you mean pos?"),
        (["--split", "val", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        ([" "], "text 0: a text is needed"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Path, capsys, words: list[str], said: str) -> None:
    capsys.readouterr()
    assert main(["explain", "--run", str(run), *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
