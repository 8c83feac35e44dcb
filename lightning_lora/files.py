"""Files and folders that are either there whole or not there at all."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lightning_lora.errors import BusyError, UserError

#: Seconds between two attempts at what another process holds.
POLL_S = 0.5
#: What the system says when a place cannot take a file; anything else is a fault of the program.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_PARTIAL = re.compile(r"\.partial-(?P<host>[\w\-]+)-(?P<pid>\d+)-")


@contextmanager
def atomic_path(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well the file is flushed to disk and takes ``path``'s place.

    It is staged in the same folder, so that the last step is a rename within one filesystem. When the
    block fails, what stood at ``path`` before still stands there.

    Args:
        path: The place.
        needed: Bytes that will be written, for the message, where they are known.

    Raises:
        UserError: There is no room for it, or no right to write there.
    """
    with _staging(path, needed) as staging:
        staging.touch(exist_ok=False)
        yield staging
        staging.chmod(0o666 & ~_umask())  # some libraries make files for their owner only
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it takes ``path``'s place in one step.

    What killed processes of this machine have left half-filled beside it is removed.

    Raises:
        FileExistsError: It is there, or another process was first.
        UserError: There is no room for it, or no right to write there.
    """
    with _staging(path, None) as staging:
        remove_partial(path.parent)
        if path.exists():
            raise FileExistsError(str(path))  # an empty folder would be replaced
        staging.mkdir()
        yield staging
        for part in staging.rglob("*"):
            part.chmod((0o777 if part.is_dir() else 0o666) & ~_umask())
            if part.is_file():
                _flush(part)
        try:
            staging.rename(path)
        except OSError as error:
            raise FileExistsError(str(path)) if path.exists() else error from None


@contextmanager
def _staging(path: Path, needed: int | None) -> Iterator[Path]:
    """Yield where a file or folder is written before it takes its place; nothing is left there.

    The path is known before anything is made, so that a signal at that moment leaves nothing.
    """
    name = f".partial-{_host()}-{os.getpid()}-{path.name[:60]}-{uuid.uuid4().hex[:8]}{path.suffix}"
    staging = path.with_name(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        _flush(path.parent)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        parts = [staging, *staging.rglob("*")] if staging.exists() else []
        written = sum(part.stat().st_size for part in parts if part.is_file())
        raise UserError(_cannot_write(path, error, needed, written)) from error
    finally:
        _remove(staging)


def remove_partial(folder: Path, any_host: bool = False) -> None:
    """Remove what killed processes of this machine have left half-written in a folder.

    Args:
        folder: The folder.
        any_host: Those of other machines too: for a folder that only this process may write to.
    """
    for path in folder.glob(".partial-*"):
        if (found := _PARTIAL.match(path.name)) is None:
            continue
        here = found["host"] == _host()
        if not psutil.pid_exists(int(found["pid"])) if here else any_host:
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, message: str | None) -> Iterator[None]:
    """Hold a folder for this process; a lock that a killed process held is free again.

    Args:
        folder: The folder.
        message: What to say where another process holds it; without one its end is waited for.

    Raises:
        BusyError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock on a folder
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if message is not None else 0))
        except BlockingIOError:
            raise BusyError(message) from None
        except OSError:  # a filesystem without locks
            pass
        yield
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Refuse a folder that takes no files, before time is spent on what is to be written there.

    Raises:
        UserError: A file cannot be written into the folder.
    """
    path = folder / f".writable-{uuid.uuid4().hex}"  # of this process alone
    with atomic_path(path) as staging:
        staging.write_text("x")
    path.unlink()


def refusal(error: OSError) -> str | None:
    """Return what to say of a place that could not take a file, when a library wrote it; None for other faults."""
    if error.errno not in _REFUSED or error.filename is None:
        return None
    return _cannot_write(Path(os.fsdecode(error.filename)), error, None, 0)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file."""
    content = text.encode()
    with atomic_path(path, len(content)) as staging:
        staging.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file for people to read; not-a-numbers are refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def size_text(count: float) -> str:
    """Return a number of bytes for people: "1.4 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _cannot_write(path: Path, error: OSError, needed: int | None, written: int) -> str:
    wanted = f"{size_text(needed)} are needed" if needed is not None else f"more than {size_text(written)} are needed"
    room = ""
    with contextlib.suppress(OSError):
        room = f", {size_text(shutil.disk_usage(path.parent).free)} are free"
    return f"{path} cannot be written: {error.strerror or error} ({wanted}{room}); earlier files are as they were"


def _host() -> str:
    return re.sub(r"[^\w\-]", "_", socket.gethostname())[:40] or "host"


def _flush(path: Path) -> None:
    """Make a file, or a rename in a folder, outlive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
