"""Several labels a text, and numbers: as they are written in files, and as rows are split by them."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.data.prepare import Prepared, SourceOptions, prepare
from lightning_lora.data.splits import stratified_sample
from lightning_lora.errors import UserError
from tests.conftest import make_rows

LABELS = ["angry", "happy", "sad"]
SETS = [["angry"], [], ["happy", "sad"], ["sad"], ["angry", "happy", "sad"], ["happy"]] * 10
TEXTS = [text for text, _ in make_rows(len(SETS))]


def write(folder: Path, kind: str) -> dict[str, object]:
    """A file of the same texts and labels; the options that read it."""
    flags = [[int(name in each) for name in LABELS] for each in SETS]
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "label": pa.array(SETS, pa.list_(pa.string()))}), folder / "a.parquet")
        return {"source": str(folder / "a.parquet")}
    if kind == "jsonl":
        lines = [json.dumps({"text": text, "label": each[::-1]}) for text, each in zip(TEXTS, SETS, strict=True)]
        (folder / "a.jsonl").write_text("\n".join(lines))
        return {"source": str(folder / "a.jsonl")}
    if kind == "separator":
        lines = ["text,label", *(f"{text},{' ; '.join(each)}" for text, each in zip(TEXTS, SETS, strict=True))]
        (folder / "a.csv").write_text("\n".join(lines) + "\n")
        return {"source": str(folder / "a.csv"), "label_separator": ";"}
    if kind == "columns":
        rows = [",".join([text, *map(str, each)]) for text, each in zip(TEXTS, flags, strict=True)]
        (folder / "a.csv").write_text("\n".join([",".join(["text", *LABELS]), *rows]) + "\n")
        return {"source": str(folder / "a.csv"), "label_column": LABELS}
    table = pa.table({"text": TEXTS, **{name: [bool(f[i]) for f in flags] for i, name in enumerate(LABELS)}})
    pq.write_table(table, folder / "a.parquet")
    return {"source": str(folder / "a.parquet"), "label_column": LABELS}


def labels_by_text(prepared: Prepared) -> dict[str, list[str]]:
    found = {}
    for rows in prepared.splits.values():
        for text, each in zip(rows.texts, rows.labels, strict=True):
            found[text] = [name for name, has in zip(prepared.label_names, each, strict=True) if has]
    return found


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "separator", "columns", "booleans"])
def test_the_same_labels_from_every_format(kind: str, cached: bool, tmp_path: Path) -> None:
    for _ in range(2 if cached else 1):
        prepared = prepare(SourceOptions(**write(tmp_path, kind)), tmp_path / "cache" if cached else None)
        assert prepared.task == "multi_label" and prepared.label_names == LABELS
        assert labels_by_text(prepared) == {text: sorted(each) for text, each in zip(TEXTS, SETS, strict=True)}
        assert sum(np.array(prepared.class_counts(split)) for split in prepared.splits).tolist() == [20, 30, 30]


def test_columns_are_labels_also_where_no_row_has_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,mild,toxic", *(f"text number {i},{i % 2},0" for i in range(40))]) + "\n")
    prepared = prepare(SourceOptions(str(path), label_column=["toxic", "mild"]))
    assert prepared.label_names == ["mild", "toxic"]
    assert sum(np.array(prepared.class_counts(split)) for split in prepared.splits).tolist() == [20, 0]
    path.write_text(path.read_text().replace(",1,", ",0,"))
    with pytest.raises(UserError, match="holds no label in train"):
        prepare(SourceOptions(str(path), label_column=["toxic", "mild"]))


def test_labels_are_named_as_single_ones_are(tmp_path: Path) -> None:
    given = write(tmp_path, "jsonl")
    names = {"angry": "anger", "happy": "joy", "sad": "low"}
    prepared = prepare(SourceOptions(**given, label_names=names))
    assert prepared.label_names == ["anger", "joy", "low"]
    declared = {"label": {"feature": {"_type": "ClassLabel", "names": LABELS}, "_type": "List"}}
    numbers = pa.array([[LABELS.index(name) for name in each] for each in SETS], pa.list_(pa.int64()))
    metadata = {"huggingface": json.dumps({"info": {"features": declared}})}
    pq.write_table(
        pa.table({"text": TEXTS, "label": numbers}).replace_schema_metadata(metadata), tmp_path / "b.parquet"
    )
    prepared = prepare(SourceOptions(str(tmp_path / "b.parquet")))
    assert labels_by_text(prepared) == {text: sorted(each) for text, each in zip(TEXTS, SETS, strict=True)}


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (
            [["a", ["x"]], ["b", "y"]],
            {},
            "row 2, column 'label': a list of labels is needed in all",
        ),
        ([["a", ["x"]], ["b", [["y"]]]], {}, "row 2, column 'label': a list of words or numbers is needed"),
        ([["a", ["x"]], ["b", ["x"]]], {}, "fewer than two labels"),
        (
            [["a", [0.5, 0.2]], ["b", [0.1, 1.0]]],
            {},
            "line 1, column 'label': a list of labels is needed, got [0.5, 0.2], whose numbers are measures; write the",
        ),
        ([["a", ["x"]], ["b", None]], {}, "line 2, column 'label': the label is missing"),
        (
            [["a", ["x"]], ["b", ["y"]]],
            {"task": "single_label"},
            "line 1, column 'label': a list of labels, but data.task is",
        ),
        (
            [["a", "x"], ["b", "y"]],
            {"task": "multi_label"},
            "data.task: multi_label, but column 'label' holds no",
        ),
        ([["a", ["x"]], ["b", 3]], {"label_separator": ";"}, "data.label_separator is for texts, got ['x']"),
        (
            [["a", "1"], ["b", "much"]],
            {"task": "regression"},
            "line 2, column 'label': a number from -1e+15 to 1e+15 is needed (data.task=regression), got 'much'",
        ),
        ([["a", "x"], ["b", "y"]], {"label_column": "text"}, "'text' is named twice"),
        ([["a", "x"], ["b", "y"]], {"task": "regression"}, "the column holds no numbers, as 'x'; leave data.task out"),
        (
            [["a", "1,5"], ["b", "0,5"]],
            {"task": "regression"},
            "line 1, column 'label': data.task is regression, but the column holds no numbers, as '1,5'; write numbers",
        ),
        (
            [["a", "1"], ["b", "2"]],
            {"task": "regression", "label_separator": ";"},
            "data.label_separator: it makes lists",
        ),
        (
            [[f"text {i}", i] for i in range(20)],
            {"task": "multi_label"},
            "data.task: multi_label, but column 'label' holds numbers; set data.task=regression",
        ),
        (
            [["a", "1"], ["b", "2"], ["c", "n/a"]],
            {},
            "line 3, column 'label': label 'n/a' is a word, but others are 1, 2",
        ),
        ([["a", 1], ["b", 2]], {"task": "regression", "label_names": ["x"]}, "data.label_names: numbers"),
        ([["a", 1], ["b", 1]], {"task": "regression"}, "has the same number in every row"),
        ([["a", 2e9], ["b", 2e9 + 9]], {"task": "regression"}, "32-bit floats hardly tell from one another"),
    ],
)
def test_faults_are_said_in_a_line(rows: list, options: dict, says: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        prepare(SourceOptions(str(tmp_path / "a.jsonl"), **options))
    assert says.replace("row 2", "line 2") in str(error.value) and "\n" not in str(error.value)


def test_columns_are_labels_also_without_a_row_and_texts_may_be_lists(tmp_path: Path) -> None:
    rows = "".join(f"{text},{i % 2},{i // 2 % 2},0\n" for i, text in enumerate(TEXTS))
    (tmp_path / "a.csv").write_text(f"text,y,x,never\n{rows}")
    prepared = prepare(SourceOptions(str(tmp_path / "a.csv"), label_column=["y", "x", "never"]))
    assert prepared.label_names == ["never", "x", "y"] and prepared.class_counts("train")[0] == 0
    assert any("train has no row of never" in warning for warning in prepared.warnings)
    one = prepare(SourceOptions(str(tmp_path / "a.csv"), label_column=["y"]))
    assert (one.task, one.label_names) == ("single_label", ["0", "1"])
    lines = [json.dumps({"text": text, "label": json.dumps(each)}) for text, each in zip(TEXTS, SETS, strict=True)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    for separator in (None, ";"):
        prepared = prepare(SourceOptions(str(tmp_path / "b.jsonl"), label_separator=separator))
        assert labels_by_text(prepared) == {text: sorted(each) for text, each in zip(TEXTS, SETS, strict=True)}


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("kind", [str, int])
def test_lists_in_a_csv_are_those_of_json_or_of_pandas(write, kind: type, tmp_path: Path) -> None:
    names = {
        label: f"{label} \U0001f600" if kind is str else i
        for i, label in enumerate(sorted({x for each in SETS for x in each}))
    }
    with (tmp_path / "a.csv").open("w", newline="") as file:
        own = ([text, write([names[label] for label in each])] for text, each in zip(TEXTS, SETS, strict=True))
        csv.writer(file).writerows([["text", "label"], *own])
    prepared = prepare(SourceOptions(str(tmp_path / "a.csv")))
    assert prepared.task == "multi_label" and prepared.label_names == [str(name) for name in names.values()]
    expected = {text: sorted(str(names[x]) for x in each) for text, each in zip(TEXTS, SETS, strict=True)}
    assert labels_by_text(prepared) == expected


def test_a_column_that_is_neither_0_nor_1_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,x,y\nfirst,0,1\nsecond,2,1\n")
    with pytest.raises(UserError, match="line 3, column 'x': 0 or 1 is needed, got '2'"):
        prepare(SourceOptions(str(tmp_path / "a.csv"), label_column=["x", "y"]))


@pytest.mark.parametrize("values", [[i / 7 for i in range(60)], [1000 + 13 * i for i in range(60)]])
def test_a_column_of_numbers_is_not_taken_for_classes(values: list[float], tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": value}) for text, value in zip(TEXTS, values, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a measure, not classes; set data\.task=regression"):
        prepare(SourceOptions(str(tmp_path / "a.jsonl")))
    prepared = prepare(SourceOptions(str(tmp_path / "a.jsonl"), task="regression"))
    found = {t: v for rows in prepared.splits.values() for t, v in zip(rows.texts, rows.labels.tolist(), strict=True)}
    assert found == dict(zip(TEXTS, values, strict=True)) and prepared.label_names == ["label"]
    # Every part holds small and large numbers.
    for rows in prepared.splits.values():
        assert rows.labels.min() < np.median(values) < rows.labels.max()


@pytest.mark.parametrize("seed", range(3))
def test_each_label_has_its_share_of_a_sample(seed: int) -> None:
    """Closer than by chance, also labels of one row in a hundred (Sechidis et al. 2011, table 3)."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((1000, 8)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01]).astype(np.uint8)
    taken = stratified_sample(labels, 100, seed, "test", leave=1)
    assert len(taken) == 100 == len(set(taken)) and (np.diff(taken) > 0).all()
    ideal = labels.sum(axis=0) / 10
    off = np.abs(labels[taken].sum(axis=0) - ideal)
    chance = [np.abs(labels[rng.permutation(1000)[:100]].sum(axis=0) - ideal).mean() for _ in range(50)]
    assert off.max() <= 2 and off.mean() < min(chance)
    assert (labels[np.setdiff1d(np.arange(1000), taken)].sum(axis=0) > 0).all()
    assert taken.tolist() == stratified_sample(labels, 100, seed, "test", leave=1).tolist()


def test_duplicates_of_test_texts_are_removed_from_train(tmp_path: Path) -> None:
    lines = [json.dumps({"text": t, "label": each}) for t, each in zip(TEXTS, SETS, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, *(line.replace("was", "WAS") for line in lines[:3])]))
    prepared = prepare(SourceOptions(str(tmp_path / "a.jsonl")))
    keys = [set(rows.keys) for rows in prepared.splits.values()]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]


def test_over_the_folds_each_row_is_tested_once_and_labels_are_shared_out(tmp_path: Path) -> None:
    options, tested = write(tmp_path, "parquet"), list[str]()
    for k in range(1, 5):
        prepared = prepare(SourceOptions(**options, fold=[k, 4]))
        splits = {split: set(each.texts) for split, each in prepared.splits.items()}
        assert set.union(*splits.values()) == set(TEXTS) and sum(map(len, splits.values())) == len(TEXTS)
        assert prepared.class_counts("test")[0] == 5  # a quarter of 20
        assert set(prepared.class_counts("test")[1:]) <= {7, 8}  # of 30
        tested += prepared.splits["test"].texts
    assert sorted(tested) == sorted(TEXTS)
    with pytest.raises(UserError, match="n goes from 2 to 30, k from 1 to n"):
        prepare(SourceOptions(**options, fold=[1, 31]))
