"""The rows that ``predict`` is given: their texts, those that have none, and the columns beside them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_lora.data.checking import blank_text, is_blank, is_unicode, row_text
from lightning_lora.data.pairs import Text, is_pair
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
        texts: The text of each row, or its pair of texts.
        faults: Rows without a text to predict, by position: the place and what is wrong with it.
    """

    table: Table
    text_columns: Sequence[str]
    texts: list[Text]
    faults: Mapping[int, str]

    @classmethod
    def of(cls, table: Table, text_columns: Sequence[str], pair: bool = False) -> "InputRows":
        """Returns the rows of a table.

        A cell that is neither a text nor blank is a fault, as are only blank ones, or a blank one of a pair.
        """
        given = [table.columns[name] for name in text_columns]
        columns = [cells(column) if isinstance(column, pa.ChunkedArray) else column for column in given]
        texts, faults = list[Text](), dict[int, str]()
        for i, row in enumerate(zip(*columns, strict=True)):
            texts.append(row_text(row, pair))
            odd = ((name, cell) for name, cell in zip(text_columns, row, strict=True) if not _is_allowed(cell))
            if (wrong := next(odd, None) or blank_text(text_columns, row, pair)) is not None:
                name, cell = wrong
                got = "null" if cell is None else repr(cell)[:40]
                kind = "bytes that are not UTF-8: " if isinstance(cell, bytes) else ""
                faults[i] = f"{table.where(i, name)}: a text is needed, got {kind}{got}"
        return cls(table, text_columns, texts, faults)

    @property
    def usable(self) -> list[Text]:
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
        """Refuses rows without a text, and names the place of the first."""
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
    """Returns the columns of an input that hold its text: two, where the run reads pairs."""
    columns = config.text_column or config.data.text_column or "text"
    columns = [columns] if isinstance(columns, str) else list(columns)
    if is_pair(config.data.truncation) and len(columns) != 2:
        raise UserError(
            "--text_column: the run reads pairs of texts; give two columns, as [premise, hypothesis], got "
            f"{', '.join(columns)}"
        )
    return columns


def typed_rows(texts: Sequence[str], pair: Sequence[str] = ()) -> InputRows:
    """Returns the texts of the command line; two at a time are a pair, whose columns are given."""
    if pair and len(texts) % 2:
        raise UserError(f"the run reads pairs of texts ({', '.join(pair)}): give two texts for each, got {len(texts)}")
    columns = {name: list(texts[i::2]) for i, name in enumerate(pair)} or {"text": list(texts)}
    rows = range(1, len(next(iter(columns.values()))) + 1)
    return InputRows.of(Table("command line", columns, rows, "pair" if pair else "text"), [*columns], bool(pair))


def piped_rows(pair: Sequence[str] = ()) -> InputRows:
    """Returns the lines of standard input, as of a file."""
    if sys.stdin.isatty():
        raise UserError("no texts: give them as words in quotes, with --input FILE, or on standard input")
    try:
        return _lines("standard input", sys.stdin.read(), pair)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text ({error.reason} at byte {error.start})") from None


def file_rows(
    source: str, text_columns: Sequence[str], encoding: str | None = None, pair: Sequence[str] = ()
) -> InputRows:
    """Returns the rows of a file, with all their columns.

    Args:
        source: The file.
        text_columns: Columns of its text.
        encoding: That of a text file that is not UTF-8.
        pair: The columns that the texts of a pair are to have, where the run reads pairs; a tab parts those of a line.

    Raises:
        UserError: There is no such file, or it cannot be read, lacks a text column or holds no rows.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"--input: no file '{source}'")
    if path.suffix.lower() in (".txt", ""):
        return _lines(str(path), read_text(path, encoding), pair)
    if format_of(path) not in READERS:
        raise UserError(f"--input: '{path.name}' must end in one of .txt, {', '.join(READERS)}")
    rows = InputRows.of(read_file(path, text_columns, encoding), text_columns, bool(pair))
    wrong = next((i for i, text in enumerate(rows.texts) if any(text)), None)
    if wrong is not None and len(rows.faults) == len(rows.texts):
        raise UserError(f"{rows.faults[wrong]}; no row has a text. Set --text_column")
    return rows


def _is_allowed(cell: Any) -> bool:
    return is_blank(cell) or (isinstance(cell, str) and is_unicode(cell))


def _lines(origin: str, content: str, pair: Sequence[str]) -> InputRows:
    # Only \n ends a line: splitlines() would also cut at a form feed or U+2028 inside a text.
    lines = content.removesuffix("\n").split("\n") if content else []
    if not lines:
        raise UserError(f"{origin}: no texts")
    texts = [line.removesuffix("\r") for line in lines]
    table = Table(origin, {"text": texts}, range(1, len(lines) + 1), "line")
    if not pair:
        return InputRows.of(table, ["text"])
    columns = zip(*(line.partition("\t")[::2] for line in texts), strict=True)
    rows = InputRows.of(replace(table, columns=dict(zip(pair, map(list, columns), strict=True))), pair, True)
    tabs = f"; the run reads pairs of texts: give {' and '.join(pair)} with a tab between"
    faults = {i: fault if "\t" in texts[i] else f"{fault}{tabs}" for i, fault in rows.faults.items()}
    if not any("\t" in line for line in texts):
        raise UserError(faults[0])
    return replace(rows, faults=faults)
