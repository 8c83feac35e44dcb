"""How child processes start."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lightning_lora import children
from lightning_lora.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("can", "method"), [(True, "forkserver"), (False, "spawn")])
def test_children_are_forked_where_a_forked_process_can_use_the_gpu(
    monkeypatch: pytest.MonkeyPatch, can: bool, method: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(children, "_forked_can_use_gpu", lambda: can)
    assert children.child_context().get_start_method() == method


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="nothing is forked")
def test_a_forked_process_that_cannot_use_a_gpu_says_so() -> None:
    assert children.child_context().get_start_method() == "forkserver"
    assert not children._forked_can_use_gpu()


def write_facts(path: Path) -> None:
    """The process that this one was forked from, its threads, and a variable of its environment."""
    path.write_text(f"{os.getppid()} {torch.get_num_threads()} {os.environ.get('OF_PARENT')}")


def write_facts_of_both(folder: Path) -> None:
    write_facts(folder / "child")
    own = {"OMP_NUM_THREADS": "3"}
    children.join_children([children.start_child(partial(write_facts, folder / "other"), folder / "out.txt", own)])


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="nothing is forked")
def test_a_child_s_children_are_forked_from_the_same_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server would import all again, for each worker."""
    monkeypatch.setenv("OF_PARENT", "1")
    work = partial(write_facts_of_both, tmp_path)
    (status,) = children.join_children([children.start_child(work, tmp_path / "out.txt", {"OMP_NUM_THREADS": "2"})])
    assert status == 0, (tmp_path / "out.txt").read_text()
    (server, *child), (same, *other) = ((tmp_path / name).read_text().split() for name in ("child", "other"))
    assert server == same and child == ["2", "1"] and other == ["3", "1"]


@pytest.mark.parametrize(
    ("command", "starts"),
    [
        ("ablate --config none.yaml", True),
        ("ablate --config none.yaml --plan", False),
        ("compare --help", False),
        ("fit --config none.yaml", False),
        ("fit --config none.yaml --budget 5m", True),
        ("predict --run none --input a --output b --workers=2", True),
    ],
)
def test_the_server_is_started_before_all_else_where_there_will_be_children(
    command: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(children, "start_server", lambda: started.append(True))
    with contextlib.suppress(SystemExit):  # of --help
        assert main(command.split()) == 2
    assert started == [True] * starts


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="nothing is forked")
def test_an_interruption_while_the_server_imports_is_one_line(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal."""
    (tmp_path / "a.yaml").write_text("question: '?'\n")
    words = [sys.executable, str(ROOT / "main.py"), "ablate", "--config", "a.yaml"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    told = ""
    for _ in range(3):  # some library, as it is imported, may swallow the signal; then the config is refused
        with subprocess.Popen(words, cwd=tmp_path, start_new_session=True, **pipes) as process:
            deadline = time.monotonic() + 60
            while not psutil.Process(process.pid).children() and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
            assert process.stdout is not None
            told = process.stdout.read()
            assert told.count("\n") == 1
        if not told.startswith("error: a.yaml: axes"):
            break
    assert told == "interrupted\n" and process.returncode == 130
