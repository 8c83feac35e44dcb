"""What ``predict`` writes and prints: the input's text as it came, the new columns, the input's other columns."""

import csv
import io
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_lora.errors import UserError, first_line
from lightning_lora.files import atomic_path

OUTPUTS = (".csv", ".jsonl", ".parquet")
#: Classes whose probabilities the printed table shows, at most.
SHOWN_CLASSES = 4
#: Columns of the terminal that the text needs; where the table would leave fewer, each row is a paragraph.
_TEXT_WIDTH = 16


def new_columns(names: Sequence[str]) -> pa.Schema:
    """The columns that an output has beside those of its input, as ``InputRows.predicted`` names them.

    Args:
        names: Names of the classes.
    """
    numbers = ("probability", *(f"p({name})" for name in names))
    return pa.schema([("prediction", pa.string()), *((number, pa.float64()) for number in numbers)])


def output_columns(
    names: Sequence[str], text_columns: Sequence[str], new: Sequence[str], origin: object
) -> dict[str, str | None]:
    """The columns of an output in their order, each with the name of the input's column that it holds, None if new.

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


def checked_columns(columns: Mapping[str, Any], ending: str) -> dict[str, Any]:
    """The input's columns as they will be written: what the format cannot hold is known before anything is done.

    Args:
        columns: The columns, by name.
        ending: Of the output: ".csv", ".jsonl" or ".parquet".

    Raises:
        UserError: The format cannot hold a column.
    """
    found: dict[str, Any] = {}
    for name, values in columns.items():
        is_arrow = isinstance(values, pa.ChunkedArray)
        try:
            if ending == ".parquet":
                found[name] = values if is_arrow else pa.array(values)
            else:
                found[name] = values.to_pylist() if is_arrow else values
                ({".csv": as_csv, ".jsonl": as_jsonl}[ending])({name: found[name]}).encode()
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:  # Unicode errors are ValueErrors
            better = ".parquet" if is_arrow else ".jsonl"
            raise UserError(
                f"--output: {ending} cannot hold column '{name}' ({first_line(error)}); write {better}"
            ) from None
    return found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes one line of what the system says against writing an output.

    Raises:
        UserError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror or error})") from error


def write_output(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> None:
    """Writes the columns in the format of the file's ending, whole or not at all.

    Args:
        path: The file.
        columns: The new columns and those of the input.
        schema: Of the new ones.
    """
    with writing(path), atomic_path(path) as staging:
        if path.suffix.lower() == ".parquet":
            typed = {field.name: pa.array(columns[field.name], field.type) for field in schema}
            pq.write_table(pa.table({**columns, **typed}), staging)
        else:
            content = as_csv(columns) if path.suffix.lower() == ".csv" else as_jsonl(columns)
            staging.write_text(content, encoding="utf-8", newline="")


def as_csv(columns: Mapping[str, Any]) -> str:
    """The columns as CSV, heading first; lists and objects as JSON."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv_cell(value) for value in row] for row in zip(*columns.values(), strict=True))
    return out.getvalue()


def as_jsonl(columns: Mapping[str, Any]) -> str:
    """The columns as JSON Lines."""
    return "".join(_json(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True))


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return value
    return _json(value) if isinstance(value, bool | list | dict) else _plain(value)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    # Half of a surrogate pair can only be written as JSON has it, \ud800.
    return text if text.isascii() or _encodes(text) else json.dumps(value, default=_plain)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def print_table(columns: Mapping[str, Any]) -> None:
    """Prints the rows to the terminal: texts are shortened to its width, probabilities never."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, highlight=False, emoji=False)
    names = [name for name in columns if name != "text"]
    if len(names) > 2 + SHOWN_CLASSES:
        names = names[:2]
    cells = {name: [_shown(value) for value in columns[name]] for name in names}
    texts = [_one_line(text) for text in columns["text"]]
    taken = sum(max(map(cell_len, [name, *cells[name]])) + 3 for name in names) + 4
    if (room := console.width - taken) < _TEXT_WIDTH:
        for i, text in enumerate(texts):
            console.print(_shortened(text, console.width))
            line = "  " if cells["prediction"][i] else "  no prediction"
            for part in (f"{name} {cells[name][i]}  " for name in names if cells[name][i]):
                if line.strip() and cell_len(line + part.rstrip()) > console.width:
                    console.print(line.rstrip())
                    line = "  "
                line += part
            console.print(line.rstrip())
        return
    table = RichTable(box=box.ROUNDED)
    table.add_column("text", no_wrap=True)
    for name in names:
        table.add_column(name, justify="left" if name == "prediction" else "right", no_wrap=True)
    for i, text in enumerate(texts):
        table.add_row(_shortened(text, room), *(cells[name][i] for name in names))
    console.print(table)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else _one_line(value)


def _one_line(text: str | None) -> str:
    """The text without what a terminal would obey, such as escape sequences, or cannot show."""
    spaced = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text or "")
    return " ".join("".join(spaced).encode(errors="replace").decode().split())


def _shortened(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
