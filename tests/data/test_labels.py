import numpy as np
import pytest

from lightning_lora.data.labels import encode_labels
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError


def table(labels: list, declared: list[str] | None = None) -> dict[str, list[Table]]:
    return {"train": [Table("rows.csv", {"label": labels}, range(2, len(labels) + 2), "line", declared)]}


@pytest.mark.parametrize(
    ("cells", "names", "expected_names", "numbers"),
    [
        (["pos", "neg", "pos"], None, ["neg", "pos"], [1, 0, 1]),
        (["10", "9", "10"], None, ["9", "10"], [1, 0, 1]),  # numeric order, not "10" < "9"
        ([1.0, 0.0, 1.0], None, ["0", "1"], [1, 0, 1]),
        ([True, False, True], None, ["False", "True"], [1, 0, 1]),
        ([0, 2, 0], None, ["0", "2"], [0, 1, 0]),
        (["1", "0", "1"], ["neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        (["pos", "neg", " pos "], ["pos", "neg"], ["pos", "neg"], [0, 1, 0]),
        (["2", "1"], ["1", "2"], ["1", "2"], [1, 0]),  # names that are numbers are names
        ([0, 1, 1], ["Negative", "Positive"], ["Negative", "Positive"], [0, 1, 1]),
        (
            ["2", "1", "4", "3"],
            ["World", "Sports", "Business", "Tech"],
            ["World", "Sports", "Business", "Tech"],
            [1, 0, 3, 2],
        ),
        (["-1", "1"], ["bad", "good"], ["bad", "good"], [0, 1]),
        ([10.0, 2.0], ["two", "ten"], ["two", "ten"], [1, 0]),
        (["10.0", "2.0", "2"], None, ["2", "10"], [1, 0, 0]),
        (["true", "FALSE", True], None, ["False", "True"], [1, 0, 1]),
        ([True, False], ["no", "yes"], ["no", "yes"], [1, 0]),
        (
            ["caf\u00e9", "cafe\u0301", "h\u00f4tel\u00a0a", "h\u00f4tel a\u200b"],
            None,
            ["caf\u00e9", "h\u00f4tel a"],
            [0, 0, 1, 1],
        ),
        (["01", "02", "10"], None, ["01", "02", "10"], [0, 1, 2]),
        ([1, 2, 3], {1: "World", 3: "Tech", 2: "World"}, ["World", "Tech"], [0, 0, 1]),
        (["1.0", "2"], {2: "two", 1: "one"}, ["two", "one"], [1, 0]),
        (["no", "yes"], {"no": "bad", "yes": "good"}, ["bad", "good"], [0, 1]),
        ([0.5, 1.0, 0.5], [0.5, 1.0], ["0.5", "1"], [0, 1, 0]),
        ([0.5, 1.5, 2.0], {"0.5": "low", "1.5": "low", "2": "high"}, ["low", "high"], [0, 0, 1]),
    ],
)
def test_cells_become_class_numbers(cells: list, names: list | None, expected_names: list, numbers: list) -> None:
    found = encode_labels(table(cells), "label", names)
    assert found.names == expected_names
    np.testing.assert_array_equal(found.encoded["train"][0], numbers)


def test_names_that_the_source_declares_are_used() -> None:
    found = encode_labels(table([1, 0], ["no", "yes"]), "label", None)
    assert (found.names, found.encoded["train"][0].tolist()) == (["no", "yes"], [1, 0])


def test_declared_names_count_from_0_even_where_a_class_has_no_row() -> None:
    declared = ["a", "b", "c", "d"]
    assert encode_labels(table([0, 1, 3], declared), "label", None).encoded["train"][0].tolist() == [0, 1, 3]
    renamed = encode_labels(table([0, 3], declared), "label", ["w", "x", "y", "z"])
    assert renamed.values == {"w": ["0"], "x": [], "y": [], "z": ["3"]}
    by_name = encode_labels(table([0, 3], declared), "label", {"d": "last", "a": "first"})
    assert (by_name.names, by_name.encoded["train"][0].tolist()) == (["last", "first"], [1, 0])
    assert encode_labels(table(["1", "0"]), "label", None, known=("neg", "pos")).names == ["neg", "pos"]


@pytest.mark.parametrize(
    ("cells", "names", "said"),
    [
        (["a", "b", "c"], ["a", "b"], "line 4, column 'label': label 'c' is not one of a, b"),
        ([1, 2, 3, 4], ["a", "b", "c", "d", "e"], r"5 names \(a, b, c, d, e\) for 4 classes \(1, 2, 3, 4\); say which"),
        ([0, 1, 3], ["a", "b", "c", "d"], r"4 names \(a, b, c, d\) for 3 classes \(0, 1, 3\); say which"),
        ([0, 1, 2], ["1", "2", "3"], r"3 names \(1, 2, 3\) for 3 classes \(0, 1, 2\); say which"),
        ([0, 1, 2], {0: "a", 1: "b"}, "line 4, column 'label': label '2' is not one of 0, 1"),
        ([0, 1], [False, True], "YAML reads yes, no, on and off"),
        (["no", "yes"], {False: "a", True: "b"}, "put each in quotes"),
        ([0, 1], {0: False, 1: True}, "put each in quotes"),
        ([0, 1], ["a", None], "a name is a word or a number, got None"),
        ([0, 1], {1: "a", "1.0": "b"}, "'1' is duplicated"),
        ([0, 1], {0: "a", 1: "a"}, "at least two different names"),
        (["1", "01"], None, "'01' differs from '1' only in characters that look alike"),
        (["m2", "m\u00b2"], None, "only in characters that look alike"),
        ([f"{i}.5" for i in range(100)] * 9, None, r"rows.csv: column 'label' holds 100 different numbers \(0.5, 1.5"),
        ([f"{i},5 %" for i in range(3)] * 9, None, "a measure, not classes"),
        (["1e-05", "2"], None, "a measure, not classes"),
        ([7 * i for i in range(50)] * 4, None, "a measure, not classes"),
        ([f"id-{i}" for i in range(50)], None, "50 different values in 50 rows"),
        (["0", "pos"], None, "label 'pos', but others are"),
        (["pos", "Pos"], None, "differs from 'pos' only in case"),
        (
            [0.5, 1.0],
            None,
            r"2 different numbers \(0.5, 1\): a measure, not classes; .*label_names='{0.5: NAME, 1: NAME",
        ),
        (["a", "a"], None, "every row of the train split has the label 'a'"),
        ([str(i) for i in range(2000)], None, "2,000 different values"),
        (["a", "b"], ["a", "a"], "at least two different names"),
    ],
)
def test_doubtful_labels_are_refused(cells: list, names: list | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encode_labels(table(cells), "label", names)


def test_thousands_of_classes_are_classes() -> None:
    assert len(encode_labels(table([f"c{i}" for i in range(3000)] * 2), "label", None).names) == 3000


def test_many_whole_numbers_are_pointed_out_and_names_silence_it() -> None:
    cells = list(range(101)) * 20
    (warning,) = encode_labels(table(cells), "label", None).warnings
    assert "column 'label' holds 101 different numbers" in warning and "if it is a measure" in warning
    assert encode_labels(table(cells), "label", [str(i) for i in range(101)]).warnings == []


def test_what_was_merged_or_matched_to_odd_numbers_is_said() -> None:
    (merged,) = encode_labels(table(["caf\u00e9", "cafe\u0301", "b"]), "label", None).warnings
    assert r"'cafe\u0301' and 'caf\xe9' as 'café'" in merged
    (matched,) = encode_labels(table([0, 7]), "label", ["a", "b"]).warnings
    assert "0 = a, 7 = b" in matched


@pytest.mark.parametrize(
    "cells", [[0.5, 1.5] * 9, [7 * i for i in range(50)], [f"id-{i}" for i in range(50)], ["Pos", "pos", "neg"]]
)
def test_a_refused_label_is_taken_once_the_user_says_what_it_means(cells: list) -> None:
    with pytest.raises(UserError, match=r"data\.label_names='\{"):
        encode_labels(table(cells), "label", None)
    stated = {cell: f"class {i % 2}" for i, cell in enumerate(dict.fromkeys(cells))}
    assert encode_labels(table(cells), "label", stated).names == ["class 0", "class 1"]


def test_the_same_names_in_another_order_than_declared_are_refused() -> None:
    with pytest.raises(UserError, match="another order"):
        encode_labels(table([0, 1], ["neg", "pos"]), "label", ["pos", "neg"])


def test_files_that_declare_other_names_are_refused() -> None:
    tables = table([0, 1], ["neg", "pos"]) | {"test": table([0, 1], ["pos", "neg"])["train"]}
    with pytest.raises(UserError, match="declares the classes"):
        encode_labels(tables, "label", None)


def test_a_test_label_that_train_never_has_is_refused() -> None:
    tables = table(["a", "b"]) | {"test": [Table("test.csv", {"label": ["z"]}, [2], "line")]}
    with pytest.raises(UserError, match=r"test.csv, line 2, column 'label': label 'z' is not one of a, b"):
        encode_labels(tables, "label", None)
