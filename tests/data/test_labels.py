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
    ],
)
def test_cells_become_class_numbers(cells: list, names: list | None, expected_names: list, numbers: list) -> None:
    found, encoded = encode_labels(table(cells), "label", names)
    assert found == expected_names
    np.testing.assert_array_equal(encoded["train"][0], numbers)


def test_names_that_the_source_declares_are_used() -> None:
    names, encoded = encode_labels(table([1, 0], ["no", "yes"]), "label", None)
    assert (names, encoded["train"][0].tolist()) == (["no", "yes"], [1, 0])


@pytest.mark.parametrize(
    ("cells", "names", "said"),
    [
        (["a", "b", "c"], ["a", "b"], "line 4, column 'label': label 'c' is not one of a, b"),
        ([0, 7], ["a", "b"], "line 3, column 'label': label '7' is not one of 0 to 1"),
        ([0, -100], ["a", "b"], "label '-100' is not one of 0 to 1"),
        (["0", "pos"], None, "label 'pos', but others are"),
        (["pos", "Pos"], None, "differs from 'pos' only in case"),
        ([0.5, 1.0], None, "label 0.5 is no class"),
        (["a", "a"], None, "every row of the train split has the label 'a'"),
        ([str(i) for i in range(2000)], None, "2000 different values"),
        (["a", "b"], ["a", "a"], "at least two different names"),
    ],
)
def test_doubtful_labels_are_refused(cells: list, names: list | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encode_labels(table(cells), "label", names)


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
