"""What makes a row usable: a text that shows something, and a label."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from lightning_lora.data.pairs import Text
from lightning_lora.data.reading import Table
from lightning_lora.errors import UserError

#: What to do about a label that cannot be used.
CORRECT = "correct it, or empty it and leave such rows out with data.bad_rows=drop"
#: Unicode categories of characters that show nothing: controls, format characters and separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


def incomplete_rows(table: Table, text_columns: Sequence[str], label_column: str, pair: bool = False) -> dict[int, str]:
    """Positions of the rows whose text or label is missing, each with what is wrong.

    Raises:
        UserError: A cell is there but is no text, or no label.
    """
    found: dict[int, str] = {}
    for i, row in enumerate(zip(*(table.columns[name] for name in text_columns), strict=True)):
        for column, cell in zip(text_columns, row, strict=True):
            if cell is not None and not isinstance(cell, str):
                raise UserError(
                    f"{table.where(i, column)}: a text is needed, got {type(cell).__name__} {cell!r:.40}; "
                    "is it the text? Set data.text_column"
                )
            if cell and ("\0" in cell or not is_unicode(cell)):
                odd = "a NUL byte" if "\0" in cell else "half of a surrogate pair"
                raise UserError(f"{table.where(i, column)}: {odd} is no character; correct the row")
        if (blank := blank_text(text_columns, row, pair)) is not None:
            found[i] = f"{table.where(i, blank[0])}: the text is {'null' if blank[1] is None else 'empty'}"
    for i, cell in enumerate(table.columns[label_column]):
        if is_missing(cell):
            found.setdefault(i, f"{table.where(i, label_column)}: the label is missing")
        elif not isinstance(cell, str | int | float | list):
            raise UserError(
                f"{table.where(i, label_column)}: a label is a word, a number or a list of them, got "
                f"{type(cell).__name__} {cell!r:.40}"
            )
        elif not is_unicode(str(cell)):
            raise UserError(
                f"{table.where(i, label_column)}: half of a surrogate pair is no character; correct the row"
            )
    return found


def is_missing(cell: Any) -> bool:
    """Whether a cell of a label column says nothing: null, NaN or spaces."""
    return cell is None or not str(cell).strip() or (isinstance(cell, float) and math.isnan(cell))


def is_unicode(text: str) -> bool:
    """Whether the text can be written down: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_blank(cell: Any) -> bool:
    """Whether a cell of a text column is null or shows nothing: spaces, controls, format characters."""
    return cell is None or (isinstance(cell, str) and all(unicodedata.category(c) in _INVISIBLE for c in cell))


def blank_text(columns: Sequence[str], cells: Sequence[Any], pair: bool) -> tuple[str, Any] | None:
    """The columns in which a row lacks a text, and the cell: one column of a pair, else all of them, or None."""
    blank = [(column, cell) for column, cell in zip(columns, cells, strict=True) if is_blank(cell)]
    if pair:
        return blank[0] if blank else None
    return (" + ".join(columns), cells[0]) if len(blank) == len(columns) else None


def row_text(cells: Sequence[Any], pair: bool) -> Text:
    """The text of a row: those of its text columns that are not blank, joined by a space; or a pair of texts.

    This is the rule in training, ``predict`` and exports.
    """
    shown = ["" if is_blank(cell) else str(cell) for cell in cells]
    return (shown[0], shown[1]) if pair else " ".join(filter(None, shown))
