"""Files and folders that are either there whole or not there at all."""

import contextlib
import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from lightning_lora.errors import BusyError, UserError

#: Seconds between two attempts at what another process holds.
POLL_S = 0.5
#: What the system says when a place cannot take a file; anything else is a fault of the program.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_PARTIAL = re.compile(r"\.partial-(?P<host>[\w\-]+)-(?P<pid>\d+)-")


@contextmanager
def atomic_path(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A path to write to; when the block ends well the file is flushed to disk and takes ``path``'s place.

    It is staged in the same folder, so that the last step is a rename within one filesystem. When the
    block fails, what stood at ``path`` before still stands there.

    Args:
        path: The place.
        needed: Bytes that will be written, for the message, where they are known.

    Raises:
        UserError: There is no room for it, or no right to write there.
    """
    staging = _staging_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.touch(exist_ok=False)
        yield staging
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.chmod(0o666 & ~_umask())  # some libraries make files for their owner only
        staging.replace(path)
        _flush(path.parent)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        written = staging.stat().st_size if staging.exists() else 0
        raise UserError(_cannot_write(path, error, needed, written)) from error
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well it takes ``path``'s place in one step.

    What killed processes of this machine have left half-filled beside it is removed.

    Raises:
        FileExistsError: It is there, or another process was first.
        UserError: There is no room for it, or no right to write there.
    """
    staging = _staging_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(path.parent)
        if path.exists():
            raise FileExistsError(str(path))  # an empty folder would be replaced
        staging.mkdir()
        yield staging
        for part in staging.rglob("*"):  # some libraries make files for their owner only
            part.chmod((0o777 if part.is_dir() else 0o666) & ~_umask())
            if part.is_file():
                _flush(part)
        try:
            staging.rename(path)
        except OSError as error:
            raise FileExistsError(str(path)) if path.exists() else error from None
        _flush(path.parent)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        written = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file()) if staging.exists() else 0
        raise UserError(_cannot_write(path, error, None, written)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_partial(folder: Path, any_host: bool = False) -> None:
    """Removes what killed processes of this machine have left half-written in a folder.

    Args:
        folder: The folder.
        any_host: Those of other machines too: for a folder that only this process may write to.
    """
    for path in folder.glob(".partial-*"):
        found = _PARTIAL.match(path.name)
        if found is None or (found["host"] == _host() and psutil.pid_exists(int(found["pid"]))):
            continue
        if found["host"] != _host() and not any_host:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, message: str | None) -> Iterator[None]:
    """Holds a folder for this process; a lock that a killed process held is free again.

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
    """Refuses a folder that takes no files, before time is spent on what is to be written there.

    Raises:
        UserError: As said.
    """
    with atomic_path(folder / "writable") as staging:
        staging.write_text("x")
    (folder / "writable").unlink(missing_ok=True)  # another process may look at the same time


def refusal(error: OSError) -> str | None:
    """What to say of a place that could not take a file, when a library wrote it; None for other faults."""
    if error.errno not in _REFUSED or error.filename is None:
        return None
    return _cannot_write(Path(os.fsdecode(error.filename)), error, None, 0)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file."""
    content = text.encode()
    with atomic_path(path, len(content)) as staging:
        staging.write_bytes(content)


def size_text(count: float) -> str:
    """A number of bytes for people: "1.4 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _cannot_write(path: Path, error: OSError, needed: int | None, written: int) -> str:
    wanted = f"{size_text(needed)} are needed" if needed is not None else f"more than {size_text(written)} are needed"
    room = ""
    with contextlib.suppress(OSError):
        room = f", {size_text(shutil.disk_usage(path.parent).free)} are free"
    return f"{path} cannot be written: {error.strerror or error} ({wanted}{room}); earlier files are as they were"


def _staging_path(path: Path) -> Path:
    """Where a file or folder is written: known before it is made, so that a signal at that moment leaves nothing."""
    return path.with_name(f".partial-{_host()}-{os.getpid()}-{path.name[:60]}-{uuid.uuid4().hex[:8]}{path.suffix}")


def _host() -> str:
    return re.sub(r"[^\w\-]", "_", socket.gethostname())[:40] or "host"


def _flush(path: Path) -> None:
    """Makes a file, or a rename in a folder, outlive a power failure, where the system can."""
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
