import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.data.reading import Table, read_file
from lightning_lora.data.sources import row_sources
from lightning_lora.errors import UserError

COLUMNS = ["text", "label"]
TRICKY = ["NA", "null", "None", 'with "quotes", commas', "two\nlines", "ünïcødé \u2028 text", " 12 "]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_source(source: object, columns: list[str], label_column: str) -> dict[str, list[Table]]:
    """The tables of each split of a source."""
    found, _ = row_sources(source)
    return {
        split: [table for part in parts for table in part.tables(columns, label_column)]
        for split, parts in found.items()
    }


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
        ("a.csv", "text,text,label\na,b,c\n", ["'text' is duplicated"]),
        ("a.csv", "text,label\nhi,x\nпривет мир,y\n".encode("cp1251"), ["line 3", "0xef", "iconv -f", "cp1251"]),
        ("a.csv", "text,label\nпривет,x\n".encode() + b"caf\xe9,y\n", ["line 3", "0xe9", "1 places are not"]),
        ("a.csv", b"\xff\xfet\0e\0x", ["UTF-16"]),
        ("a.csv", b"PK\x03\x04rest", ["an Excel workbook or a ZIP archive"]),
        ("a.csv.gz", b"\x1f\x8bcut", ["damaged, or not whole"]),
        ("a.zip", "x", ["unknown ending '.zip'", "unpack it"]),
        ("a.arrow", "no arrow", ["not a readable Arrow file"]),
        ("a.csv", "text,label\n", ["holds no rows"]),
        ("a.csv", "", ["no column 'text'"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{"text": "hi"}\n', ["line 2", "no column 'label'"]),
        ("a.jsonl", '{"text": "hi", "label": 1}\n{oops\n', ["line 2", "not a JSON object"]),
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
        read_file(path, COLUMNS)
    message = str(raised.value)
    assert name in message and "\n" not in message
    for words in said:
        assert words in message


def test_class_names_that_a_parquet_file_declares_are_kept(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", COLUMNS, "label").label_names == ["no", "yes"]


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

    from lightning_lora.data.labels import encode_labels

    frame = pd.DataFrame({"text": ["a b", "c d", "e f"], "label": labels})
    found = {}
    for ending in ("csv", "tsv", "json", "jsonl", "csv.gz", "jsonl.gz", "parquet", "feather.arrow", "saved"):
        source = save(frame, tmp_path / f"rows.{ending}")
        found[ending] = encode_labels(read_source(str(source), COLUMNS, "label"), "label", None)
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet(tmp_path / "category.parquet")
    found["category"] = encode_labels(read_source(str(tmp_path / "category.parquet"), COLUMNS, "label"), "label", None)
    assert {ending: labels.names for ending, labels in found.items()} == dict.fromkeys(found, names)
    numbers = {tuple(labels.encoded["train"][0]) for labels in found.values()}
    assert len(numbers) == 1


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "decimal128(3, 1)"])
def test_a_number_in_few_bytes_is_the_number_that_was_written(tmp_path: Path, kind: str) -> None:
    from decimal import Decimal

    kind_of = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
    cells = pa.array([Decimal("0.1"), Decimal("2.0")], pa.decimal128(3, 1))
    cells = cells.cast(pa.float32()).cast(kind_of[kind]) if kind in kind_of else cells
    cells = pa.array([0.1, 2.0]) if kind == "float64" else cells
    pq.write_table(pa.table({"text": ["a", "b"], "label": cells}), tmp_path / "a.parquet")
    found = read_file(tmp_path / "a.parquet", COLUMNS, "label").columns["label"]
    assert found == pytest.approx([0.1, 2.0], rel=1e-3 if kind == "float16" else 1e-15)


WESTERN = [
    "The café wasn’t bad – it was “great”, with tea for 5 € and the naïve waiter… that’s ½ of it",
    "L’œuvre « créée » est une réussite avec des acteurs – voilà… pour 5€",
    "Die Größe ist nicht „schön“, und der Preis ist höher",
    "¿Qué tal? El año pasado los niños estaban con una señora muy simpática, pero fría",
    "Não é muito bom, mas a criança gostou com uma condição",
    "Questo è molto più bello che non il caffè della città",
    "Tämä on hyvä elokuva, mutta se ei ole pitkä",
    "The price was £5, and at 20°C the résumé was that of Zürich; the m² don’t fit the “2 × 3 m” room®",
    "Det er ikke så dårlig, og jeg kjøper det med glæde",
]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize("text", WESTERN)
def test_an_encoding_that_is_certain_is_read_and_said(tmp_path: Path, encoding: str, ending: str, text: str) -> None:
    text = text.encode("latin-1", "ignore").decode("latin-1") if encoding == "latin-1" else text
    text = text.replace('"', "")
    row = json.dumps({"text": text, "label": "pos"}, ensure_ascii=False)
    content = f'text,label\n"{text}",pos\n' if ending == ".csv" else f"{row}\n"
    table = read_file(write(tmp_path / f"a{ending}", content.encode(encoding)), COLUMNS)
    assert table.columns == {"text": [text], "label": ["pos"]}
    (warning,) = table.warnings
    assert "is not UTF-8; read as" in warning and str(tmp_path) in warning


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1250", "Zażółć gęślą jaźń, świetna jakość"),
        ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy"),
        ("cp1250", "Kiváló minőség, gyűrű, gyors szállítás"),
        ("cp1251", "Это очень хороший товар, рекомендую всем"),
        ("cp1255", "מוצר טוב מאוד, מומלץ לכולם"),
        ("cp1253", "Αυτό το προϊόν είναι πολύ καλό"),
        ("cp1254", "Çok güzel bir ürün, ığdır, şahane"),
        ("cp850", "Das war schön, aber die Größe passt nicht"),
        ("macintosh", "L’été dernier, j’ai été très déçu"),
        ("koi8-r", "Это очень хороший товар, рекомендую всем"),
        ("shift-jis", "この商品はとても良いです"),
        ("gb18030", "这个产品非常好，推荐给大家"),
        ("euc-kr", "이 제품은 매우 좋습니다"),
        # Short ones, and those that are words of Windows-1252 too.
        ("cp1250", "că"),
        ("cp1250", "že več kot dobro"),
        ("cp1250", "kuća je lepa i čista"),
        ("cp1250", "the film that was in the kuća of Dončić"),
        ("cp1250", "był to dobry film"),
        ("cp1257", "mājas ir labas"),
        ("cp1257", "gėlė"),
        ("iso8859-3", "ĉiuj estas bonaj"),
        ("macintosh", "It was the “great.” of that"),
        ("macintosh", "los niños que una muy mañana"),
        ("macintosh", "del país con una muy"),
        ("macintosh", "the jalapeño that was it"),
        ("cp850", "voilà"),
        ("cp850", "the film was voilà, and that was it"),
        ("cp850", "il della più, che non"),
        ("cp850", "una muy está! con los"),
        ("cp850", "die Ähre und der ähnliche, das ist es"),
        ("cp1255", "הו"),
        ("cp1255", "the word הו and that"),
        ("cp1251", "да"),
        ("cp874", "ดี"),
        ("gb18030", "好"),
        ("gb18030", "the film, 很好, and that was it"),
        ("gb18030", "it was good，and that was the end。"),
        ("euc-jp", "良い"),
        ("big5", "很好"),
    ],
)
def test_an_encoding_that_is_not_certain_is_named_and_the_remedies_work(
    tmp_path: Path, encoding: str, text: str
) -> None:
    import re
    import shlex
    import subprocess

    folder = tmp_path / "a person's"
    folder.mkdir()
    rows = ["text,label", *(f'"{text} {i}",x' for i in range(20))]
    for count in (2, 21):
        path = write(folder / "a.csv", "\n".join(rows[:count]).encode(encoding))
        with pytest.raises(UserError, match="not certain") as raised:
            read_file(path, COLUMNS)
        match = re.search(r"not certain: (.*)\. Set data.encoding .*: (iconv .*) > NEW$", str(raised.value))
        assert match and re.search(rf"' in .*\b{encoding}\b", match[1]), raised.value
    assert text in read_file(path, COLUMNS, encoding=encoding).columns["text"][0]
    command = shlex.split(match[2].replace("ENCODING", encoding))
    assert text in subprocess.run(command, capture_output=True, check=True).stdout.decode()


def test_a_stated_encoding_is_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    for encoding in ("cp1250", "utf-8", "utf-16"):
        table = read_file(
            write(tmp_path / "a.csv", "text,label\nkuća,x\n".encode(encoding)), COLUMNS, encoding="cp1250"
        )
        assert table.columns["text"] == ["kuća"]
    with pytest.raises(UserError, match=r"line 2: is not UTF-8, and data.encoding says SHIFT-JIS, but byte 0x"):
        read_file(
            write(tmp_path / "a.csv", "text,label\nkuća\xff\n".encode("cp1252", "replace")),
            COLUMNS,
            encoding="shift-jis",
        )
    for wrong in ("cp-1250", "utf-16", "utf-7", "base64", "\0"):
        with pytest.raises(UserError, match=r"data\.encoding: '.*' is none that ASCII is a part of"):
            read_file(tmp_path / "a.csv", COLUMNS, encoding=wrong)
