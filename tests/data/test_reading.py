import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.data.reading import Table, read_tables
from lightning_lora.data.sources import row_sources
from lightning_lora.errors import UserError

COLUMNS = ["text", "label"]
TRICKY = ["NA", "null", "None", 'with "quotes", commas', "two\nlines", "ünïcødé \u2028 text", " 12 "]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, encoding: str | None = None) -> Table:
    """The only table of a file."""
    (table,) = read_tables(str(path), COLUMNS, encoding=encoding)
    return table


def read_source(source: object) -> dict[str, list[Table]]:
    """The tables of each split of a source."""
    found, _ = row_sources(source)
    return {split: [table for part in parts for table in part.tables(COLUMNS)] for split, parts in found.items()}


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
    assert read(path).columns["text"] == TRICKY


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",x\n\nlast,y\n')
    assert list(read(path).rows) == [2, 5]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\nhi,x\n")
    assert read(path).columns["text"] == ["hi"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "review,label\nhi,x\n", ["no column 'text'", "review, label", "data.text_column"]),
        ("a.csv", "text;label\nhi;x\n", ["no column 'text'", "semicolons"]),
        ("a.csv", "text,label\nhi,x\none,two,three\n", ["line 3", "3 fields", "2"]),
        ("a.csv", "text,label\nhi,x\nshort\n", ["line 3", "1 fields"]),
        ("a.csv", 'text,label\nhi,x\n"open,y\nmore,z\n', ["line 3", "never closed"]),
        ("a.csv", "text,text,label\na,b,c\n", ["'text' is duplicated"]),
        ("a.csv", "text,label\nhi,x\nпривет мир,y\n".encode("cp1251"), ["line 3", "0xef", "data.encoding"]),
        ("a.csv", "text,label\nпривет,x\n".encode() + b"caf\xe9,y\n", ["line 3", "0xe9"]),
        ("a.csv", b"\xff\xfet\0e\0x", ["UTF-16"]),
        ("a.csv.gz", b"\x1f\x8bcut", ["damaged, or not whole"]),
        ("a.zip", "x", ["unknown ending '.zip'", "unpack it"]),
        ("a.arrow", "no arrow", ["not a readable Arrow file"]),
        ("a.csv", "", ["no column 'text'"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{"text": "hi"}\n', ["line 2", "no column 'label'"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{oops\n', ["line 2", "not valid JSON"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n[1]\n', ["line 2", "JSON object with fields"]),
        ("a.json", "[1", ["line 1", "not valid JSON"]),
        ("a.parquet", "no parquet", ["not a readable Parquet file"]),
        ("a.parquet.gz", b"\x1f\x8b", ["unknown ending '.parquet.gz'", "unpack it"]),
        ("a.xlsx", "x", ["unknown ending '.xlsx'", "save the sheet as CSV"]),
    ],
)
def test_a_fault_is_named_with_file_place_and_remedy(
    tmp_path: Path, name: str, content: str | bytes, said: list[str]
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as raised:
        read(path)
    message = str(raised.value)
    assert name in message and "\n" not in message
    for words in said:
        assert words in message


def test_class_names_that_a_parquet_file_declares_are_kept(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").class_names == {"label": ["no", "yes"]}


def save(frame, path: Path) -> Path:
    """Writes a table in the format of the ending."""
    import datasets

    compression = "gzip" if path.suffix == ".gz" else None
    ending = path.name.partition(".")[2].removesuffix(".gz")
    if ending in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",", compression=compression)
    elif ending in ("json", "jsonl"):
        frame.to_json(path, orient="records", lines=ending == "jsonl", compression=compression)
    elif ending == "parquet":
        frame.to_parquet(path)
    elif ending == "feather.arrow":
        frame.to_feather(path)
    else:
        datasets.Dataset.from_pandas(frame).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"]),
        (["10", "9", "10"], ["9", "10"]),
        ([10, 9, 10], ["9", "10"]),
        ([10.0, 9.0, 10.0], ["9", "10"]),
        ([True, False, True], ["False", "True"]),
        (["caf\u00e9", "cafe\u0301", "b\u00a0a"], ["b a", "caf\u00e9"]),
    ],
)
def test_the_same_labels_are_the_same_classes_from_every_format(tmp_path: Path, labels: list, names: list) -> None:
    import pandas as pd

    from lightning_lora.data.labels import LabelCells, encode_labels

    frame = pd.DataFrame({"text": ["a b", "c d", "e f"], "label": labels})
    found = {}
    for ending in ("csv", "tsv", "json", "jsonl", "csv.gz", "jsonl.gz", "parquet", "feather.arrow", "saved"):
        source = save(frame, tmp_path / f"rows.{ending}")
        found[ending] = encode_labels(LabelCells.of(read_source(str(source)), "label", 3), None)
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet(tmp_path / "category.parquet")
    found["category"] = encode_labels(LabelCells.of(read_source(str(tmp_path / "category.parquet")), "label", 3), None)
    assert {ending: labels.names for ending, labels in found.items()} == dict.fromkeys(found, names)
    numbers = {tuple(labels.codes) for labels in found.values()}
    assert len(numbers) == 1


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "decimal128(3, 1)"])
def test_a_number_in_few_bytes_is_the_number_that_was_written(tmp_path: Path, kind: str) -> None:
    from decimal import Decimal

    kind_of = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
    cells = pa.array([Decimal("0.1"), Decimal("2.0")], pa.decimal128(3, 1))
    cells = cells.cast(pa.float32()).cast(kind_of[kind]) if kind in kind_of else cells
    cells = pa.array([0.1, 2.0]) if kind == "float64" else cells
    pq.write_table(pa.table({"text": ["a", "b"], "label": cells}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet").columns["label"]
    assert found == pytest.approx([0.1, 2.0], rel=1e-3 if kind == "float16" else 1e-15)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, ending: str) -> None:
    text = "The café wasn’t bad – it was “great”, 很好"
    row = json.dumps({"text": text, "label": "pos"}, ensure_ascii=False)
    content = f'text,label\n"{text}",pos\n' if ending == ".csv" else f"{row}\n"
    table = read(write(tmp_path / f"a{ending}", content.encode(encoding)))
    assert table.columns == {"text": [text], "label": ["pos"]}


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Die Größe ist nicht schön"),
        ("cp1250", "Zażółć gęślą jaźń, świetna jakość"),
        ("cp1251", "Это очень хороший товар, рекомендую всем"),
        ("shift-jis", "この商品はとても良いです"),
        ("gb18030", "这个产品非常好，推荐给大家"),
        ("euc-kr", "이 제품은 매우 좋습니다"),
    ],
)
def test_another_encoding_is_refused_until_it_is_given(tmp_path: Path, encoding: str, text: str) -> None:
    rows = ["text,label", "fine,x", *(f'"{text} {i}",x' for i in range(20))]
    path = write(tmp_path / "a.csv", "\n".join(rows).encode(encoding))
    with pytest.raises(UserError, match=r"a\.csv, line 3: byte 0x.. is not UTF-8 text; .* data.encoding") as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert text in read(path, encoding).columns["text"][1]


def test_a_stated_encoding_is_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    for encoding in ("cp1250", "utf-8", "utf-16"):
        assert read(write(tmp_path / "a.csv", "text,label\nkuća,x\n".encode(encoding)), "cp1250").columns["text"] == [
            "kuća"
        ]
    with pytest.raises(UserError, match=r"line 2: byte 0x.. is not SHIFT-JIS text"):
        read(write(tmp_path / "a.csv", "text,label\nkuća\xff\n".encode("cp1252", "replace")), "shift-jis")
    for wrong in ("cp-1250", "base64", "\0"):
        with pytest.raises(UserError, match=r"data\.encoding: Python knows none '.*'; give one such as"):
            read(tmp_path / "a.csv", wrong)
