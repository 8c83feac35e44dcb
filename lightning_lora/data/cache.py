"""Files that are kept for reuse: made once, also when several processes need the same."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lightning_lora.errors import UserError
from lightning_lora.files import atomic_path, locked_folder, remove_partial

T = TypeVar("T")


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_lora``, or ``~/.cache/lightning_lora``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_lora"


def cached(path: Path, write: Callable[[Path], None], read: Callable[[Path], T]) -> tuple[T, bool]:
    """What ``read`` gives of a file, which ``write`` makes where it is not there; and whether it was there.

    A file is there whole or not there at all. One that is damaged, so that ``read`` fails, is made again.

    Raises:
        UserError: The cache cannot be written; or as ``write``.
    """
    unusable = (OSError, ValueError, KeyError)
    with suppress(*unusable):
        return read(path), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(path.parent, None):  # processes of one run begin together, and need the same
            with suppress(*unusable):
                return read(path), True
            remove_partial(path.parent)
            with atomic_path(path) as staging:
                write(staging)
        return read(path), False
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {path} ({error.strerror or error}); set another folder"
        ) from error
