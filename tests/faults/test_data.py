"""Data files as they come: forty that are wrong are caught with their place, twenty-two odd ones are read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.data.reading import READERS, read_tables
from lightning_lora.errors import UserError
from tests.conftest import PAIR_HEADER, WORDS, make_pairs, make_rows, make_sets, write_csv

ROWS = make_rows(60)
GOOD = "".join(f"{text},{label}\n" for text, label in ROWS)
HEAD = "text,label\n"


def lines(*records: object) -> str:
    good = [{"text": text, "label": label} for text, label in ROWS]
    return "\n".join(json.dumps(record) for record in [*good, *records]) + "\n"


def table(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


TEXTS, LABELS = [text for text, _ in ROWS], [label for _, label in ROWS]

#: File name, content, what the message must say. Line 62 is the first after the header and sixty rows.
BAD: dict[str, tuple[str, str | bytes, list[str]]] = {
    "a label is missing": ("a.csv", f"{HEAD}{GOOD}fine,\n", ["line 62", "column 'label'", "label is missing"]),
    "a text is missing": ("a.csv", f"{HEAD}{GOOD},pos\n", ["line 62", "column 'text'", "text is empty"]),
    "a text of spaces": ("a.csv", f"{HEAD}{GOOD}\u00a0 \t,pos\n", ["line 62", "column 'text'", "empty"]),
    "a line with one field": ("a.csv", f"{HEAD}{GOOD}fine\n", ["line 62", "1 fields"]),
    "a line with three fields": ("a.csv", f"{HEAD}{GOOD}fine,film,pos\n", ["line 62", "3 fields", "double quotes"]),
    "a quote that never closes": ("a.csv", f'{HEAD}{GOOD}"fine,pos\n', ["line 62", "never closed"]),
    "letters behind a quote": ("a.csv", f'{HEAD}{GOOD}"fine"x,pos\n', ["line 62"]),
    "Cyrillic": (
        "a.csv",
        f"{HEAD}{GOOD}{'очень хороший товар ' * 9},pos\n".encode("cp1251"),
        ["line 62", "UTF-8", "data.encoding"],
    ),
    "UTF-16 cut short": ("a.csv", f"{HEAD}{GOOD}".encode("utf-16")[:-1], ["line 61", "is not UTF-16"]),
    "a NUL byte in a text": ("a.csv", f"{HEAD}{GOOD}fi\0ne,pos\n", ["line 62", "column 'text'", "NUL"]),
    "a file of NUL bytes": ("a.csv", b"\0" * 4096, ["no column 'text'"]),
    "a NUL byte in JSON": ("a.jsonl", lines({"text": "fi\0ne", "label": "pos"}), ["line 61", "'text'", "NUL"]),
    "no header": ("a.csv", GOOD, ["no column 'text'", "data.text_column"]),
    "another header": ("a.csv", f"review,stars\n{GOOD}", ["no column 'text'", "review, stars"]),
    "semicolons": ("a.csv", (HEAD + GOOD).replace(",", ";"), ["no column 'text'", "semicolons"]),
    "a column twice": ("a.csv", "text,label,text\n" + "a,pos,b\n", ["'text' is duplicated"]),
    "an empty file": ("a.csv", "", ["a.csv"]),
    "a header only": ("a.csv", HEAD, ["has no usable row"]),
    "a million empty lines": ("a.csv", HEAD + "\n" * 1_000_000, ["has no usable row"]),
    "a million empty rows": ("a.csv", HEAD + ",\n" * 1_000_000, ["line 2", "and 999999 more"]),
    "case of a label": ("a.csv", f"{HEAD}{GOOD}fine film,Pos\n", ["line 62", "differs from 'pos' only in case"]),
    "numbers and names": (
        "a.csv",
        f"{HEAD}{GOOD}fine film,1\n",
        ["line 62", "label '1' is a number, but others are", "correct it"],
    ),
    "scores for labels": (
        "a.jsonl",
        lines({"text": "x", "label": 0.5}),
        ["line 61", "label '0.5' is a number", "correct it"],
    ),
    "a label of NaN": ("a.jsonl", lines() + '{"text": "x", "label": NaN}\n', ["line 61", "label is missing"]),
    "a label of null": ("a.jsonl", lines({"text": "x", "label": None}), ["line 61", "label is missing"]),
    "a label that is a list": ("a.jsonl", lines({"text": "x", "label": ["pos"]}), ["line 61", "'label'", "list"]),
    "a label that is an object": ("a.jsonl", lines({"text": "x", "label": {"a": 1}}), ["line 61", "'label'", "dict"]),
    "a text of null": ("a.jsonl", lines({"text": None, "label": "pos"}), ["line 61", "text is null"]),
    "a text that is a number": ("a.jsonl", lines({"text": 7, "label": "pos"}), ["line 61", "got int 7"]),
    "a text that is a list": ("a.jsonl", lines({"text": ["a"], "label": "pos"}), ["line 61", "got list"]),
    "half a character": ("a.jsonl", lines({"text": "\ud800", "label": "pos"}), ["line 61", "surrogate"]),
    "a field is missing": ("a.jsonl", lines({"text": "x"}), ["line 61", "no column 'label'"]),
    "a line that is no JSON": ("a.jsonl", lines() + "{text: x}\n", ["line 61", "not valid JSON"]),
    "JSON that is no object": ("a.jsonl", lines(7), ["line 61", "JSON object with fields"]),
    "JSON nested too deeply": ("a.jsonl", lines() + "[" * 200_000 + "\n", ["line 61"]),
    "one class": ("a.csv", HEAD + "".join(f"{text},pos\n" for text in TEXTS), ["'pos'", "two classes"]),
    "free text for labels": ("a.csv", HEAD + "".join(f"t,{i} x\n" for i in range(1200)), ["different values"]),
    "no Parquet": ("a.parquet", HEAD, ["not a readable Parquet file"]),
    "an unknown ending": ("a.xls", HEAD, ["unknown ending '.xls'"]),
    "an archive": ("a.csv.zip", HEAD, ["unknown ending '.zip'", "unpack it"]),
}


def test_there_are_forty() -> None:
    assert len(BAD) == 40


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, name: str) -> None:
    file, content, said = BAD[name]
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as raised:
        prepare(SourceOptions(str(path)))
    message = str(raised.value)
    said_itself = message.replace(str(tmp_path), "")  # whose length is not the message's
    assert "\n" not in message and len(said_itself) < 600 and file in message
    for words in said:
        assert words in message, message


#: Of each kind a cell that is wrong, and what the message must say.
BAD_CELLS: dict[str, tuple[str, str, object, str]] = {
    "no number": ("regression", "label", "n/a", "is needed (data.task=regression), got 'n/a'"),
    "too large a number": ("regression", "label", -2e38, "a number from -1e+15 to 1e+15 is needed"),
    "NaN": ("regression", "label", float("nan"), "label"),  # a word in CSV, elsewhere missing
    "infinity": ("regression", "label", float("inf"), "a number from -1e+15 to 1e+15 is needed"),
    "no cell": ("regression", "label", None, "the label is missing"),
    "null in a list": ("multi_label", "label", ["neg", None], "a list of words or numbers is needed, got"),
    "a blank label": ("multi_label", "label", ["neg", " "], "a list of words or numbers is needed, got"),
    "null for a list": ("multi_label", "label", None, "the label is missing"),
    "2 in a column of 0 and 1": ("columns", "neg", 2, "0 or 1 is needed, got"),
    "null in a column of 0 and 1": ("columns", "neg", None, "the label is missing"),
    "no premise": ("pairs", "premise", None, "the text is "),
    "no hypothesis": ("pairs", "hypothesis", None, "the text is "),
}
#: A text in a CSV file is no list.
BAD_FILES = [
    (name, ending)
    for name, (kind, *_) in BAD_CELLS.items()
    for ending in (".csv", ".jsonl", ".parquet")
    if (kind, ending) != ("multi_label", ".csv")
]


def write_records(path: Path, records: list[dict[str, object]]) -> None:
    """Writes a file of the ending's format; a Parquet column of cells that are not of one type as text."""
    if path.suffix == ".csv":
        cells = [["" if cell is None else str(cell) for cell in record.values()] for record in records]
        write_csv(path, [tuple(each) for each in cells], tuple(records[0]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        columns = {name: [record[name] for record in records] for name in records[0]}
        for name, values in columns.items():
            if any(isinstance(cell, str) for cell in values):
                columns[name] = [cell if cell is None else str(cell) for cell in values]
        table(path, **columns)


@pytest.mark.parametrize(("name", "ending"), BAD_FILES)
def test_a_bad_cell_of_each_kind_is_one_line_with_its_place_and_what_to_do(
    tmp_path: Path, name: str, ending: str
) -> None:
    kind, column, cell, said = BAD_CELLS[name]
    good: list[dict[str, object]] = [
        {"text": text, "label": each, **{label: int(label in each) for label in WORDS}} for text, each in make_sets(60)
    ]
    more: dict[str, Any] = {"label_column": [*WORDS]} if kind == "columns" else {}
    if kind == "regression":
        good, more = [{**row, "label": 900.0 + i % 7} for i, row in enumerate(good)], {"task": "regression"}
    elif kind == "pairs":
        good = [dict(zip(PAIR_HEADER, row, strict=True)) for row in make_pairs(60)]
        more = {"text_column": PAIR_HEADER[:2]}
    path = tmp_path / f"a{ending}"
    write_records(path, [*good, {**good[0], next(iter(good[0])): "a new text", column: cell}])
    with pytest.raises(UserError) as raised:
        prepare(SourceOptions(str(path), **more))
    message = str(raised.value)
    place = {".csv": "line 62", ".jsonl": "line 61", ".parquet": "row 61"}[ending]
    assert "\n" not in message and f"a{ending}, {place}" in message and "correct" in message and said in message, (
        message
    )
    if cell is None:
        kept = prepare(SourceOptions(str(path), bad_rows="drop", **more))
        assert kept.bad_rows_dropped == 1 and sum(map(len, kept.splits.values())) == 60


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("Pos", r"train\.csv, line 3, column 'label': label 'pos' differs from 'Pos' only in case"),
        ("great", r"test\.csv, line 3, column 'label': label 'great' is not one of"),
    ],
)
def test_labels_of_another_split_are_held_against_those_of_train(tmp_path: Path, second: str, said: str) -> None:
    (tmp_path / "train.csv").write_text(HEAD + GOOD)
    (tmp_path / "test.csv").write_text(f"{HEAD}other text,neg\nfine film,{second}\n")
    with pytest.raises(UserError, match=said):
        prepare(SourceOptions(str(tmp_path)))


def test_declared_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    import datasets

    for split, names in (("train", ["neg", "pos"]), ("test", ["pos", "neg"])):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"text": [f"{split} {text}" for text in TEXTS], "label": [i % 2 for i in range(len(TEXTS))]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="declares the classes"):
        prepare(SourceOptions(str(tmp_path)))


#: Odd, but nothing is wrong with them: content, and a text that must be there as it stands.
FINE: dict[str, tuple[str, str | bytes, str]] = {
    "NA is a text": ("a.csv", f"{HEAD}{GOOD}NA,pos\n", "NA"),
    "null is a text": ("a.csv", f"{HEAD}{GOOD}null,pos\n", "null"),
    "a number is a text": ("a.csv", f"{HEAD}{GOOD}12,pos\n", "12"),
    "quoted commas": ("a.csv", f'{HEAD}{GOOD}"a, b",pos\n', "a, b"),
    "quotes written twice": ("a.csv", f'{HEAD}{GOOD}"a ""b"" c",pos\n', 'a "b" c'),
    "a text of two lines": ("a.csv", f'{HEAD}{GOOD}"a\nb",pos\n', "a\nb"),
    "lines end as on Windows": ("a.csv", f"{HEAD}{GOOD}fine film,pos\n".replace("\n", "\r\n"), "fine film"),
    "UTF-32": ("a.csv", f"{HEAD}{GOOD}café,pos\n".encode("utf-32"), "café"),
    "UTF-16": ("a.csv", f"{HEAD}{GOOD}fine film,pos\n".encode("utf-16"), "fine film"),
    "a byte order mark": ("a.csv", b"\xef\xbb\xbf" + f"{HEAD}{GOOD}fine film,pos\n".encode(), "fine film"),
    "no line end at the end": ("a.csv", f"{HEAD}{GOOD}fine film,pos", "fine film"),
    "empty lines between": ("a.csv", f"{HEAD}{GOOD}\n\nfine film,pos\n", "fine film"),
    "emoji and other scripts": ("a.csv", f"{HEAD}{GOOD}素晴らしい 🎬,pos\n", "素晴らしい 🎬"),
    "one long word": ("a.csv", f"{HEAD}{GOOD}{'x' * 100_000},pos\n", "x" * 100_000),
    "more columns than needed": (
        "a.csv",
        "id,text,label\n" + GOOD.replace("\n", "\n7,").join(["7,", "fine,pos\n"]),
        "fine",
    ),
    "tabs": ("a.tsv", (HEAD + GOOD).replace(",", "\t") + "a, b\tpos\n", "a, b"),
    "labels 0 and 1": (
        "a.csv",
        (HEAD + GOOD + "fine film,pos\n").replace(",pos", ",1").replace(",neg", ",0"),
        "fine film",
    ),
    "fields in another order": ("a.jsonl", lines({"label": "pos", "text": "fine"}), "fine"),
    "more fields in some lines": ("a.jsonl", lines({"label": "pos", "text": "fine", "x": None}), "fine"),
    "a line separator in a text": ("a.jsonl", lines({"label": "pos", "text": "a\u2028b"}), "a\u2028b"),
    "a list of records": ("a.json", json.dumps([json.loads(line) for line in lines().splitlines()]), TEXTS[0]),
    "labels with spaces around": ("a.csv", f"{HEAD}{GOOD}fine film, pos \n", "fine film"),
}


def test_there_are_twenty_two() -> None:
    assert len(FINE) == 22


@pytest.mark.parametrize("name", FINE)
def test_an_odd_file_is_no_false_alarm(tmp_path: Path, name: str) -> None:
    file, content, text = FINE[name]
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    prepared = prepare(SourceOptions(str(path)))
    assert sorted(prepared.label_names) in (["neg", "pos"], ["0", "1"])
    assert any(text in rows.texts for rows in prepared.splits.values())


def test_a_row_of_fifty_megabytes_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{HEAD}{GOOD}{'long ' * 10_000_000},pos\n")
    assert sum(map(len, read_tables(str(path), ["text", "label"]))) == len(ROWS) + 1


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(content=st.binary(max_size=300), ending=st.sampled_from(sorted(READERS)))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    read_or_refused(tmp_path / f"a{ending}", content)


@FUZZ
@given(
    content=st.text(alphabet='abc,"\n\r\t\0 é{}[]:\\u0d8', max_size=200).map(lambda text: HEAD + text),
    ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]),
)
def test_almost_a_table_is_read_or_refused(tmp_path: Path, content: str, ending: str) -> None:
    read_or_refused(tmp_path / f"a{ending}", content.encode())


def read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        prepare(SourceOptions(str(path)))
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
