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

from lightning_lora.errors import UserError, first_line
from lightning_lora.inference.output import output_columns

#: Where an output's metadata says what it was made from.
METADATA_KEY = b"lightning_lora.predict"
_READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class FileTask:
    """One input file and what becomes of it.

    Args:
        source: The input file.
        output: The output file.
        rows: Rows of both.
        stamp: What identifies this input file: its size, rows and the hash of its footer, which holds the
            place, size and bounds of every column.
        columns: Columns of the output, as ``output_columns`` gives them.
    """

    source: Path
    output: Path
    rows: int
    stamp: Mapping[str, Any]
    columns: Mapping[str, str | None]


def find_files(given: str, output: Path) -> list[Path]:
    """The Parquet files of a folder (not of those in it), or of a pattern such as ``in/*.parquet``; sorted by name.

    What lies in the output folder is none of a pattern's: such as ``data/*/*.parquet`` into ``data/labels``.

    Raises:
        UserError: There are none, or some that are no Parquet files.
    """
    place = Path(given).expanduser()
    if place.is_dir():
        files = [path for path in place.iterdir() if _is_parquet(path) and not path.name.startswith(".")]
        if not files:
            there = ", ".join(sorted(path.name for path in place.iterdir())[:5]) or "nothing"
            raise UserError(f"--input: no .parquet files in {place} (it holds {there})")
        return sorted(files)
    matching = [Path(name) for name in glob.glob(str(place), recursive=True)]  # noqa: PTH207  # Path has no absolute one
    files = [path for path in matching if path.resolve().parent != output.resolve()]
    if not files:
        raise UserError(f"--input: no file matches '{given}'")
    for path in files:
        if not _is_parquet(path):
            raise UserError(f"--input: '{path}' matches, but only .parquet files are read together; narrow the pattern")
    return sorted(files)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" and path.is_file()


def is_many(given: str | None) -> bool:
    """Whether an --input stands for a folder or a pattern of files, and not for one file."""
    if given is None or given == "-":
        return False
    place = Path(given).expanduser()
    return place.is_dir() or (glob.has_magic(given) and not place.is_file())


def plan_files(files: Sequence[Path], output: Path, text_columns: Sequence[str], new: Sequence[str]) -> list[FileTask]:
    """Return the task of each file; only their metadata is read.

    Args:
        files: The input files.
        output: The folder of the outputs.
        text_columns: Columns that every file must have.
        new: Columns that the outputs get.

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
    twice = [name for name, count in Counter(path.name for path in files).items() if count > 1]
    if twice:
        both = [str(path) for path in files if path.name == twice[0]]
        raise UserError(f"--input: {both[0]} and {both[1]} would have the same output, {twice[0]}; give one folder")
    return [_plan_file(path, output / path.name, text_columns, new) for path in files]


def _plan_file(path: Path, output: Path, text_columns: Sequence[str], new: Sequence[str]) -> FileTask:
    with reading(path):
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
        stamp = input_stamp(path, rows)
    for column in text_columns:
        if column not in names:
            raise UserError(f"{path}: no column '{column}'; it has: {', '.join(names):.200}. Set --text_column")
    return FileTask(path, output, rows, stamp, output_columns(names, text_columns, new, path))


def holds_texts(kind: pa.DataType) -> bool:
    """Whether the cells of an Arrow type are texts, or all null."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(kind) for check in checks)


def rows_without_prediction(task: FileTask) -> tuple[int, list[str]]:
    """How many rows of an output have no prediction, and the places of the first in its input."""
    with pq.ParquetFile(task.output) as file:
        column = file.schema_arrow.names.index("prediction")  # before any column of several leaves
        groups = [file.metadata.row_group(i).column(column).statistics for i in range(file.num_row_groups)]
        if not any(group is None or group.null_count for group in groups):
            return 0, []
        null = file.read(columns=["prediction"]).column(0).is_null().to_numpy().nonzero()[0]
    return len(null), [f"{task.source}, row {i + 1}" for i in null[:3]]


def input_stamp(path: Path, rows: int) -> dict[str, Any]:
    """The stamp of an input file: see ``FileTask``."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        return {"bytes": size, "rows": rows, "footer": hashlib.sha256(file.read(length)).hexdigest()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes one line of what pyarrow says of a damaged file, or the system of one that it cannot read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def output_schema(task: FileTask, source: pa.Schema, new: pa.Schema, stamp: Mapping[str, Any]) -> pa.Schema:
    """The columns of an output, new and those of its input, and its stamp."""
    fields = [source.field(n).with_name(name) if n else new.field(name) for name, n in task.columns.items()]
    return pa.schema(fields, {METADATA_KEY: json.dumps(stamp, sort_keys=True).encode()})


def read_pieces(file: pq.ParquetFile, rows: int, size: int) -> Iterator[pa.Table]:
    """The file's rows in order, in tables of about so many rows, or fewer where they take more than so many bytes."""
    batches: list[pa.RecordBatch] = []
    for batch in file.iter_batches(batch_size=min(rows, 1024)):
        batches.append(batch)
        if sum(b.num_rows for b in batches) >= rows or sum(b.nbytes for b in batches) >= size:
            yield pa.Table.from_batches(batches)
            batches = []
    if batches:
        yield pa.Table.from_batches(batches)


def open_flat(path: Path) -> pq.ParquetFile:
    """The file, to be read page by page: by default whole row groups, which may be the whole file, are held."""
    return pq.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False)


def is_done(task: FileTask, settings: Mapping[str, Any]) -> bool:
    """Return whether the task's output is there, made from this input with these settings.

    Raises:
        UserError: There is another one.
    """
    if not task.output.exists():
        return False
    try:
        with pq.ParquetFile(task.output) as file:
            metadata, rows = file.schema_arrow.metadata or {}, file.metadata.num_rows
            names = file.schema_arrow.names
        stamp = json.loads(metadata[METADATA_KEY])
        source, made_with = stamp["input"], stamp["settings"]
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise UserError(f"--output: {task.output} is there and was not made by predict; give another folder") from None
    if source != task.stamp or rows != task.rows:
        raise UserError(
            f"--output: {task.output} was made from another {task.source.name} than {task.source}; remove it to "
            "make it again, or give another folder"
        )
    for key in sorted({*settings, *made_with}):
        was, now = made_with.get(key), settings.get(key)
        if was != now:
            raise UserError(
                f"--output: {task.output} was made with {key} {_short(was)}, not {_short(now)}; give another folder, "
                "or remove what is in this one"
            )
    if names != [*task.columns]:  # by a version that named them otherwise
        raise UserError(
            f"--output: {task.output} has the columns {', '.join(names):.100}, not {', '.join(task.columns):.100}; "
            "give another folder, or remove what is in this one"
        )
    return True


def _short(value: Any) -> str:
    return f"'{value!s:.60}'"
