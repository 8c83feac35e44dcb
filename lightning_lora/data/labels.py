"""From label cells to class numbers, without guessing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lora.data.reading import Table
from lightning_lora.data.words import (
    ALIKE,
    canonical,
    escaped,
    few,
    is_number,
    is_quantity,
    looks,
    quantity,
    setting,
    yaml_key,
)
from lightning_lora.errors import UserError

#: So few different values are never taken for a measure, an identifier or a text.
FEW_VALUES = 10
#: More whole numbers than these are pointed out, as they could measure something.
MANY_NUMBERS = 20
_QUOTE = "YAML reads yes, no, on, off, null, 007, 1:30 and 1.10 without quotes as something else: put each in quotes"


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
    found = _Found(splits, column, list(known or _declared_names(splits)), train_rows)
    warnings = found.merged()
    if isinstance(names, Mapping):
        classes, by_word = _mapped(names, found, warnings)
    elif names is not None:
        classes, by_word = _listed(names, found, warnings)
    elif found.declared:
        classes, by_word = found.declared, found.named({name: name for name in found.declared})
    else:
        found.check_categorical(warnings)
        classes = [found.shown[word] for word in found.ordered(found.train)]
        by_word = found.shown
    numbers = {name: number for number, name in enumerate(classes)}
    if missing := [word for word in found.first if by_word.get(word) not in numbers]:
        raise UserError(_unnamed(missing, by_word, classes, names, found))
    codes = {word: numbers[by_word[word]] for word in found.first}
    encoded = {
        split: [np.array([codes[found.words[cell_key(cell)]] for cell in t.columns[column]], np.int64) for t in tables]
        for split, tables in splits.items()
    }
    present = np.unique(np.concatenate(encoded["train"]))
    if len(present) < 2:
        raise UserError(
            f"{splits['train'][0].origin}: every row of the train split has the label "
            f"'{few([classes[present[0]]])}'; a classifier needs at least two classes"
        )
    values: dict[str, list[str]] = {name: [] for name in classes}
    for word in found.ordered(found.first):
        values[by_word[word]] += found.cells[word]
    return Labels(classes, encoded, values, warnings)


class _Found:
    """The different labels of a column: where each is first, and how it is written.

    Where the source declares names, each label is one of these: a number is its position, as in
    ``datasets.ClassLabel``. Text is a name; only if some text is none and all are numbers, it is a position too.
    """

    def __init__(
        self, splits: dict[str, list[Table]], column: str, declared: list[str], train_rows: int | None
    ) -> None:
        self.column, self.declared = column, declared
        self.rows = sum(map(len, splits["train"])) if train_rows is None else train_rows
        places: dict[Any, tuple[Table, int]] = {}
        for tables in splits.values():
            for table in tables:
                for i, cell in enumerate(table.columns[column]):
                    places.setdefault(cell_key(cell), (table, i))
        self.words = self._words(places)
        self.first: dict[str, tuple[Table, int]] = {}
        #: How the data writes each word.
        self.cells: dict[str, list[str]] = {}
        for key, word in self.words.items():
            self.first.setdefault(word, places[key])
            cell = canonical(key[1]) if declared else word
            self.cells[word] = [*dict.fromkeys([*self.cells.get(word, []), cell])]
        cells = (cell for table in splits["train"] for cell in table.columns[column])
        self.train = dict.fromkeys(self.words[cell_key(cell)] for cell in cells)
        self.boolean = {word.casefold() for word in self.first} <= {"true", "false"}
        #: Each word as the class that it is: of booleans there is one spelling in every format.
        self.shown = {word: word.capitalize() if self.boolean else word for word in self.first}
        self.quantities = all(is_quantity(word) for word in self.first)

    def _words(self, places: Mapping[Any, tuple[Table, int]]) -> dict[Any, str]:
        words = {key: canonical(key[1]) for key in places}
        texts = {key: word for key, word in words.items() if isinstance(key[1], str)}
        fractions = [(word, key[1].strip()) for key, word in texts.items() if "." in word and is_number(word)]
        written = Counter(word for word, _ in dict.fromkeys(fractions))
        self.exact = {*self.declared, *(text for word, text in fractions if written[word] > 1)}  # "1.1" and "1.10"
        alike = Counter(map(canonical, self.declared))
        self.by_word = {word: name for name in self.declared if alike[word := canonical(name)] == 1}
        words |= {key: self.word(key[1]) for key in texts}
        self.counted = {key for key in words if isinstance(key[1], int | float) and not isinstance(key[1], bool)}
        if not {words[key] for key in texts} <= {*self.declared} and all(map(is_quantity, texts.values())):
            self.counted |= texts.keys()
        for key in self.counted if self.declared else ():
            number = canonical(key[1])
            if not (number.isdecimal() and int(number) < len(self.declared)):
                table, i = places[key]
                raise UserError(
                    f"{table.where(i, self.column)}: label '{number}' is not one of 0 to {len(self.declared) - 1}, the "
                    f"numbers of the classes that the data declares, {few(self.declared)}; correct the row"
                )
            words[key] = self.declared[int(number)]
        return words

    def word(self, label: Any) -> str:
        """The label as a word; one that the source declares, or that is written as no other number is, as it is."""
        if (text := str(label).strip()) in self.exact:
            return text
        return self.by_word.get(canonical(label), canonical(label))

    def ordered(self, words: Any) -> list[str]:
        """The words, one for each class: numbers in numeric order, others in alphabetic order."""
        one_each = {self.shown[word]: word for word in words}.values()
        return sorted(one_each, key=lambda word: (quantity(word), word) if self.quantities else (0.0, self.shown[word]))

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
            f"{setting([words[0], words[-1]], more=True)} "
            "(every value; several may have the same name)"
        )
        if self.quantities:
            whole = all(quantity(word).is_integer() for word in words)
            span = quantity(words[-1]) - quantity(words[0]) + 1
            sparse = span > len(words) and len(words) > FEW_VALUES and self.rows < 10 * len(words)
            if not whole or sparse:
                raise UserError(f"{where}: {many} numbers ({few(words)}): a measure, not classes{remedy}")
        if len(words) > FEW_VALUES and 2 * len(words) > self.rows:
            raise UserError(f"{where}: {many} values in {self.rows:,} rows ({few(words)}): no classes{remedy}")
        # Ids without a gap from 0 or 1 are classes; up to 100 they could be percent.
        ids = self.quantities and words[0] in ("0", "1") and span == len(words) and words[-1] != "100"
        if self.quantities and len(words) > MANY_NUMBERS and not (ids and self.rows >= 10 * len(words)):
            warnings.append(f"{many} numbers ({few(words)}), and each is a class; if it is a measure{remedy[1:]}")
        counted = [word for word in self.first if is_number(word)]
        if counted and not self.quantities:
            odd = next(w for w in self.first if (w in counted) != (next(iter(self.first)) in counted))
            raise UserError(
                f"{_place(self, odd)}: label '{few([odd])}', but others are {few(list(self.first))}; use one kind"
            )
        alike: dict[str, str] = {}
        for word in self.first:
            for look in dict.fromkeys([looks(self.shown[word]), looks(self.shown[word].translate(ALIKE))]):
                other = alike.setdefault(look, word)
                if self.shown[other] != self.shown[word]:
                    case = other.casefold() == word.casefold()
                    how = "only in case" if case else "only in characters that look alike"
                    raise UserError(
                        f"{_place(self, word)}: label '{escaped(word)}' differs from '{escaped(other)}' {how}; "
                        f"write it one way, or say that they are one class: {setting([other, word], more=True)}"
                    )


def _mapped(names: Mapping[Any, Any], found: _Found, warnings: list[str]) -> tuple[list[str], dict[str, str]]:
    _check_words([*names], found.boolean)
    _check_words([*names.values()], booleans=False)
    by_word: dict[str, str] = {}
    for label, name in names.items():
        if (word := found.word(label)) in by_word:
            raise UserError(f"data.label_names: '{few([word])}' is duplicated; name each label once{_eaten(names)}")
        by_word[word] = str(name)
    classes = list(dict.fromkeys(by_word.values()))
    if len(classes) < 2:
        raise UserError(f"data.label_names: at least two different names are needed, got {classes}")
    numbers = {str(i): name for i, name in enumerate(found.declared)}
    if not by_word.keys() & {*found.declared}:
        by_word = {numbers.get(word, word): name for word, name in by_word.items()}
    elif odd := [word for word in by_word if word not in found.declared and is_number(word)]:
        raise UserError(
            f"data.label_names: {few(odd)} is none of the names that the data declares, {few(found.declared)}; "
            f"name these: {setting(found.declared)}"
        )
    elif found.counted and by_word.keys() <= numbers.keys() and any(numbers[word] != word for word in by_word):
        pairs = few([f"{i} = {by_word[name]}" for i, name in numbers.items() if name in by_word])
        warnings.append(f"data.label_names: its keys are the names that the data declares, so that the cells {pairs}")
    return classes, by_word | found.named(by_word)


def _listed(given: Sequence[Any], found: _Found, warnings: list[str]) -> tuple[list[str], dict[str, str]]:
    _check_words(given, found.boolean)
    declared = found.declared
    names = [canonical(name) if not isinstance(name, str) else name for name in given]
    by_word = {found.word(name): name for name in names}
    if len(by_word) != len(names) or len(names) < 2:
        raise UserError(f"data.label_names: at least two different names are needed, got {names}{_eaten(given)}")
    if declared and sorted(by_word) == sorted(declared) and [*by_word] != declared:
        raise UserError(
            f"data.label_names: {few(names)} has another order than the data itself declares, "
            f"{few(declared)}; use that order, or other names"
        )
    spelled = found.named(by_word)
    counted = found.counted and len(found.counted) == len(found.words) if declared else found.quantities
    if not (found.boolean or counted) or len(spelled) == len(found.first):
        return names, spelled
    values = declared or [found.shown[word] for word in found.ordered(found.first)]
    # A name that means another label already, or a number that means none, is not given by its place.
    means = {str(i): i for i in range(len(declared))} | {name: i for i, name in enumerate(declared)}
    if declared:
        moved = any(means.get(word, i) != i for i, word in enumerate(by_word))
    else:
        moved = bool(spelled) or any(map(is_number, by_word))
    if len(values) != len(names) or moved:
        raise UserError(
            f"data.label_names: {len(names)} names ({few(names)}) for {len(values)} classes ({few(values)}); "
            f"say which is which: {setting(values[:2], more=True)}{_eaten(given)}"
        )
    numbers = [quantity(value) for value in values if found.quantities and not declared]
    if numbers and numbers not in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]):
        matched = few([f"{value} = {name}" for value, name in zip(values, names, strict=True)])
        warnings.append(f"data.label_names: matched to the sorted labels, {matched}")
    by_shown = dict(zip(values, names, strict=True))
    return names, by_shown | {word: by_shown[found.shown[word]] for word in found.first if not declared}


def _unnamed(missing: list[str], by_word: Mapping[str, str], classes: list[str], names: Any, found: _Found) -> str:
    """What to say of labels without a name: which they are, and the mapping to give."""
    allowed = [*map(found.word, names)] if isinstance(names, Mapping) else classes
    hint = _eaten(names) if any(yaml_key(word) != word for word in missing) or {"True", "False"} & {*allowed} else ""
    others = f"; without a name: {few(missing)}" if len(missing) > 1 else ""
    cell, word = found.cells[missing[0]][0], missing[0]
    label = f"'{few([cell])}'" if cell == word else f"'{few([cell])}', declared as '{few([word])}',"
    named = {word: by_word[word] for word in found.first if word not in missing}
    return (
        f"{_place(found, word)}: label {label} is not one of {few(allowed)}{others}; correct the row, or set "
        f"{setting(missing, named)}{hint}"
    )


def _eaten(given: Any) -> str:
    """A hint if YAML may have read something else than was written."""
    return f" ({_QUOTE})" if any(not isinstance(word, str) for word in given or ()) else ""


def _check_words(words: Sequence[Any], booleans: bool) -> None:
    """Refuses what cannot be a label or a name, or is a word that YAML reads as something else.

    Raises:
        UserError: As said.
    """
    for word in words:
        if isinstance(word, bool) and not booleans:
            raise UserError(f"data.label_names: {word} is neither a name nor a label of the data; {_QUOTE}")
        if not isinstance(word, str | int | float) or not canonical(word):
            raise UserError(f"data.label_names: a name is a word or a number, got {word!r:.40}; {_QUOTE}")


def _declared_names(splits: dict[str, list[Table]]) -> list[str]:
    """The class names that the source declares, which must be the same in all its files."""
    tables = [table for tables in splits.values() for table in tables if table.label_names]
    for table in tables[1:]:
        if table.label_names != tables[0].label_names:
            raise UserError(
                f"{table.origin}: declares the classes {table.label_names}, but {tables[0].origin} declares "
                f"{tables[0].label_names}; write both with the same names in the same order"
            )
    return tables[0].label_names or [] if tables else []


def cell_key(cell: Any) -> tuple[type, Any]:
    """What two cells share only if they are the same: True, 1 and 1.0 are equal, and not the same."""
    return type(cell), cell


def _place(found: _Found, word: str) -> str:
    table, i = found.first[word]
    return table.where(i, found.column)
