import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.data.sources import row_sources
from lightning_lora.errors import UserError
from tests.conftest import make_rows, write_csv
from tests.data.test_reading import read_source, write


def test_a_folder_has_a_file_a_split_under_any_usual_name(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test"):
        pq.write_table(pa.table({"text": [name], "label": [0]}), tmp_path / f"{name}.parquet")
    tables = read_source(str(tmp_path))
    assert {split: len(parts) for split, parts in tables.items()} == {"train": 2, "val": 1, "test": 1}


def test_a_file_a_split(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "text,label\nhi,x\n")
    test = write(tmp_path / "b.jsonl", json.dumps({"text": "ho", "label": "x"}))
    tables = read_source({"train": str(train), "test": str(test)})
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
        read_source(str(folder))


def test_a_hub_id_without_a_network_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot load 'nobody/nothing' from the Hub") as raised:
        read_source("nobody/nothing")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_what_save_to_disk_wrote_is_read_with_its_names_and_order(tmp_path: Path, kind: str) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    columns = {"text": [f"text {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    if kind == "Dataset":
        rows.save_to_disk(tmp_path / "saved", num_shards=3)
        assert read_source({"train": str(tmp_path / "saved")}).keys() == {"train"}
    else:
        shards = {"train": 3, "validation": 1}
        datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved", num_shards=shards)
    tables = read_source(str(tmp_path / "saved"))
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    theirs = {"train": loaded} if kind == "Dataset" else {"train": loaded["train"], "val": loaded["validation"]}
    assert tables.keys() == theirs.keys()
    for split, parts in tables.items():
        assert [text for part in parts for text in part.columns["text"]] == theirs[split]["text"]
        assert {tuple(part.class_names["label"]) for part in parts} == {("no", "yes")}


@pytest.mark.parametrize(
    "names",
    [
        ["train/a.csv", "test/b.csv"],
        ["plain_text/train-0.csv", "plain_text/test-0.csv"],
        ["train.csv.gz", "test.csv.gz"],
        ["data/train/a.csv.gz", "data/test/b.csv.gz"],
    ],
)
def test_splits_in_folders_and_compressed_files(tmp_path: Path, names: list[str]) -> None:
    import gzip

    for name in names:
        path = tmp_path / "rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = f"text,label\n{path.stem},x\n".encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert read_source(str(tmp_path / "rows")).keys() == {"train", "test"}


def fill(folder: Path, names: list[str]) -> Path:
    """Writes files of one row, whose text is their name, in a folder and gives it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": [name], "label": [0]})
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        elif path.suffix == ".arrow":
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
        else:
            path.write_text(f"text,label\n{name},0\n" if path.suffix == ".csv" else '{"description": "x"}')
    return folder


@pytest.mark.parametrize(
    ("names", "splits", "left_out"),
    [
        (["train.csv", "test.csv", "eval.csv"], {"train", "test"}, "eval.csv"),
        (["train.csv", "testing.csv", "other/more.csv"], {"train", "test"}, "other/more.csv"),
        (["train/a.csv", "unsupervised/a.csv"], {"train"}, "unsupervised/a.csv"),
        (["dataset_infos.json", "data/train-0.parquet", "data/test-0.parquet"], {"train", "test"}, ""),
        (["notes.json", "data/train-0.parquet", "data/test-0.parquet"], {"train", "test"}, "notes.json"),
        (["dataset_info.json", "config.json", "rows.csv"], {"train"}, ""),
        (
            ["ds-train.arrow", "ds-test.arrow", "cache-1f.arrow", "dataset_info.json"],
            {"train", "test"},
            "",
        ),
        (["ds-train-00000-of-00002.arrow", "ds-train-00001-of-00002.arrow"], {"train"}, ""),
        (["train.csv", "old-train.csv"], {"train"}, "old-train.csv"),
        (["rows.csv", "raw/a.csv"], {"train"}, "raw/a.csv"),
    ],
)
def test_what_is_left_out_of_a_folder_is_said(
    tmp_path: Path, names: list[str], splits: set[str], left_out: str
) -> None:
    folder = fill(tmp_path / "rows", names)
    tables = read_source(str(folder))
    assert tables.keys() == splits
    assert all(Path(table.origin).name.count(split) or split == "train" for split in splits for table in tables[split])
    warnings = row_sources(str(folder))[1]
    assert len(warnings) == bool(left_out)
    assert all(f"left out {left_out}, named after none" in warning for warning in warnings)


def test_files_that_are_not_the_pieces_of_one_split_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "rows", ["train.csv", "validation_matched.csv", "validation_mismatched.csv"])
    (warning,) = row_sources(str(folder))[1]
    assert "val split" in warning and "all of validation_matched.csv, validation_mismatched.csv" in warning


def test_the_remedy_for_what_was_left_out_works_and_stored_rows_say_it_too(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = make_rows(60)
    write_csv(folder / "train.csv", rows[:40])
    write_csv(folder / "test.csv", rows[40:50])
    options = SourceOptions(str(folder))
    assert not prepare(options, tmp_path / "cache").warnings
    write_csv(folder / "eval.csv", rows[50:])
    for _ in range(2):
        assert "left out eval.csv" in "".join(prepare(options, tmp_path / "cache").warnings)
    files = {
        split: str(folder / f"{name}.csv") for split, name in (("train",) * 2, ("validation", "eval"), ("test",) * 2)
    }
    assert len(prepare(SourceOptions(files), tmp_path / "cache").splits["val"]) == 10


def test_splits_of_a_saved_or_hub_data_set_that_are_left_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    both = datasets.DatasetDict({"train": rows, "unsupervised": rows, "validation_matched": rows})
    both.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: both)
    for source in (str(tmp_path / "saved"), "someone/something"):
        (warning,) = row_sources(source)[1]
        assert re.search(r"left out unsupervised.*, validation_matched", warning)


@pytest.mark.parametrize(
    ("name", "remedy"), [("train.parquet.gz", "unpack it"), ("test.xlsx", "save the sheet as CSV")]
)
def test_a_split_in_a_format_that_is_not_read_is_refused(tmp_path: Path, name: str, remedy: str) -> None:
    fill(tmp_path, ["train.csv"])
    write(tmp_path / name, b"\x1f\x8b")
    with pytest.raises(UserError, match=rf"{name}: unknown ending '.*; {remedy}"):
        read_source(str(tmp_path))
