"""Many Parquet files, and an output file for each of them: there whole or not at all, made once.

A task is one input file and its output. An output says in its own metadata what it was made from, so the files
themselves are the only record of what is done: no list beside them can be lost or be wrong.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_lora.data.labels import few
from lightning_lora.data.reading import Table
from lightning_lora.data.sources import is_data
from lightning_lora.errors import UserError, first_line, print_warnings
from lightning_lora.inference.input_rows import InputRows
from lightning_lora.inference.output import output_columns

#: Where an output's metadata says what it was made from.
METADATA_KEY = b"lightning_lora.predict"
#: Rows that are read at a time: enough to make batches of like length; twice as many are all that memory holds.
CHUNK_ROWS = 8192
#: The same in bytes, for long texts and wide tables.
CHUNK_BYTES = 1 << 26


class RefusedError(UserError):
    """A file cannot be predicted as it is; others can."""


@dataclass(frozen=True)
class FileTask:
    """One input file and what becomes of it.

    Args:
        source: The input file.
        output: The output file.
        rows: Rows of both.
        stamp: What identifies this input file: its size and the hash of its footer, which holds the place, size and
            bounds of every column.
        columns: Columns of the output, as ``output_columns`` gives them.
    """

    source: Path
    output: Path
    rows: int
    stamp: Mapping[str, Any]
    columns: Mapping[str, str | None]


def is_many(given: str | None) -> bool:
    """Whether an --input stands for a folder or a pattern of files, and not for one file."""
    if given is None or given == "-":
        return False
    place = Path(given).expanduser()
    return place.is_dir() or (glob.has_magic(given) and not place.is_file())


def find_files(given: str, output: Path) -> list[Path]:
    """Returns the Parquet files of a folder (not of those in it), or of a pattern such as ``in/*.parquet``, by name.

    What lies in the output folder is none of a pattern's: such as ``data/*/*.parquet`` into ``data/labels``.

    Raises:
        UserError: There are none, or some that are no Parquet files.
    """
    place = Path(given).expanduser()
    pattern = f"{glob.escape(str(place))}/*.parquet" if place.is_dir() else str(place)
    matching = [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207  # Path has no absolute one
    files = sorted(path for path in matching if place.is_dir() or path.resolve().parent != output.resolve())
    if not files:
        raise UserError(f"--input: no file matches '{pattern}'")
    for path in files:
        if path.suffix.lower() != ".parquet" or not path.is_file():
            raise UserError(f"--input: '{path}' matches, but only .parquet files are read together; narrow the pattern")
    there = sorted(place.iterdir()) if place.is_dir() else []
    if others := [path.name for path in there if is_data(path) and path not in files]:
        print_warnings([f"--input: left out {few(others)}, as only .parquet files of a folder are read"])
    return files


def plan_files(files: Sequence[Path], output: Path, text_columns: Sequence[str], new: Sequence[str]) -> list[FileTask]:
    """Returns the task of each file, whose outputs get new columns; only their metadata is read.

    Raises:
        UserError: A file cannot be read, or lacks a column; two have one name; or the outputs would lie among the
            inputs.
    """
    resolved = output.resolve()
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"--output: {output} is a file; for many input files a folder is needed")
    for folder in {path.resolve().parent for path in files}:
        if resolved == folder or folder in resolved.parents:
            raise UserError(f"--output: {output} lies in the folder of the input, {folder}; give one beside it")
    name, count = Counter(path.name for path in files).most_common(1)[0]
    if count > 1:
        both = [str(path) for path in files if path.name == name]
        raise UserError(f"--input: {both[0]} and {both[1]} would have the same output, {name}; give one folder")
    tasks = []
    for path in files:
        with reading(path), pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        for column in text_columns:
            if column not in schema.names:
                there = ", ".join(schema.names)
                raise UserError(f"{path}: no column '{column}'; it has: {there:.200}. Set --text_column")
        columns = output_columns(schema.names, text_columns, new, path)
        for column in text_columns:
            if not _holds_texts(kind := schema.field(column).type):
                raise UserError(f"{path}: column '{column}' holds {kind}, but texts are needed. Set --text_column")
        tasks.append(FileTask(path, output / path.name, metadata.num_rows, input_stamp(path, metadata), columns))
    return tasks


def _holds_texts(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(kind) for check in checks)


def input_stamp(path: Path, metadata: Any) -> dict[str, Any]:
    """Returns the stamp of an input file: see ``FileTask``."""
    with path.open("rb") as file:
        file.seek(-(metadata.serialized_size + 8), 2)
        return {"footer": hashlib.sha256(file.read()).hexdigest(), "bytes": file.tell()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes one line, of a ``RefusedError``, of what pyarrow or the system says of a file that cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def read_rows(
    task: FileTask, text_columns: Sequence[str], columns: Sequence[str] | None = None, pair: bool = False
) -> Iterator[InputRows]:
    """Yields the rows of an input file in order, of all columns or some, about ``CHUNK_ROWS`` at a time.

    Raises:
        RefusedError: The file cannot be read, or is another one than when the task was planned.
    """
    first = 1
    # Page by page: by default whole row groups, which may be the whole file, are held.
    with reading(task.source), pq.ParquetFile(task.source, buffer_size=1 << 20, pre_buffer=False) as file:
        if input_stamp(task.source, file.metadata) != task.stamp:
            raise RefusedError(f"{task.source} has changed since the command started; start it again")
        for chunk in _chunks(file, columns):
            numbers = range(first, first + chunk.num_rows)
            values: dict[str, Any] = dict(zip(chunk.column_names, chunk.columns, strict=True))
            yield InputRows.of(Table(str(task.source), values, numbers), text_columns, pair)
            first += chunk.num_rows


def _chunks(file: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    batches = list[pa.RecordBatch]()
    for batch in file.iter_batches(min(CHUNK_ROWS, 1024), columns=columns):
        batches.append(batch)
        if sum(b.num_rows for b in batches) >= CHUNK_ROWS or sum(b.nbytes for b in batches) >= CHUNK_BYTES:
            yield pa.Table.from_batches(batches)
            batches = []
    if batches:
        yield pa.Table.from_batches(batches)


def finished(task: FileTask, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what a task's output says of itself, or None where it is not there.

    Raises:
        UserError: It was made by something else, from another input or with other settings.
    """
    if not task.output.exists():
        return None
    try:
        metadata = pq.read_metadata(task.output).metadata or {}
        stamp = json.loads(metadata[METADATA_KEY])
        source, made_with = stamp["input"], stamp["settings"]
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise UserError(f"--output: {task.output} is there and was not made by predict; give another folder") from None
    if source != task.stamp:
        raise UserError(
            f"--output: {task.output} was made from another {task.source.name} than {task.source}; remove it to "
            "make it again, or give another folder"
        )
    for key in sorted({*settings, *made_with}):
        was, now = made_with.get(key), settings.get(key)
        if was != now:
            raise UserError(
                f"--output: {task.output} was made with {key} '{was!s:.60}', not '{now!s:.60}'; give another folder, "
                "or remove what is in this one"
            )
    return dict(stamp)
