"""Files of this machine and of any filesystem that fsspec knows, by one name."""

import glob
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError, first_line
from lightning_lora.locations import PACKAGE_PREFIX, resolve


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
