"""What ``predict`` writes and prints: the input's text as it came, the new columns, the input's other columns."""

import csv
import io
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_lora.errors import UserError, first_line
from lightning_lora.files import atomic_path
from lightning_lora.runs.folder import plain
from lightning_lora.tasks import Task

OUTPUTS = (".csv", ".jsonl", ".parquet")
#: Classes whose probabilities the printed table shows, at most.
SHOWN_CLASSES = 4
#: Columns of the terminal that the text needs; where the table would leave fewer, classes are left out.
_TEXT_WIDTH = 16


def new_columns(names: Sequence[str], task: Task = "single_label") -> pa.Schema:
    """Returns the columns that an output has beside those of its input, as ``InputRows.predicted`` names them."""
    if task == "regression":
        return pa.schema([("prediction", pa.float64())])
    several = task == "multi_label"
    numbers = [*([] if several else ["probability"]), *(f"p({name})" for name in names)]
    kind = pa.list_(pa.string()) if several else pa.string()
    return pa.schema([("prediction", kind), *((number, pa.float64()) for number in numbers)])


def output_columns(
    names: Sequence[str], text_columns: Sequence[str], new: Sequence[str], origin: object
) -> dict[str, str | None]:
    """Returns the columns of an output in their order, each with the input's column that it holds, None if new.

    An input's column that has the name of a new one, as in an earlier output, is kept as NAME_input.

    Raises:
        UserError: Two columns of the input have one name.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{origin}: column '{name}' is duplicated; rename one")

    def kept(name: str) -> str:
        free = name
        while free in new or (free != name and free in names):
            free += "_input"
        return free

    texts = {kept(name): name for name in text_columns}
    others = {kept(name): name for name in names if name not in text_columns}
    return {**texts, **dict.fromkeys(new), **others}


def warn_of_renamed(columns: Iterable[Mapping[str, str | None]]) -> None:
    """Says on standard error which columns of the inputs have other names in their outputs."""
    pairs = {(name, kept): None for each in columns for kept, name in each.items() if name not in (None, kept)}
    if pairs:
        shown = ", ".join(f"'{name}' as '{kept}'" for name, kept in pairs)
        print(f"warning: columns of the input that have the name of a new one are kept: {shown}", file=sys.stderr)


def columns_beside(
    columns: Mapping[str, Any], text_columns: Sequence[str], new: Sequence[str], ending: str, origin: object
) -> dict[str, Any]:
    """Returns the columns of an output in their order: those of the input as they are written, None for each new one.

    Raises:
        UserError: Two columns of the input have one name, or the format (".csv", ".jsonl" or ".parquet") cannot hold
            one, which is better said before anything is predicted.
    """
    names = output_columns([*columns], text_columns, new, origin)
    found: dict[str, Any] = dict.fromkeys(names)
    for name, source in names.items():
        if source is None:
            continue
        values = columns[source]
        is_arrow = isinstance(values, pa.ChunkedArray)
        try:
            if ending == ".parquet":
                found[name] = values if is_arrow else pa.array(values)
            else:
                found[name] = values.to_pylist() if is_arrow else values
                as_text({name: found[name]}, ending).encode()
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:  # Unicode errors are ValueErrors
            better = ".parquet" if is_arrow else ".jsonl"
            raise UserError(
                f"--output: {ending} cannot hold column '{name}' ({first_line(error)}); write {better}"
            ) from None
    warn_of_renamed([names])
    return found


def write_output(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> None:
    """Writes columns, the new ones by their schema, in the format of the file's ending, whole or not at all."""
    ending = path.suffix.lower()
    with atomic_path(path) as staging:
        if ending == ".parquet":
            typed = {field.name: pa.array(columns[field.name], field.type) for field in schema}
            pq.write_table(pa.table({**columns, **typed}), staging)
        else:
            staging.write_text(as_text(columns, ending), encoding="utf-8", newline="")


def as_text(columns: Mapping[str, Any], ending: str) -> str:
    """Returns the columns as CSV (lists and objects as JSON) or as JSON Lines."""
    rows = zip(*columns.values(), strict=True)
    if ending == ".csv":
        out = io.StringIO()
        # Only a cell with a sign of the line's end is quoted, and readers take "\r" for one too (Python 3.11).
        writer = csv.writer(out, lineterminator="\r\n")
        for row in ([*columns], *([_csv_cell(value) for value in row] for row in rows)):
            writer.writerow(row)
            out.seek(out.tell() - 2)
            out.truncate()
            out.write("\n")
        return out.getvalue()
    lines = [_json(plain(dict(zip(columns, row, strict=True)))) + "\n" for row in rows]
    # UTF-8 cannot hold half of a surrogate pair; JSON can, as \ud800.
    return "".join(lines).encode(errors="backslashreplace").decode()


def separated(cells: Sequence[list[str] | None], names: Sequence[str], separator: str) -> list[Any]:
    """Returns lists of labels as texts that ``data.label_separator`` reads; as they are where a name holds it."""
    if any(separator in name for name in names):
        return list(cells)
    return [cell if cell is None else separator.join(cell) for cell in cells]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return value
    return _json(value) if isinstance(value, bool | list | dict) else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def print_table(columns: Mapping[str, Any], texts: Sequence[str] = ("text",)) -> None:
    """Prints the rows, texts first: these are cut to the terminal, and classes left out where there is no room."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(markup=False, highlight=False, emoji=False)
    cells = {name: [_shown(value) for value in values] for name, values in columns.items()}
    widths = [max(map(cell_len, [name, *values])) + 3 for name, values in cells.items() if name not in texts]
    if len(widths) > 2 + SHOWN_CLASSES or console.width - sum(widths) - 4 < _TEXT_WIDTH * len(texts):
        cells = {name: cells[name] for name in (*texts, "prediction", "probability") if name in cells}
    table = RichTable(box=box.ROUNDED)
    for name in cells:
        number = isinstance(next(iter(columns[name]), ""), float)
        is_text = name in texts or (name == "prediction" and not number)
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in zip(*cells.values(), strict=True):
        shown = [Text(text, no_wrap=True, overflow="ellipsis") for text in row[: len(texts)]]
        table.add_row(*shown, *row[len(texts) :])
    console.print(table)


def _shown(value: Any) -> str:
    """Returns a cell without what a terminal would obey, such as escape sequences, or cannot show."""
    if value is None or isinstance(value, float):
        return "" if value is None else f"{value:.4f}"
    value = ", ".join(value) if isinstance(value, list) else value
    spaced = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in value)
    return " ".join("".join(spaced).encode(errors="replace").decode().split())
