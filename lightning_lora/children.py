"""Child processes that start fast, as they are forked from one that has imported this program."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from lightning_lora.files import POLL_S
from lightning_lora.program import command_line

#: Seconds that an interrupted process has to save its state before it is interrupted again.
SAVING_PATIENCE_S = 30


def run_child(commands: list[list[str]], output: Path) -> int:
    """Run commands of this program one after another in one process until one fails; return its exit status, or 0.

    Args:
        commands: The arguments of each.
        output: What they print is added to this file.

    Raises:
        KeyboardInterrupt: It was interrupted; the process has ended by itself and left its record.
    """
    (status,) = join_children([start_child(partial(_run_commands, commands), output)])
    if status in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    return status


def start_child(work: Callable[[], int | None], output: Path, environment: Mapping[str, str] | None = None) -> Any:
    """Start a process that calls a function and ends with the status of ``cli.exit_status``.

    Args:
        work: The function; it can be pickled.
        output: What it prints is added to this file.
        environment: Added to this process's environment, which it has.
    """
    context = child_context()
    server = _server_address() if context.get_start_method() == "forkserver" else None
    process = context.Process(target=_main, args=(work, str(output), {**os.environ, **(environment or {})}, server))
    process.start()
    return process


def join_children(processes: Sequence[Any], watch: Callable[[], None] = lambda: None) -> list[int]:
    """Wait for processes and return their exit statuses; an exception is raised again once all have ended.

    Args:
        processes: As ``start_child`` returns them.
        watch: Called again and again in the meantime.
    """
    try:
        while alive := [process.sentinel for process in processes if process.exitcode is None]:
            connection.wait(alive, POLL_S)
            watch()
    except BaseException as error:
        # Ctrl-C reaches the processes by itself; anything else that ends this one has to be passed on.
        interrupt = isinstance(error, KeyboardInterrupt) or getattr(error, "number", None) == signal.SIGINT
        number = signal.SIGINT if interrupt else signal.SIGTERM
        pass_on = not interrupt
        while alive := [process for process in processes if process.exitcode is None]:
            for process in alive if pass_on else []:
                os.kill(process.pid, number)
            end = time.monotonic() + SAVING_PATIENCE_S
            for process in alive:
                process.join(max(0.0, end - time.monotonic()))
            pass_on = True
        raise
    return [process.exitcode for process in processes]


def last_error(output: str, status: int) -> str:
    """Return the error that a process has printed last, or its status where it has printed none."""
    errors = [line[7:] for line in output.splitlines() if line.startswith("error: ")]
    return errors[-1] if errors else f"ended with status {status}"


@cache
def start_server() -> None:
    """Start the server that processes are forked from, where there is one: it imports while this process does, too."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        # Asked in another way, the driver would start, and no process that is forked from there could use a GPU.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        forkserver.set_forkserver_preload(["lightning_lora.experiments.preloaded"])
        with _without_interrupts():  # by Ctrl-C, which reaches the server too, and would show where its imports were
            forkserver._forkserver.ensure_running()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore SIGINT, as do processes that are started meanwhile; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def child_context() -> Any:
    """Return how processes start: forked from one that has imported this program, or spawned where that cannot be."""
    import torch

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    start_server()
    context = multiprocessing.get_context("forkserver")
    forked = "ensure_running" in vars(forkserver._forkserver)  # this process itself, and its parent has tried
    if torch.cuda.is_available() and not forked and not _forked_can_use_gpu():
        return multiprocessing.get_context("spawn")
    return context


def _server_address() -> str | None:
    """Where the server listens that processes are forked from; None where another process cannot use it."""
    server = forkserver._forkserver
    return None if hasattr(server, "_forkserver_authkey") else getattr(server, "_forkserver_address", None)


def _join_server(address: str) -> None:
    """Have what this process starts forked from the server that it was forked from itself.

    CPython means to do so, but starts another server (python/cpython#86354), which imports all again: some ten seconds
    for each worker of an ablation.
    """
    server: Any = forkserver._forkserver
    server._forkserver_address, server.ensure_running = address, lambda: None


@cache
def _forked_can_use_gpu() -> bool:
    """Try whether a forked process can use the GPU: not where a library that is imported before has touched it."""
    process = multiprocessing.get_context("forkserver").Process(target=_use_gpu)
    process.start()
    process.join()
    return process.exitcode == 0


def _use_gpu() -> None:
    import torch

    try:
        torch.zeros(1, device="cuda")
    except Exception:  # of the driver, or of torch that knows that it was forked
        sys.exit(1)


def _end_with_parent() -> None:
    """Have this process save and stop when its parent is killed, which passes no signal on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _main(work: Callable[[], int | None], output: str, environment: dict[str, str], server: str | None) -> None:
    import torch

    from lightning_lora.cli import exit_status

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    os.environ.clear()
    os.environ.update(environment)
    if server is not None:
        _join_server(server)
    threads = os.environ.get("OMP_NUM_THREADS", "")  # which is read when torch is imported, in the server
    if threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(exit_status(work))


def _run_commands(commands: list[list[str]]) -> int:
    from lightning_lora.cli import main

    for argv in commands:
        print("$", command_line(*argv), flush=True)
        if status := main(argv):
            return status
    return 0
