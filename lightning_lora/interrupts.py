"""Signals that ask a run to stop, which training obeys at the end of its step; SLURM's requeue."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """The run was asked to stop, and has; not an error, so not an ``Exception``.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        #: The exit status that shells give a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM.
        self.status = 128 + number


class StopRequest:
    """Takes the signals of a run.

    While ``deferred`` a signal is kept until ``deliver`` is called, and a second one ends the run at once; otherwise
    the first one does. Once delivered, more of them are passed over.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.number: int | None = None
        self._taken: list[int] = []
        self._ending = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals within the block: Ctrl-C, SIGTERM, and a scheduler's warning that time is up."""
        if threading.current_thread() is threading.main_thread():  # no other may take signals
            self._taken = [signal.SIGINT, signal.SIGTERM]
            if job_id() is not None:  # elsewhere SIGUSR1 means what it always means
                self._taken.append(signal.SIGUSR1)
        before = {number: signal.getsignal(number) for number in self._taken}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals (again: Lightning puts its own handlers in place when training begins)."""
        for number in self._taken:
            signal.signal(number, self._handle)

    def deliver(self, number: int) -> None:
        """End the run, if it was asked to by this signal; 0 for none.

        Raises:
            Interrupted: ``number`` is a signal.
        """
        if number:
            self._ending = True  # what is left is to write down that the run was ended: no signal ends that
            raise Interrupted(number)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self._ending:
            return
        if not self.deferred or self.number is not None:
            raise Interrupted(number)
        self.number = number
        print(f"\n{signal.Signals(number).name}: stopping after this step (again: at once)", file=sys.stderr)


def job_id() -> str | None:
    """Return the SLURM job that this process belongs to, as ``scontrol`` names it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return job if job and re.fullmatch(r"\d+(_\d+)?", job) else None


def requeued() -> bool:
    """Whether SLURM has started this job again."""
    return job_id() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def requeue() -> str:
    """Put this SLURM job back into the queue; return what was done, in words."""
    job = str(job_id())
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued ({error})"
    return f"job {job} is requeued" if done.returncode == 0 else f"job {job} was not requeued: {done.stderr.strip()}"
