"""A streamed train split against the same files held in memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main
from lightning_lora.data import reading, sources, stored
from lightning_lora.data.augment import Augmentation
from lightning_lora.data.batching import LengthBatchSampler
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError
from lightning_lora.runs.folder import RunFolder
from tests.conftest import make_rows

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
    def make(source: object = str(folder), stream: bool = True, **settings: object) -> TextDataModule:
        return TextDataModule(source, str(tiny_base), max_length=32, stream=stream, **settings)

    return make


def mapped(folder: Path, train: str) -> dict[str, str]:
    return {"train": train, "validation": str(folder / "val.parquet"), "test": str(folder / "test.parquet")}


def batches(data: TextDataModule) -> list[dict]:
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("settings", [{}, {"train_rows": 60, "test_rows": 0.5}, {"truncation": "windows"}])
def test_batches_record_and_places_are_those_of_rows_held_in_memory(
    module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    for module_ in (reading, stored):
        monkeypatch.setattr(module_, "BATCH_ROWS", 7)
    held, streamed = (
        module(str(folder), stream, cache_dir=str(tmp_path / f"cache-{stream}"), **settings) for stream in (False, True)
    )
    for theirs, ours in zip(batches(held), batches(streamed), strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(value, ours[key])
            assert getattr(value, "dtype", None) == getattr(ours[key], "dtype", None)
    expected, got = held.describe(), streamed.describe()
    assert got["repeats_removed"] == {"train_in_test": 2, "val_in_test": 0, "train_in_val": 1}
    assert got == expected
    assert streamed.class_counts == held.class_counts
    for data, name in ((held, "held"), (streamed, "streamed")):
        data.prepared.write_parquet(tmp_path / name)
    assert pq.read_table(tmp_path / "streamed").equals(pq.read_table(tmp_path / "held"))
    rows = streamed.rows("train")
    assert rows.origins == held.rows("train").origins
    np.testing.assert_array_equal(rows.numbers, held.rows("train").numbers)


def test_four_devices_share_the_rows_without_repeats(module) -> None:
    data = module()
    data.setup("fit")
    dataset = data.dataset("train")
    samplers = [LengthBatchSampler(dataset.lengths, 16, 0, rank=rank, processes=4) for rank in range(4)]
    seen = [row for sampler in samplers for part in sampler if part.share for row in dataset.__getitems__(part)["rows"]]
    assert sorted(map(int, seen)) == list(range(147))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((None, "pos"), "train-1.parquet, row 31, column 'text': the text is null; .*data.bad_rows=drop"),
        (("  ", "pos"), "train-1.parquet, row 31, column 'text': the text is empty"),
        (("fine", None), "train-1.parquet, row 31, column 'label': the label is missing"),
        (("fi\0ne", "pos"), "train-1.parquet, row 31, column 'text': a NUL byte"),
        (("fine", "7"), "train-1.parquet, row 31, column 'label': label '7', but others are"),
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
    data, held = (module(str(folder), stream, bad_rows="drop") for stream in (True, False))
    assert data.prepared.bad_rows_dropped == 3
    assert data.describe() == held.describe()
    assert data.rows("train").numbers.tolist() == held.rows("train").numbers.tolist()


def test_several_text_columns_with_blank_parts_are_joined_as_in_memory(module, folder: Path) -> None:
    for path in folder.iterdir():
        table = pq.read_table(path)
        titles = [["", None, "Title"][i % 3] for i in range(len(table))]
        texts = [None if title else text for title, text in zip(titles, table["text"].to_pylist(), strict=True)]
        body = [f"{i} words" if text is None and i % 2 else text for i, text in enumerate(texts)]
        pq.write_table(pa.table({"title": titles, "body": body, "label": table["label"]}), path)
    streamed, held = (module(stream=stream, text_column=["title", "body"]) for stream in (True, False))
    for one, other in zip(batches(streamed), batches(held), strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
    assert streamed.prepared.describe() == held.prepared.describe()


def test_labels_are_mapped_over_all_files_as_in_memory(module, folder: Path) -> None:
    """Files whose labels appear in another order, and files that declare names for their numbers."""
    write(folder / "train-0.parquet", sorted(make_rows(50, seed=7), key=lambda row: row[1], reverse=True))
    assert module().describe() == module(stream=False).describe()
    for path in folder.iterdir():
        rows = [(text, ["neg", "pos"].index(label)) for text, label in pq.read_table(path).to_pandas().to_numpy()]
        write(path, rows, names=["bad", "good"])
    assert module().describe() == module(stream=False).describe()
    assert module().label_names == ["bad", "good"]
    write(folder / "train-2.parquet", [(text, 1) for text, _ in make_rows(9)], names=["good", "bad"])
    with pytest.raises(UserError, match=r"train-2\.parquet: declares the classes"):
        module().label_names  # noqa: B018


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "2", "3", "4"], ["one", "two", "three", "four"]),
        ([1, 2, 3, 4], {4: "high", 3: "high", 2: "low", 1: "low"}),
        (["caf\u00e9", "cafe\u0301", "b", "b\u200b"], None),
        ([0.5, 1.0, 1.5, 2.0], [0.5, 1, 1.5, 2]),
        ([True, False, True, False], ["no", "yes"]),
        (list(range(0, 36, 3)), None),
    ],
)
def test_labels_and_warnings_are_those_of_rows_held_in_memory(module, folder: Path, labels: list, names) -> None:
    for path in sorted(folder.iterdir()):
        texts = pq.read_table(path).column("text").to_pylist()
        write(path, [(text, labels[i % len(labels)]) for i, text in enumerate(texts)])
    held, streamed = (module(str(folder), stream, label_names=names) for stream in (False, True))
    assert streamed.describe() == held.describe()
    assert streamed.rows("train").labels.tolist() == held.rows("train").labels.tolist()


def test_scores_are_refused_as_they_are_of_rows_held_in_memory(module, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        texts = pq.read_table(path).column("text").to_pylist()
        write(path, [(text, i / 100) for i, text in enumerate(texts)])
    said = []
    for stream in (False, True):
        with pytest.raises(UserError, match="a measure, not classes") as raised:
            module(str(folder), stream).label_names  # noqa: B018
        said.append(str(raised.value).partition(": ")[2])
    assert said[0] == said[1]


def test_a_column_that_is_no_label_is_refused(module, folder: Path) -> None:
    write(folder / "train-0.parquet", [(f"text {i}", f"text {i}") for i in range(1100)])
    with pytest.raises(UserError, match=r"holds 1,102 different values in 1,200 rows .* no classes"):
        module().label_names  # noqa: B018


def test_an_interrupted_reading_resumes_with_the_files_that_are_missing(
    module, folder: Path, monkeypatch: pytest.MonkeyPatch
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
    assert streamed == [module(stream=False).describe()] * 2
    write(folder / "train-1.parquet", list(make_rows(50, seed=9)))
    read.clear()
    changed = module().describe()
    assert read == ["train-1.parquet"]
    assert changed == module(stream=False).describe()


@pytest.mark.parametrize("train", ["memory://news/train-*.parquet", "memory://news", "memory://news/"])
def test_files_of_an_fsspec_filesystem(module, folder: Path, train: str) -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    for path in folder.glob("train-*.parquet"):
        filesystem.pipe_file(f"/news/{path.name}", path.read_bytes())
    try:
        theirs, ours = module(stream=False).describe(), module(mapped(folder, train)).describe()
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
        ({"train": "rows.csv"}, "rows.csv is no .parquet file"),
        ({"validation": None}, "has no validation split, .* give data.source.validation: FILE"),
        ({"test": None}, "has no test split"),
        ({"train": None}, "has no train split"),
        ("owner/name", "'owner/name' is no folder of Parquet files"),
        ("ag_news", "'fancyzhx/ag_news' is no folder of Parquet files"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(module, folder: Path, source, said: str) -> None:
    Path("rows.csv").write_text("text,label\n")
    if isinstance(source, dict):
        whole = mapped(folder, str(folder / "train-*.parquet")) | source
        source = {split: place for split, place in whole.items() if place is not None}
    with pytest.raises(UserError, match=said) as raised:
        module(source).label_names  # noqa: B018
    assert "\n" not in str(raised.value)


def test_settings_that_streamed_rows_cannot_follow_are_refused(module, folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.augmentation: needs the texts"):
        module(augmentation=Augmentation(delete=0.1))
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
        "data": {"source": source, "stream": True, "max_length": 32},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("tiny.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "tiny.yaml", "--name", "run"]) == 0
    assert "train: 147 rows" in capsys.readouterr().out
    record = RunFolder.open(Path("logs/run")).read()
    assert record["data"]["splits"]["train"]["rows"] == 147 and record["config"]["data"]["stream"] is True
    assert pq.read_table("logs/run/splits.parquet").num_rows == 207
    assert main(["test", "--run", "logs/run"]) == 0
    assert main(["sample", "--run", "logs/run"]) == 0
    changed = source | {"train": f"{folder}/train-0.parquet", "test": str(folder / "train-1.parquet")}
    assert main(["test", "--run", "logs/run", "--data.source", json.dumps(changed)]) == 2
    assert "50 of the 50 rows to evaluate are rows that logs/run was trained" in capsys.readouterr().err
