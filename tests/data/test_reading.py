import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.data.reading import read_file, read_source
from lightning_lora.errors import UserError

COLUMNS = ["text", "label"]
TRICKY = ["NA", "null", "None", 'with "quotes", commas', "two\nlines", "ünïcødé \u2028 text", " 12 "]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ".json"])
def test_every_format_gives_back_the_texts_as_they_were_written(tmp_path: Path, ending: str) -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": TRICKY, "label": ["a", "b", "a", "b", "a", "b", "a"]})
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        frame.to_parquet(path)
    elif ending.startswith(".json"):
        frame.to_json(path, orient="records", lines=ending == ".jsonl")
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    assert read_file(path, COLUMNS).columns["text"] == TRICKY


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\n\nlast,y\n')
    assert list(read_file(path, COLUMNS).rows) == [2, 5]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\nhi,x\n")
    assert read_file(path, COLUMNS).columns["text"] == ["hi"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "review,label\nhi,x\n", ["no column 'text'", "review, label", "data.text_column"]),
        ("a.csv", "text;label\nhi;x\n", ["no column 'text'", "semicolons"]),
        ("a.csv", "text,label\nhi,x\none,two,three\n", ["line 3", "3 fields", "2"]),
        ("a.csv", "text,label\nhi,x\nshort\n", ["line 3", "1 fields"]),
        ("a.csv", 'text,label\nhi,x\n"open,y\nmore,z\n', ["line 3", "never closed"]),
        ("a.csv", "text,text,label\na,b,c\n", ["'text' stands there twice"]),
        ("a.csv", b"text,label\nhi,x\ncaf\xe9,y\n", ["line 3", "0xe9", "UTF-8"]),
        ("a.csv", "text,label\n", ["holds no rows"]),
        ("a.csv", "", ["no column 'text'"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{"text": "hi"}\n', ["line 2", "no column 'label'"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{oops\n', ["line 2", "not a JSON object"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n[1]\n', ["line 2", "JSON object with fields"]),
        ("a.json", "[1", ["line 1", "not valid JSON"]),
        ("a.parquet", "no parquet", ["not a readable Parquet file"]),
        ("a.xlsx", "x", ["unknown ending '.xlsx'", ".csv"]),
    ],
)
def test_a_fault_is_named_with_file_place_and_remedy(
    tmp_path: Path, name: str, content: str | bytes, said: list[str]
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as raised:
        read_file(path, COLUMNS)
    message = str(raised.value)
    assert name in message and "\n" not in message
    for words in said:
        assert words in message


def test_a_folder_has_a_file_a_split_under_any_usual_name(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test"):
        pq.write_table(pa.table({"text": [name], "label": [0]}), tmp_path / f"{name}.parquet")
    tables = read_source(str(tmp_path), COLUMNS, "label")
    assert {split: len(parts) for split, parts in tables.items()} == {"train": 2, "val": 1, "test": 1}


def test_a_file_a_split(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "text,label\nhi,x\n")
    test = write(tmp_path / "b.jsonl", json.dumps({"text": "ho", "label": "x"}))
    tables = read_source({"train": str(train), "test": str(test)}, COLUMNS, "label")
    assert tables["test"][0].columns["text"] == ["ho"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.csv", "b.csv"], "no file named after a split"),
        (["test.csv"], "no train split"),
        ([], "no file named"),
    ],
)
def test_a_folder_without_a_train_file_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in names:
        write(folder / name, "text,label\nhi,x\n")
    with pytest.raises(UserError, match=said):
        read_source(str(folder), COLUMNS, "label")


def test_class_names_that_a_parquet_file_declares_are_kept(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", COLUMNS, "label").label_names == ["no", "yes"]


def test_a_hub_id_without_a_network_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot load 'nobody/nothing' from the Hub") as raised:
        read_source("nobody/nothing", COLUMNS, "label")
    assert "\n" not in str(raised.value)
