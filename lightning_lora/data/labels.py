"""From label cells to class numbers, without guessing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError

MAX_CLASSES = 1000


def encode_labels(
    splits: dict[str, list[Table]], column: str, names: Sequence[str] | None
) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Class names in the order of their numbers, and the class number of every row of every table.

    With ``names`` given, or declared by the source, cells are either all names or all numbers counted from
    0. Without, the names are the values of the train split: numbers in numeric order, words in alphabetic
    order.

    Raises:
        UserError: A label is outside the names, of mixed kinds, not categorical, or there is one class only.
    """
    declared = _declared_names(splits)
    if names and declared and sorted(names) == sorted(declared) and list(names) != declared:
        raise UserError(
            f"data.label_names: {_few(list(names))} has another order than the data itself declares, "
            f"{_few(declared)}; use that order, or other names"
        )
    names = names or declared
    if names is not None:
        if len(set(names)) != len(names) or len(names) < 2:
            raise UserError(f"data.label_names: at least two different names are needed, got {list(names)}")
        names, by_name = list(names), _holds_names(splits, column, names)
    else:
        names, by_name = _names_from_data(splits["train"], column), True
    numbers = {name: i for i, name in enumerate(names)} if by_name else {str(i): i for i in range(len(names))}
    encoded = {split: [_encode(table, column, numbers, names) for table in tables] for split, tables in splits.items()}
    present = np.unique(np.concatenate(encoded["train"]))
    if len(present) < 2:
        raise UserError(
            f"{splits['train'][0].origin}: every row of the train split has the label "
            f"'{names[present[0]]}'; a classifier needs at least two classes"
        )
    return names, encoded


def canonical(cell: Any) -> str:
    """The label cell as a word: numbers that are whole are written without a point, spaces are stripped."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def _is_whole(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


def _declared_names(splits: dict[str, list[Table]]) -> list[str] | None:
    """The class names that the source declares, which must be the same in all its files."""
    tables = [table for tables in splits.values() for table in tables if table.label_names]
    for table in tables[1:]:
        if table.label_names != tables[0].label_names:
            raise UserError(
                f"{table.origin}: declares the classes {table.label_names}, but {tables[0].origin} declares "
                f"{tables[0].label_names}; write both with the same names in the same order"
            )
    return tables[0].label_names if tables else None


def _holds_names(splits: dict[str, list[Table]], column: str, names: Sequence[str]) -> bool:
    """Whether the cells are names (else numbers); names that are themselves numbers count as names."""
    words = {canonical(cell) for tables in splits.values() for table in tables for cell in table.columns[column]}
    return not all(_is_whole(word) for word in words) or words <= set(names)


def _names_from_data(tables: list[Table], column: str) -> list[str]:
    first: dict[str, tuple[Table, int]] = {}
    for table in tables:
        for i, cell in enumerate(table.columns[column]):
            if isinstance(cell, float) and not cell.is_integer():
                raise UserError(f"{table.where(i, column)}: label {cell} is no class; use whole numbers or names")
            first.setdefault(canonical(cell), (table, i))
    if len(first) > MAX_CLASSES:
        raise UserError(
            f"{tables[0].origin}: column '{column}' holds {len(first)} different values (at most "
            f"{MAX_CLASSES} classes); is it the label? Set data.label_column"
        )
    whole = [word for word in first if _is_whole(word)]
    if whole and len(whole) < len(first):
        odd = next(word for word in first if _is_whole(word) != _is_whole(next(iter(first))))
        table, i = first[odd]
        raise UserError(f"{table.where(i, column)}: label '{odd}', but others are {_few(list(first))}; use one kind")
    folded: dict[str, str] = {}
    for word, (table, i) in first.items():
        if (other := folded.setdefault(word.casefold(), word)) != word:
            raise UserError(
                f"{table.where(i, column)}: label '{word}' differs from '{other}' only in case; write it one way"
            )
    return sorted(first, key=int) if whole else sorted(first)


def _encode(table: Table, column: str, numbers: dict[str, int], names: Sequence[str]) -> np.ndarray:
    encoded = np.empty(len(table), dtype=np.int64)
    for i, cell in enumerate(table.columns[column]):
        number = numbers.get(canonical(cell))
        if number is None:
            allowed = _few(list(names) if set(numbers) == set(names) else [f"0 to {len(names) - 1}"])
            raise UserError(
                f"{table.where(i, column)}: label '{canonical(cell)}' is not one of {allowed}; "
                "correct the row, or set data.label_names"
            )
        encoded[i] = number
    return encoded


def _few(words: list[str]) -> str:
    shown = ", ".join(words[:8])
    return shown if len(words) <= 8 else f"{shown}, ... ({len(words)} in all)"
