"""Parquet files of this machine and of any filesystem that fsspec knows, by one name, read in batches."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_lora.data.reading import Table, cells, declared_names, open_parquet
from lightning_lora.errors import UserError, first_line
from lightning_lora.locations import PACKAGE_PREFIX, resolve

_BATCH_ROWS = 1024


def is_url(name: str) -> bool:
    """Whether a name is that of a file on an fsspec filesystem: ``s3://bucket/key``, ``memory://...``."""
    return "://" in name


def matching(place: str) -> list[str]:
    """The names of the files that a file, a folder or a pattern stands for, local or on an fsspec filesystem, sorted.

    Raises:
        UserError: There are none, or the filesystem does not answer.
    """
    key = "data.source.train"
    if is_url(place):
        filesystem, path = file_system(place, key)
        try:
            path = f"{path.rstrip('/')}/*.parquet" if filesystem.isdir(path) else path
            found = [filesystem.unstrip_protocol(name) for name in filesystem.glob(path)]
        except Exception as error:  # each filesystem has exceptions of its own
            raise UserError(f"{key}: {place} cannot be listed ({first_line(error)})") from error
    elif place.startswith(PACKAGE_PREFIX):
        found = [str(resolve(place, key).path)]
    else:
        path = str(Path(place).expanduser())
        # A file whose name looks like a pattern is that file.
        found = [path] if Path(path).is_file() else []
        pattern = str(Path(glob.escape(path)) / "*.parquet") if Path(path).is_dir() else path
        found = found or [name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]  # noqa: PTH207
    if not found:
        where = "" if is_url(place) else f" (looked in {Path.cwd()})"
        raise UserError(f"{key}: no file matches '{place}'{where}; give a Parquet file, a folder or a pattern of them")
    return sorted(found)


def file_system(url: str, where: str) -> tuple[Any, str]:
    """The filesystem of a file, and the file's path on it.

    Raises:
        UserError: There is none of that protocol, or its package is missing.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # a protocol that nobody knows, a package that is missing, credentials
        raise UserError(f"{where}: '{url}' cannot be reached ({first_line(error)})") from error


def version_of(name: str) -> str:
    """What changes when a file does.

    Raises:
        UserError: There is no such file, or the filesystem does not answer.
    """
    try:
        if is_url(name):
            filesystem, path = file_system(name, name)
            return str(filesystem.ukey(path))
        status = Path(name).stat()
    except UserError:
        raise
    except Exception as error:  # each filesystem has exceptions of its own
        raise UserError(f"{name}: cannot be read ({first_line(error)})") from error
    return f"{Path(name).resolve()}/{status.st_size}/{status.st_mtime_ns}"


def parquet_batches(name: str, columns: Sequence[str], label_column: str) -> Iterator[Table]:
    """The rows of a Parquet file, a thousand at a time.

    Raises:
        UserError: It cannot be read, is damaged or lacks a column.
    """
    row = 1
    with ExitStack() as stack:
        try:
            source: Any = name
            if is_url(name):
                filesystem, path = file_system(name, name)
                source = stack.enter_context(filesystem.open(path, "rb"))
            # Far away a row group is fetched at once, in few requests; near by, what is read is enough.
            file = stack.enter_context(open_parquet(source, columns, name, pre_buffer=is_url(name)))
            names = declared_names(file.schema_arrow, label_column)
            batches = file.iter_batches(_BATCH_ROWS, columns=list(columns))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{name}: cannot be read ({first_line(error)})") from error
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # of Arrow, or of whatever the filesystem is made by
                raise UserError(f"{name}, row {row} or after: damaged ({first_line(error)})") from error
            if batch is None:
                return
            values = {column: cells(batch.column(column)) for column in columns}
            yield Table(name, values, range(row, row + len(batch)), label_names=names)
            row += len(batch)
