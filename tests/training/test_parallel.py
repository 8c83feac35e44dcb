"""Processes for several devices, but for what needs several (``tests/faults/test_several.py``)."""

import os
import signal

import pytest

from lightning_lora.training import parallel


def test_a_process_whose_launcher_was_killed_while_it_imported_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is another process by then, which stays alive."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setenv(parallel._LAUNCHER, "1" if os.getppid() != 1 else "2")
    parallel._end_with_launcher()
    assert sent == [(os.getpid(), signal.SIGTERM)]
