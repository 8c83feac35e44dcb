"""Parquet files that are read in batches, local or not, against the same rows as CSV."""

import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from lightning_lora.cli import main
from lightning_lora.data import reading, sources, stored
from lightning_lora.data.batching import LengthBatchSampler
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError
from lightning_lora.runs.folder import RunFolder
from tests.conftest import KINDS, make_rows, write_kind

Row = tuple[object, object]


def write(path: Path, rows: list[Row], group: int = 20, names: list[str] | None = None) -> Path:
    table = pa.table({"text": pa.array([row[0] for row in rows]), "label": pa.array([row[1] for row in rows])})
    if names:
        feature = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three train files of 50 rows, of which two stand in test and one in validation too; and 30 of each of these."""
    rows: list[Row] = list(make_rows(210))
    held = {"val": rows[150:180], "test": rows[180:]}
    train = [*rows[:147], (f"{rows[180][0]} !".upper(), "neg"), rows[181], rows[150]]
    for i in range(3):
        write(tmp_path / "data" / f"train-{i}.parquet", train[50 * i : 50 * i + 50])
    for name, part in held.items():
        write(tmp_path / "data" / f"{name}.parquet", part)
    return tmp_path / "data"


@pytest.fixture
def module(folder: Path, tiny_base: Path) -> Callable[..., TextDataModule]:
    def make(source: object = str(folder), **settings: object) -> TextDataModule:
        return TextDataModule(source, str(tiny_base), max_length=32, **settings)

    return make


def mapped(folder: Path, train: str) -> dict[str, str]:
    return {"train": train, "validation": str(folder / "val.parquet"), "test": str(folder / "test.parquet")}


@pytest.fixture
def as_csv(folder: Path, tmp_path: Path) -> str:
    """The same splits as a CSV file each."""
    (tmp_path / "csv").mkdir()
    for split in ("train", "val", "test"):
        tables = [pq.read_table(path) for path in sorted(folder.glob(f"{split}*.parquet"))]
        csv.write_csv(pa.concat_tables(tables), tmp_path / "csv" / f"{split}.csv")
    return str(tmp_path / "csv")


def batches(data: TextDataModule) -> list[dict]:
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("settings", [{}, {"train_rows": 60, "test_rows": 0.5}, {"truncation": "windows"}])
def test_batches_record_and_places_are_those_of_rows_that_are_read_whole(
    module, as_csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    for reader in (reading, stored):
        monkeypatch.setattr(reader, "BATCH_ROWS", 7)
    whole, streamed = module(as_csv, **settings), module(**settings)
    for theirs, ours in zip(batches(whole), batches(streamed), strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(value, ours[key])
            assert getattr(value, "dtype", None) == getattr(ours[key], "dtype", None)
    expected, got = whole.describe(), streamed.describe()
    assert got["duplicates_removed"] == {"train_in_test": 2, "val_in_test": 0, "train_in_val": 1}
    for split, report in expected["splits"].items():
        assert got["splits"][split]["fingerprint"] == report["fingerprint"]
        assert got["splits"][split]["rows_by_class"] == report["rows_by_class"]
    assert streamed.class_counts == whole.class_counts
    streamed.prepared.write_parquet(tmp_path / "splits.parquet")
    places = pq.read_table(tmp_path / "splits.parquet").filter(pc.field("split") == "train")
    rows = streamed.rows("train")
    assert places["row"].to_pylist() == rows.numbers.tolist() and places["origin"].to_pylist() == rows.origins
    lines = whole.rows("train").numbers - 1  # of one file, below its header
    files = np.array([int(Path(origin).stem.removeprefix("train-")) for origin in rows.origins])
    np.testing.assert_array_equal(50 * files + rows.numbers, lines)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_streamed_to_the_same_rows_and_weights(
    kind: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lists of labels and as numbers of four bytes, beside text in a CSV file; pairs in two columns."""
    own = write_kind(tmp_path / "rows.csv", kind, 100)
    table = csv.read_csv(tmp_path / "rows.csv", convert_options=csv.ConvertOptions(strings_can_be_null=False))
    if kind == "multi_label":
        lists = [[label for label in cell.split("|") if label] for cell in table["label"].to_pylist()]
        table = table.set_column(1, "label", pa.array(lists))
    elif kind == "regression":
        table = table.set_column(1, "label", table["label"].cast(pa.float32()))
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=20)
    streamed = {name: value for name, value in own.items() if name != "label_separator"}
    streamed |= {"source": str(tmp_path / "rows.parquet")}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    for reader in (reading, stored):
        monkeypatch.setattr(reader, "BATCH_ROWS", 7)
    for name, data in (("whole", own), ("streamed", streamed)):
        config = {"model": {"base_model": str(tiny_base)}, "data": {**data, "max_length": 24}, "trainer": trainer}
        Path("tiny.yaml").write_text(json.dumps(config))
        assert main(["fit", "--config", "tiny.yaml", "--name", name]) == 0
    whole, ours = (torch.load(f"logs/{name}/checkpoints/last.ckpt")["state_dict"] for name in ("whole", "streamed"))
    assert whole.keys() == ours.keys() and all(torch.equal(whole[key], ours[key]) for key in whole)
    one, other = (RunFolder.open(Path("logs") / name).read() for name in ("whole", "streamed"))
    assert one["metrics"] == other["metrics"]
    for record in (one, other):
        for split in record["data"]["splits"].values():
            split.pop("from_cache", None)
    assert one["data"]["splits"] == other["data"]["splits"]


def test_four_devices_share_the_rows_without_repeats(module) -> None:
    data = module()
    data.setup("fit")
    dataset = data.dataset("train")
    samplers = [LengthBatchSampler(dataset.lengths, 16, 0, rank=rank, processes=4) for rank in range(4)]
    seen = [
        row
        for sampler in samplers
        for part in sampler
        if part.step_weight
        for row in dataset.__getitems__(part)["rows"]
    ]
    assert sorted(map(int, seen)) == list(range(147))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((None, "pos"), "train-1.parquet, row 31, column 'text': the text is null; .*data.bad_rows=drop"),
        (("  ", "pos"), "train-1.parquet, row 31, column 'text': the text is empty"),
        (("fine", None), "train-1.parquet, row 31, column 'label': the label is missing"),
        (("fi\0ne", "pos"), "train-1.parquet, row 31, column 'text': a NUL byte"),
        (("fine", "7"), "train-1.parquet, row 31, column 'label': label '7' is a number, but others are"),
        (("fine", "POS"), "train-1.parquet, row 31, column 'label': label 'POS' differs from 'pos' only in case"),
    ],
)
def test_a_bad_cell_is_named_by_file_row_and_column(module, folder: Path, row: Row, said: str) -> None:
    write(folder / "train-1.parquet", [*make_rows(30, seed=5), row, *make_rows(9, seed=6)])
    with pytest.raises(UserError, match=said) as raised:
        module().label_names  # noqa: B018
    assert "\n" not in str(raised.value)


def test_rows_without_text_or_label_are_dropped_and_counted_on_request(module, folder: Path) -> None:
    write(folder / "train-1.parquet", [(None, "pos"), *make_rows(30, seed=5), ("fine", None), ("", "pos")])
    data = module(bad_rows="drop")
    assert data.prepared.bad_rows_dropped == 3
    rows = data.rows("train")
    kept = [number for number, origin in zip(rows.numbers, rows.origins, strict=True) if "train-1" in origin]
    assert kept == list(range(2, 32))


def test_labels_are_mapped_over_all_files(module, folder: Path) -> None:
    """Files whose labels appear in another order, and files that declare names for their numbers."""
    write(folder / "train-0.parquet", sorted(make_rows(50, seed=7), key=lambda row: row[1], reverse=True))
    data = module()
    numbered = dict(zip(data.rows("train").texts, data.rows("train").labels.tolist(), strict=True))
    assert all(numbered[text] == ["neg", "pos"].index(label) for text, label in make_rows(50, seed=7))
    for path in folder.iterdir():
        rows = [(text, ["neg", "pos"].index(label)) for text, label in pq.read_table(path).to_pandas().to_numpy()]
        write(path, rows, names=["bad", "good"])
    assert module().label_names == ["bad", "good"]
    write(folder / "train-2.parquet", [(text, 1) for text, _ in make_rows(9)], names=["good", "bad"])
    with pytest.raises(UserError, match=r"train-2\.parquet: declares the classes"):
        module().label_names  # noqa: B018


def test_a_column_that_is_no_label_is_refused(module, folder: Path) -> None:
    write(folder / "train-0.parquet", [(f"text {i}", f"text {i}") for i in range(1100)])
    with pytest.raises(UserError, match=r"holds 1,102 different values in 1,200 rows .* no classes"):
        module().label_names  # noqa: B018


def test_an_interrupted_reading_resumes_with_the_files_that_are_missing(
    module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tables_of = sources.read_tables

    def tables(name: str, *rest: object, **options: object) -> Iterator[Table]:
        for table in tables_of(name, *rest, **options):
            if interrupted and len(read) == 1:
                raise KeyboardInterrupt
            yield table
        if "train" in name:
            read.append(Path(name).name)

    monkeypatch.setattr(sources, "read_tables", tables)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        module().label_names  # noqa: B018
    interrupted = False
    streamed = [module().describe(), module().describe()]
    assert read == ["train-0.parquet", "train-1.parquet", "train-2.parquet"]
    assert streamed == [module(cache_dir=str(tmp_path / "other")).describe()] * 2
    write(folder / "train-1.parquet", list(make_rows(50, seed=9)))
    read.clear()
    changed = module().describe()
    assert read == ["train-1.parquet"]
    assert changed == module(cache_dir=str(tmp_path / "third")).describe()


@pytest.mark.parametrize("train", ["memory://news/train-*.parquet", "memory://news", "memory://news/"])
def test_files_of_an_fsspec_filesystem(module, folder: Path, train: str) -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    for path in folder.glob("train-*.parquet"):
        filesystem.pipe_file(f"/news/{path.name}", path.read_bytes())
    try:
        theirs, ours = module().describe(), module(mapped(folder, train)).describe()
        assert ours["splits"] == theirs["splits"]
        assert set(module(mapped(folder, train)).rows("train").origins) == {
            f"memory:///news/train-{i}.parquet" for i in range(3)
        }
    finally:
        filesystem.rm("/news", recursive=True)


@pytest.mark.parametrize("train", ["data", "data/train-*.parquet", "data/**/train-?.parquet"])
def test_local_files_by_folder_and_pattern(module, folder: Path, train: str) -> None:
    if train == "data":
        for name in ("val", "test"):
            (folder / f"{name}.parquet").rename(f"{name}.parquet")
        source = mapped(Path(), train)
    else:
        source = mapped(folder, train)
    assert len(module(source).rows("train")) == 147


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"train": "none-*.parquet"}, "data.source.train: no file matches 'none-"),
        ({"train": "nowhere://bucket/a.parquet"}, "data.source: 'nowhere://bucket/a.parquet' cannot be reached"),
        ({"train": "memory://none/*.parquet"}, "no file matches 'memory://none"),
        ({"train": "memory://none/train.csv"}, "no file matches 'memory://none"),
        ({"train": None}, "has no train split"),
    ],
)
def test_what_is_not_there_is_one_line(module, folder: Path, source: dict, said: str) -> None:
    whole = mapped(folder, str(folder / "train-*.parquet")) | source
    source = {split: place for split, place in whole.items() if place is not None}
    with pytest.raises(UserError, match=said) as raised:
        module(source).label_names  # noqa: B018
    assert "\n" not in str(raised.value)


def test_faults_of_a_file_among_several_are_named(module, folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.val_size: 10, but the source has a val split"):
        module(val_size=10).label_names  # noqa: B018
    (folder / "train-2.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"train-2\.parquet: not a readable Parquet file"):
        module().label_names  # noqa: B018
    write(folder / "train-2.parquet", [("a", "b")]).rename(folder / "train-1.parquet")
    pq.write_table(pa.table({"words": ["a"]}), folder / "train-2.parquet")
    with pytest.raises(UserError, match=r"train-2\.parquet: no column 'text'"):
        module().label_names  # noqa: B018


def test_fit_test_and_sample_from_the_command_line(folder: Path, tiny_base: Path, capsys) -> None:
    source = mapped(folder, f"{folder}/train-*.parquet")
    config = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": source, "max_length": 32},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("tiny.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "tiny.yaml", "--name", "run"]) == 0
    assert "train: 147 rows" in capsys.readouterr().out
    record = RunFolder.open(Path("logs/run")).read()
    assert record["data"]["splits"]["train"]["rows"] == 147
    assert pq.read_table("logs/run/splits.parquet").num_rows == 207
    assert main(["test", "--run", "logs/run"]) == 0
    assert main(["sample", "--run", "logs/run"]) == 0
    changed = source | {"train": f"{folder}/train-0.parquet", "test": str(folder / "train-1.parquet")}
    assert main(["test", "--run", "logs/run", "--data.source", json.dumps(changed)]) == 2
    assert "50 of the 50 rows to evaluate are rows that logs/run was trained" in capsys.readouterr().err


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; with ``Last-Modified`` as its class says."""

    dated = True

    def log_message(self, *args: Any) -> None: ...

    def send_header(self, keyword: str, value: str) -> None:
        if self.dated or keyword != "Last-Modified":
            super().send_header(keyword, value)


@pytest.mark.parametrize("dated", [True, False])
def test_a_file_that_changes_on_the_web_is_read_again(
    module, folder: Path, tmp_path: Path, dated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(_Server, "dated", dated)
    file = folder / "rows.parquet"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for age, labels in ((100, ["neg", "pos"]), (0, ["bad", "good"])):
            table = pa.table({"text": [f"a film {i}" for i in range(80)], "label": labels * 40})
            pq.write_table(table, file)
            os.utime(file, (time.time() - age,) * 2)
            fsspec.filesystem("http").clear_instance_cache()
            data = module(source={"train": f"http://127.0.0.1:{server.server_port}/rows.parquet"})
            assert data.label_names == labels and len(data.rows("train")) > 40
        server.shutdown()
