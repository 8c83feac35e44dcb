"""The rows that ``predict`` is given: their texts, those that have none, and the columns beside them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_lora.data.checking import is_blank, is_unicode, joined_text
from lightning_lora.data.reading import READERS, Table, cells, format_of, read_file, read_text
from lightning_lora.errors import UserError
from lightning_lora.evaluation.predictions import Predictions

#: Places that a warning names.
SHOWN_PLACES = 3


@dataclass(frozen=True)
class InputRows:
    """Rows to predict.

    Args:
        table: All columns of the rows as they came, with the place of each row.
        text_columns: Those that hold the text.
        texts: The text of each row.
        faults: Rows without a text to predict, by position: the place and what is wrong with it.
    """

    table: Table
    text_columns: Sequence[str]
    texts: list[str]
    faults: Mapping[int, str]

    @classmethod
    def of(cls, table: Table, text_columns: Sequence[str]) -> "InputRows":
        """Returns the rows of a table; a cell that is neither a text nor blank is a fault, as are only blank ones."""
        columns: list[Any] = [table.columns[name] for name in text_columns]
        columns = [cells(column) if isinstance(column, pa.ChunkedArray) else column for column in columns]
        texts, faults = list[str](), dict[int, str]()
        for i, row in enumerate(zip(*columns, strict=True)):
            texts.append(joined_text(row))
            wrong = [(name, cell) for name, cell in zip(text_columns, row, strict=True) if not _is_allowed(cell)]
            if not wrong and all(map(is_blank, row)):
                wrong = [(" + ".join(text_columns), row[0])]
            for name, cell in wrong[:1]:
                got = "null" if cell is None else repr(cell)[:40]
                kind = "bytes that are not UTF-8: " if isinstance(cell, bytes) else ""
                faults[i] = f"{table.where(i, name)}: a text is needed, got {kind}{got}"
        return cls(table, text_columns, texts, faults)

    @property
    def usable(self) -> list[str]:
        """The texts to predict, in their order."""
        return [text for i, text in enumerate(self.texts) if i not in self.faults]

    @property
    def faulty_places(self) -> list[str]:
        """The first rows without a text, in words."""
        return [f"{self.table.origin}, {self.table.unit} {self.table.rows[i]}" for i in [*self.faults][:SHOWN_PLACES]]

    def predicted(self, predictions: Predictions) -> dict[str, list[Any]]:
        """Returns the predictions of every row, by column; those of rows without a text are None."""
        columns: dict[str, list[Any]] = {}
        for name, values in predictions.columns().items():
            each = iter(values if isinstance(values, list) else values.tolist())
            columns[name] = [None if i in self.faults else next(each) for i in range(len(self.texts))]
        return columns

    def refuse_faults(self) -> None:
        """Refuses rows without a text.

        Raises:
            UserError: There is one; its place is named.
        """
        if self.faults:
            more = f" (and {len(self.faults) - 1:,} more)" if len(self.faults) > 1 else ""
            first = self.faults[min(self.faults)]
            raise UserError(f"{first}{more}; correct it, or keep such rows without a prediction: --bad_rows empty")


def warn_of_faults(places: Sequence[str], count: int, total: int) -> None:
    """Says on standard error how many rows have no prediction, and where the first are."""
    if count:
        shown = "; ".join(places[:SHOWN_PLACES]) + ("; ..." if count > SHOWN_PLACES else "")
        print(
            f"warning: {count:,} of {total:,} rows have no text and so no prediction: {shown} "
            "(--bad_rows error refuses them)",
            file=sys.stderr,
        )


def text_columns_of(config: Any) -> list[str]:
    """Returns the columns of an input that hold its text."""
    columns = config.text_column or config.data.text_column or "text"
    return [columns] if isinstance(columns, str) else list(columns)


def typed_rows(texts: Sequence[str]) -> InputRows:
    """Returns the texts of the command line."""
    return InputRows.of(Table("command line", {"text": list(texts)}, range(1, len(texts) + 1), "text"), ["text"])


def piped_rows() -> InputRows:
    """Returns the lines of standard input.

    Raises:
        UserError: It is a terminal, is not UTF-8 or holds nothing.
    """
    if sys.stdin.isatty():
        raise UserError("no texts: give them as words in quotes, with --input FILE, or on standard input")
    try:
        return _lines("standard input", sys.stdin.read())
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text ({error.reason} at byte {error.start})") from None


def file_rows(source: str, text_columns: Sequence[str], encoding: str | None = None) -> InputRows:
    """Returns the rows of a file, with all their columns.

    Raises:
        UserError: There is no such file, or it cannot be read, lacks a text column or holds no rows.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"--input: no file '{source}'")
    if path.suffix.lower() in (".txt", ""):
        return _lines(str(path), read_text(path, encoding))
    if format_of(path) not in READERS:
        raise UserError(f"--input: '{path.name}' must end in one of .txt, {', '.join(READERS)}")
    rows = InputRows.of(read_file(path, text_columns, encoding), text_columns)
    wrong = next((i for i, text in enumerate(rows.texts) if text), None)
    if wrong is not None and len(rows.faults) == len(rows.texts):
        raise UserError(f"{rows.faults[wrong]}; no row has a text. Set --text_column")
    return rows


def _is_allowed(cell: Any) -> bool:
    return is_blank(cell) or (isinstance(cell, str) and is_unicode(cell))


def _lines(origin: str, content: str) -> InputRows:
    # Only \n ends a line: splitlines() would also cut at a form feed or U+2028 inside a text.
    lines = content.removesuffix("\n").split("\n") if content else []
    if not lines:
        raise UserError(f"{origin}: no texts")
    texts = [line.removesuffix("\r") for line in lines]
    return InputRows.of(Table(origin, {"text": texts}, range(1, len(lines) + 1), "line"), ["text"])
