"""Rows as they stand in a local CSV, TSV, JSON Lines, Parquet or Arrow file.

Files are read strictly and by their row: a fault is reported with file, line and column, where generic
loaders guess a type, turn text such as ``NA`` into a missing value, or fail without a place.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from lightning_lora.data.encoding import decode
from lightning_lora.errors import UserError, first_line, print_warnings

#: What to do with a file that is not read, by its ending.
REMEDIES = dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV (UTF-8)")
REMEDIES |= dict.fromkeys((".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "unpack it")


@dataclass
class Table:
    """Chosen columns of one file or split, with the place of each row.

    Args:
        origin: The file or the Hub id and split, for messages.
        columns: Equally long lists by column name, values as they stand in the source.
        rows: 1-based number of each row as a person would look it up.
        unit: What ``rows`` counts: "line" of a text file, or "row" of a table.
        label_names: Class names that the source itself declares for its label column, if any.
        warnings: What a reader of the rows should know of how they were read.
    """

    origin: str
    columns: dict[str, list[Any]]
    rows: Sequence[int]
    unit: str = "row"
    label_names: list[str] | None = None
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int, column: str) -> str:
        """The place of a cell in words: file, line or row, column."""
        return f"{self.origin}, {self.unit} {self.rows[index]}, column '{column}'"

    def select(self, keep: Sequence[int]) -> "Table":
        """The rows at the given positions, in that order."""
        columns = {name: [values[i] for i in keep] for name, values in self.columns.items()}
        return replace(self, columns=columns, rows=[self.rows[i] for i in keep])


class MissingColumnError(UserError):
    """A file lacks a column; ``what`` says which, and the message also which settings name columns.

    Args:
        what: The file, the column and those that are there.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. Set data.text_column and data.label_column")
        self.what = what


def read_file(
    path: Path,
    columns: Sequence[str],
    label_column: str | None = None,
    whole: bool = False,
    encoding: str | None = None,
) -> Table:
    """The chosen columns of one local file, its format taken from its ending.

    Args:
        path: The file.
        columns: The columns to read; all must exist.
        label_column: The one of them that holds labels.
        whole: Read every column, in its order after those (of Parquet and Arrow as Arrow arrays, so that types are
            kept); a field that a JSON record lacks is then null.
        encoding: That of a text file that is not UTF-8.
    """
    reader = READERS.get(format_of(path))
    if reader is None:
        raise unknown_ending(path)
    try:
        table = reader(path, columns, label_column, whole, encoding)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not len(table):
        raise UserError(f"{path}: holds no rows")
    return table


def unknown_ending(path: Path) -> UserError:
    """The error of a file that no reader is for."""
    remedy = "; " + REMEDIES[path.suffix.lower()] if path.suffix.lower() in REMEDIES else ""
    return UserError(f"{path}: unknown ending '{format_of(path)}'; readable are {', '.join(READERS)}{remedy}")


def format_of(path: Path) -> str:
    """The ending that tells a file's format: that of "train.CSV.gz" is ".csv.gz"."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() + ending if ending == ".gz" else ending


def require_columns(have: Sequence[str], wanted: Sequence[str], origin: object) -> None:
    """Refuses columns of which some wanted one is not there, or there twice.

    Raises:
        UserError: It is so.
    """
    for column in wanted:
        if list(have).count(column) > 1:
            raise UserError(f"{origin}: column '{column}' is duplicated; rename one")
        if column not in have:
            hint = ""
            if len(have) == 1 and (";" in have[0] or "\t" in have[0]):
                hint = " (it seems to be separated by semicolons or tabs: save it with commas, or as .tsv)"
            there = ", ".join(str(name).replace("\0", "\\0") for name in have)
            raise MissingColumnError(f"{origin}: no column '{column}'; it has: {there:.200}{hint}")


def read_text(path: Path, encoding: str | None = None) -> str:
    """The content of a text file; if it is not UTF-8, a warning says so.

    Raises:
        UserError: Its encoding is not certain; the line is named.
    """
    text, warnings = _text(path, encoding)
    print_warnings(warnings)
    return text


def _text(path: Path, stated: str | None) -> tuple[str, list[str]]:
    """The content of a text file, which may be compressed by gzip, and what should be known of how it was read."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged, or not whole ({first_line(error)})") from error
    text, encoding = decode(data, path, stated)
    return text, [f"{path} is not UTF-8; read as {encoding}"] if encoding != "utf-8" else []


def _read_delimited(
    path: Path, columns: Sequence[str], label_column: str | None, whole: bool, encoding: str | None
) -> Table:
    del label_column  # a text file declares no class names
    csv.field_size_limit(2**31 - 1)
    separator = "\t" if format_of(path).startswith(".tsv") else ","
    text, warnings = _text(path, encoding)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines: list[int] = []
    start = 1
    try:
        header = next(reader, [])
        columns = list(dict.fromkeys([*columns, *(header if whole else ())]))
        require_columns(header, columns, path)
        values: dict[str, list[Any]] = {name: [] for name in columns}
        places = [(values[name], header.index(name)) for name in columns]
        start = reader.line_num + 1
        for record in reader:
            if record:
                if len(record) != len(header):
                    raise UserError(
                        f"{path}, line {start}: {len(record)} fields, but the header has {len(header)} "
                        f"({separator.join(header)}); put a text that holds '{separator}' in double quotes"
                    )
                for column, place in places:
                    column.append(record[place])
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        fault = "a double quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        raise UserError(f"{path}, line {start}: {fault}; write a double quote inside a quoted text twice") from None
    return Table(str(path), values, lines, "line", warnings=warnings)


def _read_json(
    path: Path, columns: Sequence[str], label_column: str | None, whole: bool, encoding: str | None
) -> Table:
    del label_column
    text, warnings = _text(path, encoding)
    unit, records = "line", []
    if text.lstrip().startswith("["):
        unit = "record"
        try:
            records = list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        except RecursionError:
            raise UserError(f"{path}: nested too deeply to be rows") from None
    else:
        # Only \n ends a line of JSON Lines; splitlines() would also cut at U+2028 inside a text.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not a JSON object ({error.msg})") from None
                except RecursionError:
                    raise UserError(f"{path}, line {number}: nested too deeply to be a row") from None
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{path}, {unit} {number}: a JSON object with fields is needed, got {record!r:.60}")
        if not whole:
            require_columns(list(record), columns, f"{path}, {unit} {number}")
    if whole and records:
        there = list(dict.fromkeys(name for _, record in records for name in record))
        require_columns(there, columns, path)
        columns = list(dict.fromkeys([*columns, *there]))
    values = {name: [record.get(name) for _, record in records] for name in columns}
    return Table(str(path), values, [number for number, _ in records], unit, warnings=warnings)


def _read_parquet(
    path: Path, columns: Sequence[str], label_column: str | None, whole: bool, encoding: str | None
) -> Table:
    del encoding  # it is no text file
    with open_parquet(path, columns, path) as file:
        have = file.schema_arrow.names
        require_columns(have, have if whole else (), path)
        table = file.read(columns=None if whole else list(columns))
        names = declared_names(file.schema_arrow, label_column)
    return _arrow_table(path, table, () if whole else columns, names)


def _read_arrow(
    path: Path, columns: Sequence[str], label_column: str | None, whole: bool, encoding: str | None
) -> Table:
    del encoding  # it is no text file
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            feather = source.read(6) == b"ARROW1"  # what datasets writes is a stream
            source.seek(0)
            reader = pa.ipc.open_file(source) if feather else pa.ipc.open_stream(source)
            have = reader.schema.names
            require_columns(have, [*columns, *(have if whole else ())], path)
            table = reader.read_all().select(have if whole else list(columns))
            return _arrow_table(path, table, () if whole else columns, declared_names(reader.schema, label_column))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Arrow file ({first_line(error)})") from None


def _arrow_table(path: Path, table: Any, columns: Sequence[str], names: list[str] | None) -> Table:
    others = {name: table.column(name) for name in table.column_names if name not in columns}
    values = {name: cells(table.column(name)) for name in columns} | others
    return Table(str(path), values, range(1, table.num_rows + 1), "row", names)


def cells(column: Any) -> list[Any]:
    """The values of an Arrow column as text formats have them.

    0.1 in four bytes is 0.1, a decimal is a number, and text that is not UTF-8 is given as its bytes.
    """
    import pyarrow as pa

    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        column = column.cast(pa.float32()).cast(pa.string()).cast(pa.float64())
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        return [_text_or_bytes(cell) for cell in column.cast(pa.binary()).to_pylist()]
    return [float(cell) if isinstance(cell, Decimal) else cell for cell in values]


def _text_or_bytes(cell: bytes | None) -> str | bytes | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return cell


@contextmanager
def open_parquet(source: Any, columns: Sequence[str], origin: object, **options: Any) -> Iterator[Any]:
    """The ``pyarrow.parquet.ParquetFile`` of a path or of an open file, which has the columns.

    Raises:
        UserError: It is none or lacks a column; or what is read of it within the block is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source, **options) as file:
            require_columns(file.schema_arrow.names, columns, origin)
            yield file
    except pa.ArrowInvalid as error:
        raise UserError(f"{origin}: not a readable Parquet file ({first_line(error)})") from None


def declared_names(schema: Any, label_column: str | None) -> list[str] | None:
    """Class names in the Parquet metadata that ``datasets`` writes, if they are there."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(label_column) or {}
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None


#: A file format is one entry: ending -> reader(path, columns, label_column, whole, encoding).
READERS: dict[str, Callable[[Path, Sequence[str], str | None, bool, str | None], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
READERS |= {f"{ending}.gz": READERS[ending] for ending in (".csv", ".tsv", ".jsonl", ".ndjson", ".json")}
