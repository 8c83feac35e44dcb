"""Processes for several devices, but for what needs several (``tests/faults/test_several.py``)."""

import os
import signal

import pytest

from lightning_lora.errors import UserError
from lightning_lora.training import parallel


def test_a_process_whose_launcher_was_killed_while_it_imported_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is another process by then, which stays alive."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setenv(parallel._LAUNCHER, "1" if os.getppid() != 1 else "2")
    parallel._end_with_launcher()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_tasks_of_slurm_that_are_not_as_many_as_the_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch job without srun would train on one of its devices."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    with pytest.raises(UserError, match="2 devices, but SLURM has 1 tasks; start with srun --ntasks=2"):
        parallel.run_processes(["fit"], 2, 1)
