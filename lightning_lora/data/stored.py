"""From a file of the source to checked rows, a part at a time; and the cache folder that they are written to once."""

import ast
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lightning_lora.data.checking import CORRECT, incomplete_rows, row_text
from lightning_lora.data.reading import BATCH_ROWS, Table
from lightning_lora.data.rows import SCHEMA, RowFile
from lightning_lora.data.sources import RowSource
from lightning_lora.data.splits import text_keys
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path, locked_folder, remove_partial
from lightning_lora.fingerprint import code_fingerprint

#: How a column says whether a row has its label; a missing cell says nothing.
_FLAGS: dict[str, int | None] = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
_FLAGS |= {"none": None, "nan": None, "": None}
#: A cell as text; the same few occur again and again.
_cell_text = lru_cache(maxsize=1024, typed=True)(json.dumps)
T = TypeVar("T")


@dataclass(frozen=True)
class RowRules:
    """Which rows of a file are taken, and what of them.

    Args:
        text_columns: The columns that are joined to the text, or the two of a pair.
        label_column: That of the label, or those of 0 and 1 that are a label each.
        bad_rows: What to do with rows without text or label: "error" or "drop".
        keep_rows: Only rows that hold these values are taken, as ``{column: value}``.
        pair: Whether the two columns are a pair of texts.
    """

    text_columns: list[str]
    label_column: str | Sequence[str]
    bad_rows: str
    keep_rows: Mapping[str, str] = field(default_factory=dict)
    pair: bool = False
    label_separator: str | None = None

    @property
    def label_columns(self) -> list[str]:
        """The columns of the label."""
        return [self.label_column] if isinstance(self.label_column, str) else list(self.label_column)


def stored_rows(
    source: RowSource, rules: RowRules, cache_dir: Path | None, advance: Callable[[int], Any] = lambda rows: None
) -> RowFile:
    """The rows of a source, from the cache where they are; else read, checked and written there.

    Args:
        source: The rows.
        rules: Which of them are taken.
        cache_dir: The cache; without one, or of a source without a version, they are held in memory.
        advance: Called with each number of rows that was read.
    """

    def write(sink: Any) -> None:
        tables = source.tables([*dict.fromkeys([*rules.text_columns, *rules.label_columns, *rules.keep_rows])])
        first = next(tables, Table(source.origin, {}, []))
        facts = json.dumps({"unit": first.unit, "class_names": first.class_names, "pair": rules.pair})
        with pa.ipc.new_file(sink, SCHEMA.with_metadata({"facts": facts})) as writer:
            for table in filter(len, chain([first], tables)):
                writer.write_table(_checked(table, rules), max_chunksize=BATCH_ROWS)
                advance(len(table))

    opened = partial(RowFile.open, source.origin)
    if cache_dir is None or source.version is None:
        sink = pa.BufferOutputStream()
        write(sink)
        return opened(sink.getvalue())
    content = json.dumps([source.origin, source.version, vars(rules), code_fingerprint("data.stored")], default=dict)
    return cached(cache_dir / "rows", content, lambda path: write(str(path)), opened)[0]


def with_labels(table: Table, rules: RowRules) -> tuple[Table, str]:
    """The table with one column of labels, and its name.

    They are lists where several columns, a separator or a text that is a JSON list say so.

    Raises:
        UserError: A cell is neither 0 nor 1, or no text to be separated.
    """
    columns = rules.label_columns
    column = label_name(rules.label_column)
    if len(columns) > 1:
        flags: list[list[int | None]] = []
        for name in columns:
            flags.append([_FLAGS.get(str(cell).strip().casefold(), -1) for cell in table.columns[name]])
            if -1 in flags[-1]:
                at = flags[-1].index(-1)
                raise UserError(
                    f"{table.where(at, name)}: 0 or 1 is needed, got {table.columns[name][at]!r:.40}; {CORRECT}, or "
                    "leave the column out of data.label_column"
                )
        cells: list[Any] = [
            None if None in row else [name for name, has in zip(columns, row, strict=True) if has]
            for row in zip(*flags, strict=True)
        ]
    else:
        cells = list(table.columns[column])
        for i, cell in enumerate(cells):
            if rules.label_separator is not None and cell is not None and not isinstance(cell, str):
                raise UserError(
                    f"{table.where(i, column)}: data.label_separator is for texts, got {cell!r:.40}; write it as a "
                    "text, or leave data.label_separator out"
                )
            if isinstance(cell, str):
                cells[i] = _labels_in(cell, rules.label_separator)
    return replace(table, columns={**table.columns, column: cells}), column


def _labels_in(cell: str, separator: str | None) -> str | list[str]:
    """The labels in a text: a list of words or numbers, or the parts by a separator.

    A list is written as JSON, such as by ``predict`` to CSV, or as Python does, such as by pandas.
    """
    if cell.startswith("["):
        found = None  # a word that begins so
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = read(cell) if found is None else found
        if isinstance(found, list) and all(type(each) in (str, int, float) for each in found):
            return found
    return cell if separator is None else [word.strip() for word in cell.split(separator) if word.strip()]


def label_name(column: str | Sequence[str]) -> str:
    """What the column of the label is called, of several the first and the last."""
    return column if isinstance(column, str) else " to ".join(dict.fromkeys((column[0], column[-1])))


def _checked(table: Table, rules: RowRules) -> pa.Table:
    """The rows of a table as ``SCHEMA`` has them."""
    for name, value in rules.keep_rows.items():
        keep = [i for i, cell in enumerate(table.columns[name]) if cell == value]
        table = table.select(keep)
    table, column = with_labels(table, rules)
    bad = incomplete_rows(table, rules.text_columns, column, rules.pair)
    if bad and rules.bad_rows == "error":
        more = f" (and {len(bad) - 1} more such rows up to {table.unit} {table.rows[-1]})" if len(bad) > 1 else ""
        raise UserError(f"{bad[min(bad)]}{more}; correct it, or leave such rows out with data.bad_rows=drop")
    rows = zip(*(table.columns[name] for name in rules.text_columns), strict=True)
    texts = [row_text(row, rules.pair) for row in rows]
    sides = [(text, None) if isinstance(text, str) else text for text in texts]
    labels = [
        None if i in bad else json.dumps(cell) if isinstance(cell, list) else _cell_text(cell)
        for i, cell in enumerate(table.columns[column])
    ]
    digests = [hashlib.sha256("\0".join(filter(None, each)).encode()).digest() for each in sides]
    columns = {"text": [each[0] for each in sides], "text_pair": [each[1] for each in sides], "label": labels}
    columns |= {"row": table.rows, "key": text_keys(texts), "digest": digests}
    return pa.table(columns, SCHEMA)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_lora``, or ``~/.cache/lightning_lora``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_lora"


def cached(folder: Path, content: str, write: Callable[[Path], None], read: Callable[[Path], T]) -> tuple[T, bool]:
    """What ``read`` gives of an Arrow file, which ``write`` makes where it is not there; and whether it was there.

    A file is there whole or not there at all. One that is damaged, so that ``read`` fails, is made again.

    Args:
        folder: Where it is kept.
        content: All that decides what it holds.
        write: Makes it.
        read: Reads it.

    Raises:
        UserError: The cache cannot be written; or as ``write``.
    """
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.arrow"
    unusable = (OSError, ValueError, KeyError)
    with suppress(*unusable):
        return read(path), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(path.parent, None):  # processes of one run begin together, and need the same
            with suppress(*unusable):
                return read(path), True
            remove_partial(path.parent)
            with atomic_path(path) as staging:
                write(staging)
        return read(path), False
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {path} ({error.strerror or error}); set another folder"
        ) from error
