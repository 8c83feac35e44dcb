"""Files and folders that are either there whole or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends well the file is flushed to disk and takes ``path``'s place.

    It is staged in the same folder, so that the last step is a rename within one filesystem. When the
    block fails, what stood at ``path`` before still stands there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=path.suffix)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.chmod(0o666 & ~_umask())  # mkstemp makes files for their owner only
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well it takes ``path``'s place in one step.

    When another process was first with the same content, its folder stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield staging
        # mkdtemp makes a folder for its owner only, and some libraries do so with files.
        for part in (staging, *staging.rglob("*")):
            part.chmod((0o777 if part.is_dir() else 0o666) & ~_umask())
        try:
            staging.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file."""
    with atomic_path(path) as staging:
        staging.write_text(text, encoding="utf-8")
