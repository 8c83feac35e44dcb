"""Runs commands of this program in processes of their own that begin at once: what they import is there already."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

#: Seconds that an interrupted command has to save its state before it is interrupted again.
PATIENCE_S = 30


def run_child(commands: list[list[str]], output: Path, environment: Mapping[str, str] | None = None) -> int:
    """Runs commands one after another in one process until one fails; gives its exit status, or 0.

    Args:
        commands: The words of each.
        output: What they say is added to this file.
        environment: Added to its environment.

    Raises:
        KeyboardInterrupt: It was interrupted; the process has ended by itself and left its record.
    """
    process = child_context().Process(target=_main, args=(commands, str(output), dict(environment or {})))
    process.start()
    try:
        process.join()
    except BaseException as error:
        # Ctrl-C reaches the process by itself; anything else that ends this one has to be passed on.
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        if number == signal.SIGTERM and process.pid is not None:
            os.kill(process.pid, number)
        while True:
            process.join(PATIENCE_S)
            if process.exitcode is not None:
                raise
            if process.pid is not None:
                os.kill(process.pid, number)
    status = process.exitcode or 0
    if status in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    return status


def child_context() -> Any:
    """How processes of this program begin: forked from one that has imported it, or anew where there is a GPU."""
    import torch

    # A process that is forked cannot use a GPU which its parent has touched, and importing libraries may touch it.
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_lora.experiments.preloaded"])
    return context


def end_with_the_parent() -> None:
    """A killed parent passes no signal on: this process then asks itself to save and stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _main(commands: list[list[str]], output: str, environment: dict[str, str]) -> None:
    from lightning_lora.cli import main

    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    status = 0
    for words in commands:
        print("$ python main.py", *words, flush=True)
        status = main(words)
        if status:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
