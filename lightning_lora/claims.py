"""Tasks that processes share, on one machine or on several that see one folder: whoever holds a task's lock does it.

A lock dies with its process, so what a killed process has left is done by another one. On a filesystem without locks
nothing is held: two processes may then do the same task.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from lightning_lora.errors import BusyError
from lightning_lora.files import POLL_S, locked_folder

#: The folder, beside what the tasks make, that holds a folder to lock for each task under way.
CLAIMS = ".claims"

Item = TypeVar("Item")


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Hold a task for this process.

    Args:
        folder: The folder that the processes share.
        name: The task's.

    Raises:
        BusyError: Another process holds it.
    """
    claim = folder / CLAIMS / name
    with ExitStack() as stack:
        while True:
            try:
                claim.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked_folder(claim, f"another process holds {name}"))
                break
            except (FileNotFoundError, FileExistsError):  # who held it has just removed it
                continue
        yield
        # While it is held, and only now that the task is done: who gets hold of it later checks that first.
        with contextlib.suppress(OSError):
            claim.rmdir()
            claim.parent.rmdir()


def share_tasks(tasks: Iterable[Item], folder: Path, name: Callable[[Item], str], do: Callable[[Item], None]) -> None:
    """Do the tasks that no other process does, and wait until the others are done.

    Args:
        tasks: All tasks.
        folder: The folder that the processes share.
        name: Gives a task's name.
        do: Does a task that this process holds, or returns at once where it is done already.
    """
    left = list(tasks)
    while left:
        busy = []
        for task in left:
            try:
                with claimed(folder, name(task)):
                    do(task)
            except BusyError:
                busy.append(task)
        if left := busy:
            time.sleep(POLL_S)
