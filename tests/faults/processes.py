"""Runs of ``main.py`` as processes that can be killed, forked from one that has imported everything."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.processes", "lightning_lora.commands.fit"])


class Run:
    """One ``main.py`` with its words, in a process of its own.

    Args:
        words: What stands after ``main.py``.
        output: Where standard output and error go.
        hook: Called in the process before it begins, with ``argument``; where faults are put in.
        argument: What the hook is called with.
        environment: Added to the environment.
    """

    def __init__(
        self,
        words: list[str],
        output: Path,
        hook: Callable[[int], None] | None = None,
        argument: int = 0,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.output = output
        arguments = (words, str(output), str(Path.cwd()), hook, argument, {**os.environ, **(environment or {})})
        self.process = _CONTEXT.Process(target=_main, args=arguments)
        self.started = time.monotonic()
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit status; of a process that a signal ended, less than 0."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Sends a signal."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def text(self) -> str:
        """What it has said."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        """Returns when something has happened, or the process has ended."""
        end = time.monotonic() + seconds
        while not happened() and self.process.is_alive():
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)


def _main(
    words: list[str],
    output: str,
    folder: str,
    hook: Callable[[int], None] | None,
    argument: int,
    environment: dict[str, str],
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # as a shell would start it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    from lightning_lora.cli import main
    from lightning_lora.training import saving

    torch.set_num_threads(1)
    saving.SHARE = 1e9  # a state after every step: more writes to be killed in
    if hook is not None:
        hook(argument)
    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def kill_in_write(count: int) -> None:
    """The process dies in the middle of the ``count``-th checkpoint it writes."""
    import torch

    save, left = torch.save, [count]

    def half(checkpoint: object, file: object) -> None:
        import io

        left[0] -= 1
        if left[0]:
            save(checkpoint, file)
            return
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])  # type: ignore[attr-defined]
        file.flush()  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def kill_in_rotation(count: int) -> None:
    """The process dies between the two renames that make the ``count``-th state the newest."""
    replace, left = Path.replace, [count]

    def counted(self: Path, target: Path) -> Path:
        if self.name == "last-next.ckpt":
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = counted  # type: ignore[method-assign,assignment]


def kill_at_the_end(count: int) -> None:
    """The process dies when training has ended, before its record says so."""
    from lightning_lora.runs.checkpoints import ResumePoints

    del count
    ResumePoints.tidy = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]


def few_steps(number: int) -> None:
    """So many optimizer steps are enough where the number of epochs is left open."""
    from lightning_lora.training import length

    length.ENOUGH_STEPS = number


def slow_steps(milliseconds: int) -> None:
    """Each training step takes longer, so that a signal finds it under way."""
    from lightning_lora.training.module import TextClassifier

    step = TextClassifier.training_step

    def slow(self: TextClassifier, *args: object) -> object:
        time.sleep(milliseconds / 1000)
        return step(self, *args)

    TextClassifier.training_step = slow  # type: ignore[method-assign,assignment]


def kill_in_rows(count: int) -> None:
    """The process dies in the middle of the ``count``-th piece of rows that it adds to an output of many files."""
    import pyarrow.parquet as pq

    from lightning_lora.inference import many_files

    many_files.CHUNK_ROWS = 16
    write, left = pq.ParquetWriter.write_table, [count]

    def half(self: pq.ParquetWriter, table: object, *args: object) -> None:
        write(self, table, *args)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    pq.ParquetWriter.write_table = half
