"""From label cells to class numbers, without guessing."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError

#: So few different values are never taken for a measure, an identifier or a text.
FEW_VALUES = 10
#: More whole numbers than these are pointed out, as they could measure something.
MANY_NUMBERS = 20
#: A number as Python and pandas write it; "007" is a code and "1,5" may be anything, so both stay words.
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:e[+-]\d\d+)?", re.ASCII)
_QUANTITY = re.compile(r"-?\d+(?:[.,]\d+)?(?:e[+-]?\d+)?\s?%?", re.ASCII | re.IGNORECASE)
#: Shown as nothing: zero-width space, byte order mark, soft hyphen, word joiner, marks of direction.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_WIDE_SPACE = re.compile(r"(?![\x00-\x7f])\s")
_QUOTE = "YAML reads yes, no, on and off without quotes as true and false: put each in quotes"


@dataclass(frozen=True)
class Labels:
    """The classes, and the class of every row.

    Args:
        names: The classes in the order of their numbers.
        encoded: By split, the class numbers of each table's rows.
        values: What the data says for each class, by its name.
        warnings: What a reader should know of how they were found.
    """

    names: list[str]
    encoded: dict[str, list[np.ndarray]]
    values: dict[str, list[str]]
    warnings: list[str]


def canonical(cell: Any) -> str:
    """The label cell as a word, the same from every file format.

    Numbers are written as Python does, whole ones without a point ("1.0" is "1"); accents are composed (NFC), a
    no-break or other special space is a space, and characters that show as nothing are left out.
    """
    if not isinstance(cell, str):
        cell = str(cell)
    word = cell.strip()
    if not word.isascii():
        word = _WIDE_SPACE.sub(" ", _INVISIBLE.sub("", unicodedata.normalize("NFC", word))).strip()
    if ("." in word or "e" in word or word == "-0") and _NUMBER.fullmatch(word):
        number = float(word)
        return str(int(number)) if number.is_integer() else repr(number)
    return word


def encode_labels(
    splits: dict[str, list[Table]],
    column: str,
    names: Sequence[Any] | Mapping[Any, Any] | None,
    known: Sequence[str] | None = None,
    train_rows: int | None = None,
) -> Labels:
    """The classes, and the class number of every row of every table.

    Args:
        splits: The tables by split.
        column: The column with the label.
        names: The user's: a mapping from label to class name (several labels may mean one class); or a list, of the
            labels themselves or, where these are numbers, of names for the sorted numbers.
        known: Names of the classes 0, 1, ... of a known data set; else those that the tables declare are used.
        train_rows: How many the train split has, where its tables hold each label cell once.

    Without names the classes are the values of the train split: numbers in numeric order, words in alphabetic order.

    Raises:
        UserError: A label has no name, is of mixed kinds, measures or identifies something, or there is one class.
    """
    found = _Found(splits, column, train_rows)
    declared = list(known) if known else _declared_names(splits)
    warnings = found.merged()
    if isinstance(names, Mapping):
        classes, by_word = _mapped(names, found, declared)
    elif names is not None:
        classes, by_word = _listed(names, found, declared, warnings)
    elif declared:
        classes, by_word = declared, _by_position(found, declared)
    else:
        found.check_categorical(warnings)
        classes = [found.shown[word] for word in found.ordered(found.train)]
        by_word = found.shown
    numbers = {name: number for number, name in enumerate(classes)}
    for word, (table, i) in found.first.items():
        if by_word.get(word) not in numbers:
            hint = f" ({_QUOTE})" if {"True", "False"} & {*by_word, *classes} else ""
            allowed = [*map(canonical, names)] if isinstance(names, Mapping) else classes
            raise UserError(
                f"{table.where(i, column)}: label '{word}' is not one of {few(allowed)}{hint}; "
                "correct the row, or set data.label_names"
            )
    codes = {word: numbers[by_word[word]] for word in found.first}
    encoded = {
        split: [np.array([codes[found.words[cell_key(cell)]] for cell in t.columns[column]], np.int64) for t in tables]
        for split, tables in splits.items()
    }
    present = np.unique(np.concatenate(encoded["train"]))
    if len(present) < 2:
        raise UserError(
            f"{splits['train'][0].origin}: every row of the train split has the label "
            f"'{classes[present[0]]}'; a classifier needs at least two classes"
        )
    values: dict[str, list[str]] = {name: [] for name in classes}
    for word in found.ordered(found.first):
        values[by_word[word]].append(word)
    return Labels(classes, encoded, values, warnings)


class _Found:
    """The different labels of a column: where each is first, and how it is written."""

    def __init__(self, splits: dict[str, list[Table]], column: str, train_rows: int | None) -> None:
        self.column = column
        self.rows = sum(map(len, splits["train"])) if train_rows is None else train_rows
        self.words: dict[Any, str] = {}
        self.first: dict[str, tuple[Table, int]] = {}
        self.train: dict[str, None] = {}
        for split, tables in splits.items():
            for table in tables:
                for i, cell in enumerate(table.columns[column]):
                    if (key := cell_key(cell)) not in self.words:
                        self.words[key] = canonical(cell)
                        self.first.setdefault(self.words[key], (table, i))
            if split == "train":
                cells = (cell for table in tables for cell in table.columns[column])
                self.train = dict.fromkeys(self.words[cell_key(cell)] for cell in cells)
        self.boolean = {word.casefold() for word in self.first} <= {"true", "false"}
        #: Each word as the class that it is: of booleans there is one spelling in every format.
        self.shown = {word: word.capitalize() if self.boolean else word for word in self.first}
        self.quantities = all(_QUANTITY.fullmatch(word) for word in self.first)

    def ordered(self, words: Any) -> list[str]:
        """The words, one for each class: numbers in numeric order, others in alphabetic order."""
        one_each = {self.shown[word]: word for word in words}.values()
        return sorted(
            one_each, key=lambda word: (_quantity(word), word) if self.quantities else (0.0, self.shown[word])
        )

    def named(self, by_word: Mapping[str, str]) -> dict[str, str]:
        """The name of each word that has one, under its own or its class's spelling."""
        names = {word: by_word.get(word) or by_word.get(self.shown[word]) for word in self.first}
        return {word: name for word, name in names.items() if name}

    def merged(self) -> list[str]:
        """A warning if labels that are written in several ways were taken for one."""
        spellings: dict[str, set[str]] = {}
        for (_, cell), word in self.words.items():
            spellings.setdefault(self.shown[word], set()).add(str(cell).strip(" \t\r\n"))
        several = [(word, sorted(found)) for word, found in spellings.items() if len(found) > 1]
        if not several:
            return []
        ways = few([f"{' and '.join(map(ascii, found))} as '{word}'" for word, found in several])
        return [f"column '{self.column}': labels that differ only in how they are written are one class: {ways}"]

    def check_categorical(self, warnings: list[str]) -> None:
        """Refuses labels that are no classes unless somebody says so, and those that look like one another.

        Raises:
            UserError: As said; the remedy works for every one of them.
        """
        words, where = self.ordered(self.train), next(iter(self.first.values()))[0].origin
        many = f"column '{self.column}' holds {len(words):,} different"
        remedy = (
            "; set data.label_column, turn the values into classes, or say what they mean with "
            f"data.label_names='{{{words[0]}: NAME, {words[-1]}: NAME, ...}}' "
            "(every value; several may have the same name)"
        )
        if self.quantities:
            whole = all(_quantity(word).is_integer() for word in words)
            span = _quantity(words[-1]) - _quantity(words[0]) + 1
            sparse = span > len(words) and len(words) > FEW_VALUES and self.rows < 10 * len(words)
            if not whole or sparse:
                raise UserError(f"{where}: {many} numbers ({few(words)}): a measure, not classes{remedy}")
        if len(words) > FEW_VALUES and 2 * len(words) > self.rows:
            raise UserError(f"{where}: {many} values in {self.rows:,} rows ({few(words)}): no classes{remedy}")
        if self.quantities and len(words) > MANY_NUMBERS:
            warnings.append(f"{many} numbers ({few(words)}), and each is a class; if it is a measure{remedy[1:]}")
        counted = [word for word in self.first if _NUMBER.fullmatch(word)]
        if counted and not self.quantities:
            odd = next(w for w in self.first if (w in counted) != (next(iter(self.first)) in counted))
            raise UserError(f"{_place(self, odd)}: label '{odd}', but others are {few(list(self.first))}; use one kind")
        alike: dict[str, str] = {}
        for word in self.first:
            other = alike.setdefault(_looks(self.shown[word]), word)
            if self.shown[other] != self.shown[word]:
                how = "only in case" if other.casefold() == word.casefold() else "only in characters that look alike"
                raise UserError(
                    f"{_place(self, word)}: label '{word}' differs from '{other}' {how}; write it one way, or "
                    f"say that they are one class: data.label_names='{{{other}: NAME, {word}: NAME, ...}}'"
                )


def _mapped(names: Mapping[Any, Any], found: _Found, declared: list[str] | None) -> tuple[list[str], dict[str, str]]:
    _check_words([*names], found.boolean)
    _check_words([*names.values()], booleans=False)
    by_word: dict[str, str] = {}
    for label, name in names.items():
        if (word := canonical(label)) in by_word:
            raise UserError(f"data.label_names: '{word}' is duplicated; name each label once")
        by_word[word] = str(name)
    classes = list(dict.fromkeys(by_word.values()))
    if len(classes) < 2:
        raise UserError(f"data.label_names: at least two different names are needed, got {classes}")
    if declared and not by_word.keys() & found.first.keys():  # the names that the source declares stand for its numbers
        words = map(canonical, declared)
        by_word = {str(i): by_word[word] for i, word in enumerate(words) if word in by_word}
    return classes, by_word | found.named(by_word)


def _listed(
    given: Sequence[Any], found: _Found, declared: list[str] | None, warnings: list[str]
) -> tuple[list[str], dict[str, str]]:
    _check_words(given, found.boolean)
    names = [canonical(name) if not isinstance(name, str) else name for name in given]
    by_word = {canonical(name): name for name in names}
    if len(by_word) != len(names) or len(names) < 2:
        raise UserError(f"data.label_names: at least two different names are needed, got {names}")
    if declared and sorted(names) == sorted(declared) and names != declared:
        raise UserError(
            f"data.label_names: {few(names)} has another order than the data itself declares, "
            f"{few(declared)}; use that order, or other names"
        )
    spelled = found.named(by_word)
    if not (found.boolean or found.quantities) or len(spelled) == len(found.first):
        return names, spelled
    values = declared or [found.shown[word] for word in found.ordered(found.first)]
    if len(values) != len(names) or spelled:
        words = found.ordered(found.first)
        pairs = ", ".join(f"{word}: NAME" for word in words[:2])
        raise UserError(
            f"data.label_names: {len(names)} names ({few(names)}) for {len(values)} classes ({few(values)}); "
            f"say which is which: data.label_names='{{{pairs}, ...}}'"
        )
    if declared:
        return names, {word: names[int(word)] for word in _by_position(found, declared)}
    numbers = [_quantity(value) for value in values if found.quantities]
    if numbers and numbers not in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]):
        matched = few([f"{value} = {name}" for value, name in zip(values, names, strict=True)])
        warnings.append(f"data.label_names: matched to the sorted labels, {matched}")
    by_shown = dict(zip(values, names, strict=True))
    return names, {word: by_shown[found.shown[word]] for word in found.first}


def _by_position(found: _Found, declared: list[str]) -> dict[str, str]:
    """What numbers of classes mean; or the names themselves, where the cells hold these."""
    by_name = {canonical(name): name for name in declared}
    if found.first.keys() <= by_name.keys():
        return by_name
    for word, (table, i) in found.first.items():
        if found.quantities and not (word.isdecimal() and int(word) < len(declared)):
            raise UserError(
                f"{table.where(i, found.column)}: label '{word}' is not one of 0 to {len(declared) - 1}, the classes "
                f"{few(declared)}; correct the row, or set data.label_names"
            )
    return {str(i): name for i, name in enumerate(declared)} if found.quantities else by_name


def _check_words(words: Sequence[Any], booleans: bool) -> None:
    """Refuses what cannot be a label or a name, or is a word that YAML reads as something else.

    Raises:
        UserError: As said.
    """
    for word in words:
        if isinstance(word, bool) and not booleans:
            raise UserError(f"data.label_names: {word} is neither a name nor a label of the data; {_QUOTE}")
        if not isinstance(word, str | int | float) or not canonical(word):
            raise UserError(f"data.label_names: a name is a word or a number, got {word!r:.40}; put it in quotes")


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


def cell_key(cell: Any) -> tuple[type, Any]:
    """What two cells share only if they are the same: True, 1 and 1.0 are equal, and not the same."""
    return type(cell), cell


def _quantity(word: str) -> float:
    return float(word.rstrip("% ").replace(",", "."))


def _looks(word: str) -> str:
    """The same for words that a reader may take for one another."""
    if re.fullmatch(r"-?\d+", word, re.ASCII):
        return str(int(word))
    plain = unicodedata.normalize("NFKC", word).casefold()
    return " ".join("".join(c for c in plain if unicodedata.category(c) != "Cf").split())


def _place(found: _Found, word: str) -> str:
    table, i = found.first[word]
    return table.where(i, found.column)


def few(words: Sequence[str], most: int = 8) -> str:
    """The first words, and how many there are if these are not all."""
    shown = ", ".join(words[:most])
    return shown if len(words) <= most else f"{shown}, ... ({len(words)} in all)"
