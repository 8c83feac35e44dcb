"""From label cells to class numbers, without guessing."""

import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from lightning_lora.data.checking import CORRECT, is_missing, is_unicode
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError

#: So few different values are never taken for a measure, an identifier or a text.
FEW_VALUES = 10
#: Numbers to predict are computed with, and their errors squared, in 32 bits: no larger ones are taken, nor any that
#: differ by a smaller share of their size.
LARGEST, LEAST_SPREAD = 1e15, 1e-5
#: More whole numbers than these are pointed out, as they could measure something, and more than those are refused.
MANY_NUMBERS, TOO_MANY_NUMBERS = 20, 100
#: Numbers with a decimal comma, or with separators of thousands.
_COMMA_NUMBER = re.compile(r"[+-]?\d+(,\d+)+(\.\d+)?", re.ASCII)
_WHOLE_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.0+)?", re.ASCII)
_QUOTE = "YAML reads yes, no, on, off, null, 007, 1:30 and 1.10 without quotes as something else: put each in quotes"
_MEASURE = "set data.task=regression to predict it, or another data.label_column"
_REMEDY = """name every label, as in data.label_names='{"1": World, "2": Sports}' (several may have the same name)"""


def canonical(cell: Any) -> str:
    """The label cell as a word, the same from every file format.

    Whole numbers have neither a point nor a plus ("1.0" and "+1" are "1"), accents are composed (NFC), and any white
    space is one space.
    """
    word = " ".join(unicodedata.normalize("NFC", str(cell)).split())
    return str(int(word.partition(".")[0])) if _WHOLE_NUMBER.fullmatch(word) else word


def few(words: Sequence[str], most: int = 8) -> str:
    """The first words on one line, and how many there are if these are not all."""
    shown = " ".join(", ".join(words[:most]).split())
    return shown if len(words) <= most else f"{shown}, ... ({len(words)} in all)"


#: A label cell with its type, as True, 1 and 1.0 are equal and not the same.
LabelCell = tuple[type, Any]


@dataclass(frozen=True)
class LabelCells:
    """The label cells of a source, of which each file may have one once for all of its rows.

    Args:
        column: Their column.
        values: The cells as they stand in the files.
        where: The place of a cell in words, by its number.
        train: Which of them are of train.
        train_rows: Rows of train.
        origin: The first file of train.
        declared: Names of the classes 0, 1, ... that the files declare.
    """

    column: str
    values: list[Any]
    where: Callable[[int], str]
    train: slice
    train_rows: int
    origin: str
    declared: list[str]

    @classmethod
    def of(cls, splits: Mapping[str, Sequence[Table]], column: str, train_rows: int) -> "LabelCells":
        """The cells of the tables of each split.

        Raises:
            UserError: The tables declare different classes.
        """
        tables = [table for each in splits.values() for table in each]
        starts = np.cumsum([0, *map(len, tables)])

        def where(number: int) -> str:
            of = int(np.searchsorted(starts, number, side="right")) - 1
            return tables[of].where(number - int(starts[of]), column)

        declaring = [table for table in tables if column in table.class_names]
        for table in declaring[1:]:
            if table.class_names[column] != declaring[0].class_names[column]:
                raise UserError(
                    f"{table.origin}: declares the classes {table.class_names[column]}, but {declaring[0].origin} "
                    f"declares {declaring[0].class_names[column]}; write both with the same names in the same order"
                )
        values = [cell for table in tables for cell in table.columns[column]]
        declared = declaring[0].class_names[column] if declaring else []
        before = takewhile(lambda split: split != "train", splits)
        start = sum(len(table) for split in before for table in splits[split])
        train = slice(start, start + sum(map(len, splits["train"])))
        return cls(column, values, where, train, train_rows, splits["train"][0].origin, declared)


@dataclass(frozen=True)
class Labels:
    """The classes, and the class of every label cell.

    Args:
        names: The classes in the order of their numbers; of regression the column.
        codes: Of each cell the class number (cells,), 0 or 1 for each label (cells, C), or the number (cells,).
        values: What the data says for each class, by its name.
        warnings: What a reader should know of how they were found.
    """

    names: list[str]
    codes: np.ndarray
    values: dict[str, list[str]]
    warnings: list[str]


def encode_labels(
    cells: LabelCells,
    names: Sequence[Any] | Mapping[Any, Any] | None,
    known: Sequence[str] | None = None,
    typed: bool = False,
    least: int = 2,
) -> Labels:
    """The classes, and the class number of every cell.

    Args:
        cells: The labels.
        names: The user's: a mapping from label to class name (several labels may mean one class); or a list, of the
            labels themselves or, where these are numbers, of names for the sorted numbers.
        known: Names of the classes 0, 1, ... of a known data set; else those that the files declare are used.
        typed: Whether the user says that they are classes, however many numbers there are.
        least: Different classes that the train split must have.

    Without names the classes are the values of the train split: numbers in numeric order, words in alphabetic order.

    Raises:
        UserError: A label has no name, is of mixed kinds, measures or identifies something, or there is one class.
    """
    keys: list[LabelCell] = [(type(cell), cell) for cell in cells.values]
    first: dict[LabelCell, str] = {}
    for number, key in enumerate(keys):
        if key not in first:
            first[key] = cells.where(number)
    declared = list(known or cells.declared)
    words = _declared_words(first, declared) if declared else _plain_words(first)
    places: dict[str, str] = {}
    written: dict[str, dict[str, None]] = {}
    for key, word in words.items():
        places.setdefault(word, first[key])
        written.setdefault(word, {})[canonical(key[1])] = None

    warnings = []
    if names is not None:
        by_word = _named(names, list(places), declared)
    elif declared:
        by_word = {name: name for name in declared}
    else:
        warnings = _check_categorical(places, cells.train_rows, f"{cells.origin}: column '{cells.column}'", typed)
        by_word = {word: word for word in ordered({words[key] for key in keys[cells.train]})}
    if missing := [word for word in places if word not in by_word]:
        others = f"; without a name: {few(missing)}" if len(missing) > 1 else ""
        raise UserError(
            f"{places[missing[0]]}: label '{missing[0]}' is not one of {few(list(by_word))}{others}; correct the row, "
            f"or {_REMEDY}"
        )

    classes = list(dict.fromkeys(by_word.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    codes = np.array([numbers[by_word[words[key]]] for key in keys], np.int64)
    present = np.unique(codes[cells.train])
    if len(present) < least:
        raise UserError(
            f"{cells.origin}: every row of the train split has the label '{classes[present[0]]}'; a classifier needs "
            "at least two classes"
        )
    values: dict[str, list[str]] = {name: [] for name in classes}
    for word in ordered(places):
        values[by_word[word]] += written[word]
    return Labels(classes, codes, values, warnings)


def encode_label_sets(cells: LabelCells, names: Sequence[Any] | Mapping[Any, Any] | None) -> Labels:
    """The labels, and which of them every cell holds.

    Args:
        cells: Lists of labels.
        names: The user's, as for ``encode_labels``, which reads each label.

    Raises:
        UserError: As ``encode_labels``; or some cells are lists, and others are not.
    """
    first = cells.values[cells.train.start]
    owners, singles = list[int](), list[Any]()
    for number, cell in enumerate(cells.values):
        if isinstance(cell, list) != isinstance(first, list):
            others = "lists" if isinstance(first, list) else "no lists"
            raise UserError(
                f"{cells.where(number)}: a list of labels is needed in all rows or in none, got {cell!r:.40}, but "
                f"others are {others}, as {first!r:.40}; {CORRECT}"
            )
        for label in cell if isinstance(cell, list) else []:
            if is_missing(label) or not isinstance(label, str | int | float) or not is_unicode(str(label)):
                raise UserError(
                    f"{cells.where(number)}: a list of words or numbers is needed, got {cell!r:.60}; {CORRECT}"
                )
            if isinstance(label, float) and not label.is_integer():
                raise UserError(
                    f"{cells.where(number)}: a list of labels is needed, got {cell!r:.60}, whose numbers are measures; "
                    "write the labels that apply, or one number to predict, or name another data.label_column"
                )
            owners.append(number)
            singles.append(label)
    train = slice(bisect_left(owners, cells.train.start), bisect_left(owners, cells.train.stop))
    least = 2 if names is None else 1  # those that are named are there, also without a row
    if len(set(singles[train])) < least:
        held = "no label" if least == 1 else "fewer than two labels"
        raise UserError(f"{cells.origin}: column '{cells.column}' holds {held} in train; add rows")
    each = replace(cells, values=singles, where=lambda number: cells.where(owners[number]), train=train)
    labels = encode_labels(each, names, least=least)
    sets = np.zeros((len(cells.values), len(labels.names)), np.uint8)
    sets[owners, labels.codes] = 1
    return replace(labels, codes=sets)


def encode_numbers(cells: LabelCells, names: Any) -> Labels:
    """The number of every cell, float64.

    Args:
        cells: The numbers.
        names: The user's names of labels, which must be none.

    Raises:
        UserError: There are names, a cell is no number, or all of train are hardly different or none.
    """
    if names is not None:
        raise UserError("data.label_names: numbers (data.task=regression) have no names; leave it out")
    numbers = [None if isinstance(cell, bool) else number_of(cell) for cell in cells.values]
    if all(number is None for number in numbers[cells.train]):
        remedy = "leave data.task out, or name another data.label_column"
        start = cells.train.start
        if _COMMA_NUMBER.fullmatch(str(cells.values[start])):
            remedy = "write numbers with a point and without separators of thousands"
        raise UserError(
            f"{cells.where(start)}: data.task is regression, but the column holds no numbers, as "
            f"{cells.values[start]!r:.40}; {remedy}"
        )
    odd = (number for number, value in enumerate(numbers) if value is None or abs(value) > LARGEST)
    if (at := next(odd, None)) is not None:
        raise UserError(
            f"{cells.where(at)}: a number from {-LARGEST:g} to {LARGEST:g} is needed (data.task=regression), got "
            f"{cells.values[at]!r:.40}; {CORRECT}"
        )
    codes = np.array(numbers, np.float64)
    if len(np.unique(codes[cells.train])) < 2:
        raise UserError(
            f"{cells.origin}: column '{cells.column}' has the same number in every row of train; add others"
        )
    train = codes[cells.train]
    if train.std() < max(np.abs(train).max() * LEAST_SPREAD, 1 / LARGEST):
        raise UserError(
            f"{cells.origin}: column '{cells.column}' holds numbers that 32-bit floats hardly tell from one another "
            f"(mean {train.mean():g}, standard deviation {train.std():g}); take a constant from them, or use another "
            "unit"
        )
    return Labels([cells.column], codes, {cells.column: []}, [])


def number_of(word: Any) -> float | None:
    """The number that a word or a cell is, or None; "1_2", which Python reads as 12, is a word."""
    try:
        number = math.nan if "_" in str(word) else float(word)
    except (ValueError, TypeError):
        return None
    return number if math.isfinite(number) else None


def ordered(words: Iterable[str]) -> list[str]:
    """The words, numbers in numeric order if all are, else in alphabetic order."""
    numbers = {word: number_of(word) for word in words}
    return sorted(numbers) if None in numbers.values() else sorted(numbers, key=lambda word: (numbers[word], word))


def _plain_words(cells: Iterable[LabelCell]) -> dict[LabelCell, str]:
    """Each label cell as a word; true and false are written alike from every format."""
    words = {key: canonical(key[1]) for key in cells}
    boolean = {word.casefold() for word in words.values()} <= {"true", "false"}
    return {key: word.capitalize() for key, word in words.items()} if boolean else words


def _declared_words(cells: Mapping[LabelCell, str], declared: list[str]) -> dict[LabelCell, str]:
    """Each label cell as one of the declared names: a number is its position, as in ``datasets.ClassLabel``.

    Text is a name; only if some text is none and all are numbers, it is a position too.
    """
    names = {canonical(name): name for name in declared}
    texts = {canonical(cell) for kind, cell in cells if kind is str}
    by_name = texts <= names.keys() or not all(map(str.isdecimal, texts))
    words = {}
    for (kind, cell), place in cells.items():
        word = canonical(cell)
        if kind is bool or (kind is str and by_name):
            name = names.get(word)
        else:
            name = declared[int(word)] if word.isdecimal() and int(word) < len(declared) else None
        if name is None:
            raise UserError(
                f"{place}: label '{word}' is not one of the classes that the data declares, {few(declared)}, nor one "
                f"of their numbers, 0 to {len(declared) - 1}; correct the row"
            )
        words[kind, cell] = name
    return words


def _named(names: Sequence[Any] | Mapping[Any, Any], words: list[str], declared: list[str]) -> dict[str, str]:
    """The class of each label, as the user names them; refuses names of which it is not clear whose they are."""
    boolean = set(words) <= {"True", "False"}
    labels = list(names)
    classes = list(names.values()) if isinstance(names, Mapping) else labels
    for word in [*labels, *classes]:
        odd = isinstance(word, bool) and not (boolean and word in labels)
        if odd or not isinstance(word, str | int | float) or not canonical(word):
            raise UserError(f"data.label_names: a name is a word or a number, got {word!r:.40}; {_QUOTE}")
    keys = [canonical(label).capitalize() if boolean else canonical(label) for label in labels]
    given = {key: canonical(name) for key, name in zip(keys, classes, strict=True)}
    if len(given) < len(keys) or len(set(given.values())) < 2:
        raise UserError(f"data.label_names: at least two different names, one for each label, got {names}; {_QUOTE}")
    if isinstance(names, Mapping):
        if given.keys() & set(declared):
            return given
        return {name: given[str(i)] for i, name in enumerate(declared) if str(i) in given} or given
    if set(words) <= given.keys():
        if sorted(given) == sorted(declared) and list(given) != declared:
            raise UserError(
                f"data.label_names: {few(keys)} has another order than the data itself declares, {few(declared)}; use "
                "that order, or other names"
            )
        return given
    values = declared or ordered(words)
    if not (declared or boolean or all(number_of(word) is not None for word in words)):
        return given
    # A name that means another label already, or a number that means none, is not given by its place.
    if len(values) != len(keys) or any(key in values or number_of(key) is not None for key in keys):
        raise UserError(
            f"data.label_names: {len(keys)} names ({few(keys)}) for {len(values)} classes ({few(values)}); {_REMEDY}; "
            f"{_QUOTE}"
        )
    return dict(zip(values, given.values(), strict=True))


def _check_categorical(places: Mapping[str, str], rows: int, column: str, typed: bool) -> list[str]:
    """Refuses labels that are no classes unless the user says so, and those that differ only in how they are written.

    Args:
        places: Where each label is first.
        rows: Of the train split.
        column: Its file and name, for messages.
        typed: Whether the user says that they are classes.

    Returns:
        Warnings if they may be a measure, or several labels in one.
    """
    words = ordered(places)
    numbers = [number for word in words if (number := number_of(word)) is not None]
    warnings = []
    if numbers and len(numbers) < len(words):
        kinds = {"a number": [word for word in places if number_of(word) is not None]}
        kinds["a word"] = [word for word in places if word not in kinds["a number"]]
        # The rarer kind is odd; where both are as frequent, the one that comes later.
        order = sorted(kinds, key=lambda kind: (len(kinds[kind]), next(iter(places)) in kinds[kind]))
        kind, odd, others = order[0], kinds[order[0]], kinds[order[1]]
        more = f" (so {'are' if len(odd) > 2 else 'is'} {few(odd[1:])})" if len(odd) > 1 else ""
        raise UserError(
            f"{places[odd[0]]}: label '{odd[0]}' is {kind}{more}, but others are {few(others)}; {CORRECT}, or {_REMEDY}"
        )
    if numbers:
        many = f"{column} holds {len(words):,} different numbers ({few(words)})"
        span = numbers[-1] - numbers[0] + 1
        sparse = span > len(words) > FEW_VALUES and rows < 10 * len(words)
        if sparse or not all(map(float.is_integer, numbers)):
            raise UserError(f"{many}: a measure, not classes; {_MEASURE}, or {_REMEDY}")
        if len(words) > TOO_MANY_NUMBERS and not typed:
            raise UserError(f"{many}: a measure? {_MEASURE}; or, if each is a class, data.task=single_label")
        # Ids without a gap from 0 or 1 are classes; up to 100 they could be percent.
        ids = numbers[0] in (0, 1) and span == len(words) and numbers[-1] != 100
        if len(words) > MANY_NUMBERS and not ids and not typed:
            warnings.append(f"{many}, and each is a class; if it is a measure, {_MEASURE}")
    elif len(words) > FEW_VALUES and all(map(_COMMA_NUMBER.fullmatch, words)) and not typed:
        raise UserError(
            f"{column} holds numbers with commas ({few(words)}): to predict them, write them with a point and without "
            "separators, and set data.task=regression; or, if each is a class, data.task=single_label"
        )
    for separator in ";|,":
        made = [w for w in words if separator in w and {part.strip() for part in w.split(separator)} < places.keys()]
        if made:
            several = f"if a text may have several labels, set data.label_separator '{separator}'"
            warnings.append(
                f"{column} holds labels that are made of others ({few(made)}), each a class here; {several}"
            )
    if len(words) > FEW_VALUES and 2 * len(words) > rows:
        many = f"{column} holds {len(words):,} different values in {rows:,} rows ({few(words)})"
        remedy = _MEASURE if numbers else "set data.label_column"
        raise UserError(f"{many}: no classes; {remedy}, or {_REMEDY}")
    alike: dict[Any, str] = {}
    for word, place in places.items():
        plain = number_of(word) if numbers else _plain_letters(word)
        if (other := alike.setdefault(plain, word)) != word:
            raise UserError(
                f"{place}: label {_visible(word)} differs from {_visible(other)} only in case or in how it is written; "
                f"write it one way, or {_REMEDY}"
            )
    return warnings


def _plain_letters(word: str) -> str:
    """A word without case, forms of letters, and signs that are not seen, such as a zero-width space."""
    seen = (sign for sign in unicodedata.normalize("NFKC", word) if unicodedata.category(sign) != "Cf")
    return "".join(seen).casefold()


def _visible(word: str) -> str:
    """A word in quotes, with what is not seen written out."""
    return ascii(word) if any(unicodedata.category(sign) == "Cf" for sign in word) else f"'{word}'"
