"""``predict`` of a file, of standard input and of words: rows without a text, other columns, and the printed table."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora import load_run
from lightning_lora.cli import main
from lightning_lora.commands import predict as command
from lightning_lora.errors import UserError
from lightning_lora.inference.output import print_table
from tests.conftest import write_csv

NEW = ["text", "prediction", "probability", "p(neg)", "p(pos)"]


@pytest.fixture(scope="module")
def run(place: Path) -> str:
    return str(place / "run")


def predict(run: str, *words: str) -> int:
    return main(["predict", "--run", run, *words])


def error(capsys: pytest.CaptureFixture) -> str:
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not said.out, said
    return lines[0]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the model is loaded."""
    monkeypatch.setattr(command, "load_for", None)


CSV = 'id,review,note\n1,a fine film,"a, ""b"""\n2,,\n3,  ,x\n4,an awful film,\n'


def test_rows_without_a_text_stay_and_other_columns_are_unchanged(run: str, capsys: pytest.CaptureFixture) -> None:
    Path("in.csv").write_text(CSV)
    assert predict(run, "--input", "in.csv", "--text_column", "review", "--format", "csv") == 0
    said = capsys.readouterr()
    assert "warning: 2 of 4 rows have no text and so no prediction: in.csv, line 3; in.csv, line 4 " in said.err
    found = list(csv.DictReader(io.StringIO(said.out)))
    source = list(csv.DictReader(io.StringIO(CSV)))
    assert list(found[0]) == ["review", *NEW[1:], "id", "note"]
    assert [{name: row[name] for name in source[0]} for row in found] == source
    assert all(found[i][name] == "" for i in (1, 2) for name in NEW[1:])
    assert predict(run, "a fine film", "an awful film", "--format", "csv") == 0
    alone = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for row, expected in zip((found[0], found[3]), alone, strict=True):
        assert row["prediction"] == expected["prediction"]
        assert float(row["p(pos)"]) == pytest.approx(float(expected["p(pos)"]), abs=1e-5)


def test_of_json_lines_nested_values_and_lacking_fields_are_kept(run: str, capsys: pytest.CaptureFixture) -> None:
    records: list[dict[str, Any]] = [
        {"text": "a fine film", "meta": {"a": [1, 2.5, None]}, "id": 12345678901234567890},
        {"id": 2},
        {"text": 5, "meta": "\ud800"},
        {"text": ["x"]},
        {"text": "\ud800 film", "id": True},
        {"text": "x\0y"},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert predict(run, "--input", "in.jsonl", "--output", "out.jsonl") == 0
    assert "warning: 4 of 6 rows" in capsys.readouterr().err
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [[row["meta"], row["id"]] for row in found] == [[r.get("meta"), r.get("id")] for r in records]
    assert [row["prediction"] is None for row in found] == [False, True, True, True, True, False]
    assert found[1]["p(neg)"] is None and found[1]["text"] is None


def test_of_parquet_types_are_kept_and_only_blank_rows_are_no_error(run: str) -> None:
    table = pa.table(
        {
            "n": pa.array([1, 2], pa.int8()),
            "text": pa.array(["", None]).dictionary_encode(),
            "when": pa.array([0, 1], pa.timestamp("us")),
            "kind": pa.array(["a", "b"]).dictionary_encode(),
            "raw": pa.array([b"\xff", None]),
        }
    )
    pq.write_table(table, "in.parquet")
    assert predict(run, "--input", "in.parquet", "--output", "out.parquet") == 0
    found = pq.read_table("out.parquet")
    assert found.column_names == [*NEW, "n", "when", "kind", "raw"]
    assert found["prediction"].null_count == found["probability"].null_count == 2
    assert found.schema.field("prediction").type == pa.string()
    assert found.schema.field("p(pos)").type == pa.float64()
    for name in table.column_names:
        assert found[name].to_pylist() == table[name].to_pylist()
        assert found.schema.field(name).type == table.schema.field(name).type


def test_lines_of_standard_input_stay_lines(run: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, empty in (("a fine film\n\n \nawful\n", [1, 2]), ("\n\n", [0, 1]), ("x " * 500_000, [])):
        monkeypatch.setattr("sys.stdin", io.StringIO(content))
        assert predict(run, "--format", "jsonl") == 0
        said = capsys.readouterr()
        rows = [json.loads(line) for line in said.out.splitlines()]
        assert [i for i, row in enumerate(rows) if row["prediction"] is None] == empty
        assert len(rows) == len(content.splitlines()) and ("warning:" in said.err) == bool(empty)


def test_a_typed_text_that_is_empty_is_refused_unless_asked_for(run: str, capsys: pytest.CaptureFixture) -> None:
    assert predict(run, "a fine film", " ") == 2
    said = error(capsys)
    assert "command line, text 2, column 'text': a text is needed, got ' '" in said and "--bad_rows empty" in said
    assert predict(run, "a fine film", " ", "--bad_rows", "empty", "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[2] == " ,,,,"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--text_column", "review", "--bad_rows", "error"],
            "in.csv, line 3, column 'review': a text is needed, got ''",
        ),
        ([], "no column 'text'; it has: id, review, note. Set data.text_column and"),
        (["--text_column", "review", "--data.bad_rows", "drop"], "give --bad_rows empty or --bad_rows error"),
        (["--text_column", "review", "--data.train_rows", "5"], "--data.train_rows: predict does not use it"),
        (["--text_column", "review", "--seed_everything", "5"], "--seed_everything: predict does not use it"),
        (["--text_column", "review", "--config", "more.yaml"], "--data.bad_rows: predict does not use it"),
        (["--text_column", "review", "--bad_rows", "drop"], "bad_rows: expected one of 'empty', 'error' | null"),
        (["--input", "odd.jsonl", "--output", "out.csv"], ".csv cannot hold column 'text'"),
        (
            ["--input", "numbers.jsonl"],
            "line 1, column 'text': a text is needed, got 5; no row has a text. Set --text_c",
        ),
        (["--input", "mixed.jsonl"], ".parquet cannot hold column 'a'"),
        (["--text_column", "review", "--output", "in.csv/out.csv"], "--output: cannot write in.csv/out.csv"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_done(run: str, words: list[str], said: str, capsys) -> None:
    Path("in.csv").write_text(CSV)
    Path("more.yaml").write_text("data: {bad_rows: drop}\n")
    Path("odd.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    Path("numbers.jsonl").write_text('{"text": 5}\n{"text": null}\n')
    Path("mixed.jsonl").write_text('{"text": "fine", "a": 1}\n{"text": "fine", "a": "x"}\n')
    assert predict(run, "--input", "in.csv", "--output", "out.parquet", *words) == 2
    assert said in error(capsys) and not Path("out.parquet").exists()


def test_remedies_help(run: str) -> None:
    Path("mixed.jsonl").write_text('{"text": "fine", "a": 1}\n{"text": "fine", "a": "x"}\n')
    assert predict(run, "--input", "mixed.jsonl", "--output", "out.jsonl") == 0
    Path("in.csv").write_text(CSV)
    assert predict(run, "--input", "in.csv", "--text_column", "review", "--output", "out.parquet") == 0
    assert predict(run, "--input", "in.csv", "--text_column", "[review,note]", "--output", "two.csv") == 0
    rows = list(csv.DictReader(io.StringIO(Path("two.csv").read_text())))
    assert list(rows[0]) == ["review", "note", *NEW[1:], "id"]
    assert [bool(row["prediction"]) for row in rows] == [True, False, True, True]
    Path("joined.txt").write_text('a fine film a, "b"\n\nx\nan awful film\n')
    assert predict(run, "--input", "joined.txt", "--output", "one.csv") == 0
    alone = list(csv.DictReader(io.StringIO(Path("one.csv").read_text())))
    assert [row["prediction"] for row in alone] == [row["prediction"] for row in rows]


def test_signs_of_a_line_s_end_stay_within_their_cell(run: str) -> None:
    """A lone carriage return, which Python 3.11 does not quote by itself."""
    texts = ["a fine\rfilm", "a\r\nfine", "fine\nfilm", "plain"]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text, "n": float("nan")}) + "\n" for text in texts))
    assert predict(run, "--input", "in.jsonl", "--output", "out.csv") == 0
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts and len(rows[0]) == 1 + len(NEW)
    assert predict(run, "--input", "out.csv", "--output", "again.jsonl") == 0
    pq.write_table(pa.table({"text": texts, "n": [float("inf"), float("nan"), 1.0, 2.0]}), "in.parquet")
    assert predict(run, "--input", "in.parquet", "--output", "out.jsonl") == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in Path("out.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [None, None, 1.0, 2.0]


def test_what_a_loaded_run_cannot_read_or_do_is_said(run: str) -> None:
    with pytest.raises(UserError, match="text 0: a text is needed"):
        load_run(run, accelerator="cpu").predict(["\ud800 x"])
    with pytest.raises(UserError, match="predicts on one device"):
        load_run(run, accelerator="cpu", devices=2)


def test_empty_columns_without_a_name_are_left_out(run: str, capsys: pytest.CaptureFixture) -> None:
    Path("in.csv").write_text("text,n,,\na fine film,1,,\n")
    assert predict(run, "--input", "in.csv", "--output", "out.csv") == 0
    assert next(csv.reader(io.StringIO(Path("out.csv").read_text()))) == [*NEW, "n"]
    Path("in.csv").write_text("text,n,,\na fine film,1,,x\n")
    capsys.readouterr()
    assert predict(run, "--input", "in.csv", "--output", "out.csv") == 2
    assert "in.csv, line 2: 2 columns have no name" in error(capsys)


def test_a_file_beside_the_output_is_left_alone(run: str, capsys: pytest.CaptureFixture) -> None:
    Path("writable").write_text("mine")
    assert predict(run, "a film", "--output", "out.csv") == 0
    assert Path("writable").read_text() == "mine" and {p.name for p in Path().iterdir()} == {"writable", "out.csv"}
    Path("folder.csv").mkdir()
    assert predict(run, "a film", "--output", "folder.csv") == 2
    assert "'folder.csv' is a folder" in capsys.readouterr().err


def test_an_output_is_an_input_and_columns_of_the_same_name_are_kept(run: str, capsys: pytest.CaptureFixture) -> None:
    write_csv(Path("0.csv"), [("a fine film", "x"), ("an awful film", "y")], header=("review", "text"))
    for i in range(3):
        capsys.readouterr()
        assert predict(run, "--input", f"{i}.csv", "--text_column", "review", "--output", f"{i + 1}.csv") == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
        assert len(warnings) == bool(i) and all("'prediction' as 'prediction_input" in line for line in warnings)
    first, *_, last = (list(csv.DictReader(io.StringIO(Path(f"{i}.csv").read_text()))) for i in (1, 2, 3))
    for row, expected in zip(last, first, strict=True):
        assert row["text"] == expected["text"] and row["review"] == expected["review"]
        assert {row[f"prediction{more}"] for more in ("", "_input", "_input_input")} == {expected["prediction"]}
    assert len(last[0]) == 2 + 3 * len(NEW[1:])


def test_a_file_in_another_encoding_is_refused_until_its_encoding_is_given(run: str, capsys) -> None:
    for name, content in (("in.csv", "text\nkuća\n"), ("in.txt", "kuća\n")):
        Path(name).write_text(content, encoding="cp1250")
        assert predict(run, "--input", name, "--output", "out.csv") == 2
        assert "byte 0xe6 is not UTF-8 text" in (said := error(capsys)) and "set data.encoding" in said
        assert predict(run, "--input", name, "--output", "out.csv", "--data.encoding", "cp1250") == 0
        assert next(csv.DictReader(io.StringIO(Path("out.csv").read_text())))["text"] == "kuća"
        capsys.readouterr()
        assert predict(run, "--input", name, "--data.encoding", "cp-1250") == 2
        assert "data.encoding: Python knows none 'cp-1250'" in error(capsys)


LABELS = {
    "two": ["negative", "positive"],
    "four": ["World", "Sports", "Business", "Sci/Tech"],
    "long": ["a label of several words, " * 3, "日本語のラベル"],
    "many": [f"class {i}" for i in range(30)],
}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("case", LABELS)
def test_the_table_fits_and_leaves_out_classes_where_there_is_no_room(
    case: str, width: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    labels = LABELS[case]
    columns: dict[str, Any] = {
        "text": ["long " * 90, "映画" * 60, "\x1b[31mred", None],
        "prediction": [*labels[:1] * 3, None],
    }
    columns["probability"] = [0.9876, 0.8765, 0.7654, None]
    columns |= {f"p({name})": [0.1234, 0.2345, 0.3456, None] for name in labels}
    print_table(columns)
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= width
    expected = ["0.9876", "0.8765", "0.7654"]
    if (case, width) in (("two", 80), ("two", 120), ("four", 120)):
        expected += ["0.1234", "0.2345", "0.3456"] * len(labels)
    assert sorted(word for word in out.replace("│", " ").split() if word[:2] == "0.") == sorted(expected)
    assert "\x1b" not in out


def test_at_80_columns_two_classes_are_a_table_with_the_text(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table({"text": ["word " * 30], "prediction": ["pos"], "probability": [0.9], "p(neg)": [0.1], "p(pos)": [0.9]})
    row = capsys.readouterr().out.splitlines()[3]
    assert "word word word word word" in row and row.count("│") == 6 and "0.1000 │ 0.9000 │" in row
