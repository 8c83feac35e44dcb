"""Rows as they stand in a CSV, TSV, JSON Lines, Parquet or Arrow file.

Files are read strictly and by their row: a fault is reported with file, line and column, where generic
loaders guess a type, turn text such as ``NA`` into a missing value, or fail without a place.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError, first_line

#: Rows of a Parquet file or Hub split that are read together.
BATCH_ROWS = 1024
#: What to do with a file that is not read, by its ending.
REMEDIES = dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV (UTF-8)")
REMEDIES |= dict.fromkeys((".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "unpack it")
#: Byte order marks; UTF-32 first, as its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass
class Table:
    """Columns of one file or split, with the place of each row.

    Args:
        origin: The file or the Hub id and split, for messages.
        columns: Equally long lists by column name, values as they stand in the source.
        rows: 1-based number of each row as a person would look it up.
        unit: What ``rows`` counts: "line" of a text file, or "row" of a table.
        class_names: Names of the classes that the source itself declares, by column.
    """

    origin: str
    columns: dict[str, Any]
    rows: Sequence[int]
    unit: str = "row"
    class_names: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int, column: str) -> str:
        """The place of a cell in words: file, line or row, column."""
        return f"{self.origin}, {self.unit} {self.rows[index]}, column '{column}'"

    def select(self, keep: Sequence[int]) -> "Table":
        """The rows at the given positions, in that order."""
        columns = {name: [values[i] for i in keep] for name, values in self.columns.items()}
        return replace(self, columns=columns, rows=[self.rows[i] for i in keep])


def read_tables(name: str, columns: Sequence[str], whole: bool = False, encoding: str | None = None) -> Iterator[Table]:
    """Yields the rows of a file in tables, those of a Parquet file a thousand at a time.

    Args:
        name: The file; a Parquet file may be on any filesystem that fsspec knows. Its ending says its format.
        columns: The columns to read; all must exist.
        whole: Read all columns, in one table (of Parquet and Arrow as Arrow arrays, so that types are kept). A field
            that a JSON record lacks is then null.
        encoding: That of a text file that is not UTF-8.
    """
    reader = READERS.get(format_of(Path(name)))
    if reader is None:
        ending = Path(name).suffix.lower()
        remedy = f"; {REMEDIES[ending]}" if ending in REMEDIES else ""
        raise UserError(f"{name}: unknown ending '{format_of(Path(name))}'; readable are {', '.join(READERS)}{remedy}")
    try:
        yield from reader(name, columns, whole, encoding)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error


def read_file(path: Path, columns: Sequence[str], encoding: str | None = None) -> Table:
    """All columns of one file that has rows and these columns, as by ``read_tables``."""
    (table,) = read_tables(str(path), columns, whole=True, encoding=encoding)
    if not len(table):
        raise UserError(f"{path}: holds no rows")
    return table


def format_of(path: Path) -> str:
    """The ending that tells a file's format: that of "train.CSV.gz" is ".csv.gz"."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() + ending if ending == ".gz" else ending


def require_columns(have: Sequence[str], wanted: Sequence[str], origin: object) -> None:
    """Refuses a file that lacks one of the wanted columns, or has one twice."""
    for column in wanted:
        if list(have).count(column) > 1:
            raise UserError(f"{origin}: column '{column}' is duplicated; rename one")
        if column not in have:
            there = ", ".join(str(name).replace("\0", "\\0") for name in have)
            raise UserError(
                f"{origin}: no column '{column}'; it has: {there:.200}. Set data.text_column and data.label_column (in "
                "predict --text_column), and separate columns by commas, not semicolons"
            )


def read_text(path: Path, encoding: str | None = None) -> str:
    """The content of a text file, which may be compressed by gzip.

    UTF-8 is recognized, and UTF-16 and UTF-32 with a byte order mark; only other files are read by ``encoding``.
    """
    try:
        b"a".decode(encoding or "utf-8")
    except (LookupError, ValueError):
        raise UserError(f"data.encoding: Python knows none '{encoding}'; give one such as cp1252 or gb18030") from None
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged, or not whole ({first_line(error)})") from error
    found = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    for name in (found, encoding) if encoding else (found,):
        try:
            return data.decode(name)
        except UnicodeDecodeError as error:
            at, wrong = error.start, name.upper()
    line = data.count(b"\n", 0, at) + 1
    raise UserError(
        f"{path}, line {line}: byte 0x{data[at]:02x} is not {wrong} text; save the file as UTF-8, or set "
        "data.encoding to its encoding, such as cp1252 (of Windows in Western Europe) or gb18030 (Chinese)"
    )


def _read_delimited(name: str, columns: Sequence[str], whole: bool, encoding: str | None) -> Iterable[Table]:
    csv.field_size_limit(2**31 - 1)
    separator = "\t" if format_of(Path(name)).startswith(".tsv") else ","
    text = read_text(Path(name), encoding)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines: list[int] = []
    start = 1
    try:
        header = next(reader, [])
        unnamed = [i for i, column in enumerate(header) if not column] if header.count("") > 1 else []
        wanted = [column for column in header if column or not unnamed] if whole else columns
        require_columns(header, [*columns, *wanted], name)
        values: dict[str, list[Any]] = {column: [] for column in wanted}
        places = [(cells, header.index(column)) for column, cells in values.items()]
        start = reader.line_num + 1
        for record in reader:
            if record:
                if len(record) != len(header):
                    raise UserError(
                        f"{name}, line {start}: {len(record)} fields, but the header has {len(header)} "
                        f"({separator.join(header)}); put a text that holds '{separator}' in double quotes"
                    )
                if whole and any(record[i] for i in unnamed):  # empty ones, as a spreadsheet leaves, are left out
                    raise UserError(
                        f"{name}, line {start}: {len(unnamed)} columns have no name; name them, or empty them"
                    )
                for cells, place in places:
                    cells.append(record[place])
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        fault = "a double quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        raise UserError(f"{name}, line {start}: {fault}; write a double quote inside a quoted text twice") from None
    return [Table(name, values, lines, "line")]


def _read_json(name: str, columns: Sequence[str], whole: bool, encoding: str | None) -> Iterable[Table]:
    text = read_text(Path(name), encoding)
    if text.lstrip().startswith("["):
        unit, records = "record", list(enumerate(_parsed(text, name, 1), start=1))
    else:
        # Only \n ends a line of JSON Lines; splitlines() would also cut at U+2028 inside a text.
        lines = enumerate(text.split("\n"), start=1)
        unit, records = "line", [(number, _parsed(line, name, number)) for number, line in lines if line.strip()]
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{name}, {unit} {number}: a JSON object with fields is needed, got {record!r:.60}")
        if not whole:
            require_columns(list(record), columns, f"{name}, {unit} {number}")
    if whole:
        there = list(dict.fromkeys(column for _, record in records for column in record))
        require_columns(there, columns if records else (), name)
        columns = there
    values = {column: [record.get(column) for _, record in records] for column in columns}
    return [Table(name, values, [number for number, _ in records], unit)]


def _parsed(text: str, name: str, line: int) -> Any:
    """The value of JSON text that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {line + error.lineno - 1}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{name}, line {line}: nested too deeply to be a row") from None


def _read_arrow(name: str, columns: Sequence[str], whole: bool, encoding: str | None) -> Iterable[Table]:
    del encoding  # it is no text file
    import pyarrow as pa

    row = 1
    try:
        with _opened(name) as (schema, read):
            require_columns(schema.names, [*columns, *(schema.names if whole else ())], name)
            if whole:
                table = pa.Table.from_batches(read(schema.names), schema)
                yield Table(name, dict(zip(schema.names, table.columns, strict=True)), range(1, len(table) + 1))
                return
            for table in arrow_tables(name, schema, read(list(columns))):
                yield table
                row += len(table)
    except UserError:
        raise
    except Exception as error:  # of Arrow, or of whatever the filesystem is made by
        kind = format_of(Path(name)).removeprefix(".").capitalize()
        raise UserError(f"{name}: not a readable {kind} file, from row {row} on ({first_line(error)})") from error


@contextmanager
def _opened(name: str) -> Iterator[tuple[Any, Callable[[list[str]], Iterable[Any]]]]:
    """The schema of a Parquet or Arrow file, and what reads the batches of given columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if format_of(Path(name)) == ".parquet":
        filesystem, path = file_system(name) if "://" in name else (None, name)
        # Far away a row group is fetched as a whole, in few requests; near by, what is read is enough.
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=filesystem is not None) as file:
            yield file.schema_arrow, lambda columns: file.iter_batches(BATCH_ROWS, columns=columns)
        return
    with pa.memory_map(name) as source:
        feather = source.read(6) == b"ARROW1"  # what datasets writes is a stream
        source.seek(0)
        reader = pa.ipc.open_file(source) if feather else pa.ipc.open_stream(source)
        yield reader.schema, lambda columns: reader.read_all().select(columns).to_batches()


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a file such as ``s3://bucket/key``, and the file's path on it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # a protocol that nobody knows, a package that is missing, credentials
        raise UserError(f"data.source: '{url}' cannot be reached ({first_line(error)})") from error


def arrow_tables(origin: str, schema: Any, batches: Iterable[Any]) -> Iterator[Table]:
    """Yields a table for each Arrow batch.

    Args:
        origin: The file or Hub split.
        schema: That of all its columns; class names stand in its metadata, as ``datasets`` writes them.
        batches: The rows.
    """
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    # Of a list of labels those of the labels in it.
    inner = {n: each[0] if isinstance(each, list) else each.get("feature", each) for n, each in features.items()}
    declared = {name: each["names"] for name, each in inner.items() if each.get("_type") == "ClassLabel"}
    row = 1
    for batch in batches:
        values = {name: cells(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        yield Table(origin, values, range(row, row + len(batch)), class_names=declared)
        row += len(batch)


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


#: A file format is one entry: ending -> reader(name, columns, whole, encoding).
READERS: dict[str, Callable[[str, Sequence[str], bool, str | None], Iterable[Table]]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}
READERS |= {f"{ending}.gz": READERS[ending] for ending in (".csv", ".tsv", ".jsonl", ".ndjson", ".json")}
