import numpy as np
import pytest

from lightning_lora.data.labels import LabelCells, encode_labels
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError


def table(labels: list, declared: list[str] | None = None) -> Table:
    names = {"label": declared} if declared else {}
    return Table("rows.csv", {"label": labels}, range(2, len(labels) + 2), "line", names)


def label_cells(labels: list, declared: list[str] | None = None, **splits: list[Table]) -> LabelCells:
    return LabelCells.of({"train": [table(labels, declared)], **splits}, "label", len(labels))


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
            ["caf\u00e9", "cafe\u0301", "h\u00f4tel\u00a0a", "h\u00f4tel  a"],
            None,
            ["caf\u00e9", "h\u00f4tel a"],
            [0, 0, 1, 1],
        ),
        (["01", "02", "10"], None, ["01", "02", "10"], [0, 1, 2]),
        ([1, 2, 3], {1: "World", 3: "Tech", 2: "World"}, ["World", "Tech"], [0, 0, 1]),
        (["1.0", "2"], {2: "two", 1: "one"}, ["two", "one"], [1, 0]),
        (["no", "yes"], {"no": "bad", "yes": "good"}, ["bad", "good"], [0, 1]),
        ([0.5, 1.0, 0.5], [0.5, 1.0], ["0.5", "1"], [0, 1, 0]),
        (["+1", "-1", "+1"], None, ["-1", "1"], [1, 0, 1]),
        (["+1", "-1", "1"], ["neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        (["+1", "-1"], {+1: "pos", -1: "neg"}, ["pos", "neg"], [0, 1]),
        (
            ["5 \u03bcm", "5 mm", "\u03b2-2", "\u043a\u043e\u0442"],
            None,
            ["5 mm", "5 \u03bcm", "\u03b2-2", "\u043a\u043e\u0442"],
            [1, 0, 2, 3],
        ),
        (["1.1", "1.10", "1.2"], ["1.1", "1.10", "1.2"], ["1.1", "1.10", "1.2"], [0, 1, 2]),
        (["0.50", "1"], {"0.50": "low", 1: "high"}, ["low", "high"], [0, 1]),
        ([0.5, 1.5, 2.0], {"0.5": "low", "1.5": "low", "2": "high"}, ["low", "high"], [0, 0, 1]),
    ],
)
def test_cells_become_class_numbers(cells: list, names: list | None, expected_names: list, numbers: list) -> None:
    found = encode_labels(label_cells(cells), names)
    assert found.names == expected_names
    np.testing.assert_array_equal(found.codes, numbers)


def test_names_that_the_source_declares_are_used() -> None:
    found = encode_labels(label_cells([1, 0], ["no", "yes"]), None)
    assert (found.names, found.codes.tolist()) == (["no", "yes"], [1, 0])


def test_declared_names_count_from_0_even_where_a_class_has_no_row() -> None:
    declared = ["a", "b", "c", "d"]
    assert encode_labels(label_cells([0, 1, 3], declared), None).codes.tolist() == [0, 1, 3]
    renamed = encode_labels(label_cells([0, 3], declared), ["w", "x", "y", "z"])
    assert renamed.values == {"w": ["0"], "x": [], "y": [], "z": ["3"]}
    by_name = encode_labels(label_cells([0, 3], declared), {"d": "last", "a": "first"})
    assert (by_name.names, by_name.codes.tolist()) == (["last", "first"], [1, 0])
    assert encode_labels(label_cells(["1", "0"]), None, known=("neg", "pos")).names == ["neg", "pos"]


@pytest.mark.parametrize(
    ("cells", "names", "said"),
    [
        (["a", "b", "c"], ["a", "b"], "line 4, column 'label': label 'c' is not one of a, b"),
        (
            [1, 2, 3, 4],
            ["a", "b", "c", "d", "e"],
            r"5 names \(a, b, c, d, e\) for 4 classes \(1, 2, 3, 4\); name every label",
        ),
        ([0, 1, 3], ["a", "b", "c", "d"], r"4 names \(a, b, c, d\) for 3 classes \(0, 1, 3\); name every label"),
        ([0, 1, 2], ["1", "2", "3"], r"3 names \(1, 2, 3\) for 3 classes \(0, 1, 2\); name every label"),
        ([0, 1, 2], {0: "a", 1: "b"}, "line 4, column 'label': label '2' is not one of 0, 1"),
        ([0, 1], [False, True], "YAML reads yes, no, on, off, null"),
        (["no", "yes"], {False: "a", True: "b"}, "put each in quotes"),
        ([0, 1], {0: False, 1: True}, "put each in quotes"),
        ([0, 1], ["a", None], "a name is a word or a number, got None"),
        ([0, 1], {1: "a", "1.0": "b"}, "one for each label"),
        ([0, 1], {0: "a", 1: "a"}, "at least two different names"),
        ([0, 1], [0, None], "got None; YAML reads .* put each in quotes"),
        (
            ["001", "010"],
            {1: "a", 8: "b"},
            r"'001' is not one of 1, 8; without a name: 001, 010; correct the row, or name every label",
        ),
        (
            ["001", "010"],
            [1, 8],
            r"2 names \(1, 8\) for 2 classes \(001, 010\); name every label.* put each in quotes",
        ),
        (["1:30", "2"], {90: "a", 2: "b"}, r"'1:30' is not one of 90, 2; correct the row, or name every label"),
        (["1.1", "1.10", "1.2"], [1.1, 1.1, 1.2], r"two different names.*; YAML reads .*1\.10"),
        (["1.1", "1.10", "1.2"], {1.1: "a", 1.2: "b"}, r"'1.10' is not one of 1.1, 1.2; correct the row"),
        (["1.1", "1.10", "1.2"], None, "3 different numbers"),
        (
            ["a", "b", "c", "d"],
            ["a", "b"],
            "without a name: c, d; correct the row, or name every label",
        ),
        ([True, False], ["True", "x"], "name every label"),
        ([".05", ".1"] * 9, None, "a measure, not classes"),
        (["+0.6", "-0.6"] * 9, None, "a measure, not classes"),
        (["-.5", "1"] * 9, None, "a measure, not classes"),
        (["1", "01"], None, "'01' differs from '1' only in case or in how it is written"),
        (["m2", "m\u00b2"], None, "only in case or in how it is written"),
        ([f"{i}.5" for i in range(100)] * 9, None, r"rows.csv: column 'label' holds 100 different numbers \(0.5, 1.5"),
        (list(range(150)) * 12, None, "150 different numbers .* data.task=single_label"),
        ([f"{i},5" for i in range(30)] * 12, None, "numbers with commas .* data.task=single_label"),
        (["1e-05", "2"], None, "a measure, not classes"),
        ([7 * i for i in range(50)] * 4, None, "a measure, not classes"),
        ([f"id-{i}" for i in range(50)], None, "50 different values in 50 rows"),
        (["0", "pos"], None, "label 'pos' is a word, but others are 0; correct it"),
        (["pos", "Pos"], None, "differs from 'pos' only in case"),
        (["pos", "pos\u200b"], None, r"label 'pos\\u200b' differs from 'pos' only in case"),
        (["1_2", "34"], None, "label .34. is a number, but others are 1_2"),
        (
            [0.5, 1.0],
            None,
            r"2 different numbers \(0.5, 1\): a measure, not classes; .*data.label_names='{",
        ),
        (["a", "a"], None, "every row of the train split has the label 'a'"),
        ([str(i) for i in range(2000)], None, "2,000 different numbers"),
        (["a", "b"], ["a", "a"], "at least two different names"),
    ],
)
def test_doubtful_labels_are_refused(cells: list, names: list | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encode_labels(label_cells(cells), names)


def test_thousands_of_classes_are_classes() -> None:
    numbers = encode_labels(label_cells(list(range(150)) * 12), None, typed=True)
    assert len(numbers.names) == 150 and not numbers.warnings
    assert len(encode_labels(label_cells([f"c{i}" for i in range(3000)] * 2), None).names) == 3000


def test_many_whole_numbers_are_pointed_out_and_names_silence_it() -> None:
    cells = list(range(1, 101)) * 20  # percent?
    (warning,) = encode_labels(label_cells(cells), None).warnings
    assert "column 'label' holds 100 different numbers" in warning and "if it is a measure" in warning
    assert encode_labels(label_cells(cells), [str(i) for i in range(1, 101)]).warnings == []


@pytest.mark.parametrize("first", [0, 1])
def test_ids_without_a_gap_are_classes_without_a_warning(first: int) -> None:
    assert encode_labels(label_cells([first + i % 77 for i in range(3000)]), None).warnings == []
    assert encode_labels(label_cells([10 + first + i % 77 for i in range(3000)]), None).warnings


@pytest.mark.parametrize(
    "declared", [["1", "2", "3"], ["-1", "0", "1"], ["1", "0"], ["no", "yes"], ["1.1", "1.10"], ["False", "True"]]
)
@pytest.mark.parametrize("skip", [0, 1])
def test_a_number_is_the_name_that_class_label_says(declared: list[str], skip: int) -> None:
    import datasets

    feature = datasets.ClassLabel(names=declared)
    cells = list(range(skip if len(declared) > 2 else 0, len(declared)))[::-1]
    truth = [feature.int2str(cell) for cell in cells]
    renamed = {name: f"class {name}" for name in declared}
    for names in (None, declared):
        found = encode_labels(label_cells(cells, declared), names)
        assert [found.names[number] for number in found.codes] == truth
    for mapping in (renamed, {i: renamed[name] for i, name in enumerate(declared)} if declared[0] == "no" else renamed):
        found = encode_labels(label_cells(cells, declared), mapping)
        assert [found.names[number] for number in found.codes] == [renamed[name] for name in truth]
    by_place = encode_labels(label_cells(cells, declared), [f"class {name}" for name in declared])
    assert [by_place.names[number] for number in by_place.codes] == [renamed[name] for name in truth]
    texts = encode_labels(label_cells(truth, declared), None)
    assert [texts.names[number] for number in texts.codes] == truth


def test_numbers_for_declared_names_that_are_numbers() -> None:
    stars = ["1", "2", "3", "4", "5"]
    mapping = {1: "awful", 2: "bad", 3: "fair", 4: "good", 5: "great"}
    for cells in ([0, 1, 2, 3, 4], [4, 1, 2, 3]):
        assert encode_labels(label_cells(cells, stars), [1, 2, 3, 4, 5]).codes.tolist() == cells
        found = encode_labels(label_cells(cells, stars), mapping)
        assert found.codes.tolist() == cells and found.names == [*mapping.values()]
    with pytest.raises(UserError, match="name every label"):
        encode_labels(label_cells([0, 1], ["1", "2"]), [0, 1])
    with pytest.raises(UserError, match="label '2' is not one of 1, 6"):
        encode_labels(label_cells([0, 1], ["1", "2"]), {1: "a", 6: "b"})


@pytest.mark.parametrize(
    "cells", [[0.5, 1.5] * 9, [7 * i for i in range(50)], [f"id-{i}" for i in range(50)], ["Pos", "pos", "neg"]]
)
def test_a_refused_label_is_taken_once_the_user_says_what_it_means(cells: list) -> None:
    with pytest.raises(UserError, match=r"data\.label_names='\{"):
        encode_labels(label_cells(cells), None)
    stated = {cell: f"class {i % 2}" for i, cell in enumerate(dict.fromkeys(cells))}
    assert encode_labels(label_cells(cells), stated).names == ["class 0", "class 1"]


def test_the_same_names_in_another_order_than_declared_are_refused() -> None:
    with pytest.raises(UserError, match="another order"):
        encode_labels(label_cells([0, 1], ["neg", "pos"]), ["pos", "neg"])


def test_files_that_declare_other_names_are_refused() -> None:
    with pytest.raises(UserError, match="declares the classes"):
        label_cells([0, 1], ["neg", "pos"], test=[table([0, 1], ["pos", "neg"])])


def test_a_test_label_that_train_never_has_is_refused() -> None:
    cells = label_cells(["a", "b"], test=[Table("test.csv", {"label": ["z"]}, [2], "line")])
    with pytest.raises(UserError, match=r"test.csv, line 2, column 'label': label 'z' is not one of a, b"):
        encode_labels(cells, None)


def test_labels_that_are_made_of_others_are_told_of() -> None:
    (warning,) = encode_labels(label_cells(["a", "b", "a;b", "b;a"] * 9), None).warnings
    assert "(a;b, b;a)" in warning and "set data.label_separator ';'" in warning
    assert encode_labels(label_cells(["a", "b", "c;d", "read, write"] * 9), None).warnings == []
