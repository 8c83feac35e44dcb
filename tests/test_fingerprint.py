"""The fingerprint of code against what Python really imports, and against edits of a copy of the package."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.fingerprint import import_closure
from lightning_lora.runs.folder import TRAINS

PACKAGE = Path(lightning_lora.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., str]:
    """Copies the package, applies an edit, and computes the copy's fingerprint."""
    shutil.copytree(PACKAGE, tmp_path / "lightning_lora", ignore=shutil.ignore_patterns("__pycache__", "*.so"))

    def fingerprint(*modules: str, edited: str | None = None, appended: str = "CHANGED = 1", docs: bool = False) -> str:
        if edited is not None:
            path = tmp_path / "lightning_lora" / f"{edited}.py"
            text = path.read_text()
            path.write_text(text.replace('"""', '"""Another summary. ', 1) if docs else f"{text}\n{appended}\n")
        spec = importlib.util.spec_from_file_location("copied", tmp_path / "lightning_lora" / "fingerprint.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.code_fingerprint(*modules)

    return fingerprint


def test_ignores_docstrings_and_comments(copy: Callable[..., str]) -> None:
    before = copy(*TRAINS)
    assert copy(*TRAINS, edited="evaluation/documents", docs=True) == before
    assert copy(*TRAINS, edited="seeding", appended="# a comment") == before


@pytest.mark.parametrize(
    "name",
    ["evaluation/documents", "seeding", "data/labels", "models/methods", "training/saving", "training/length"],
)
def test_changes_with_code_that_trains(copy: Callable[..., str], name: str) -> None:
    assert copy(*TRAINS) != copy(*TRAINS, edited=name)


def test_ignores_code_that_does_not_train(copy: Callable[..., str]) -> None:
    assert copy(*TRAINS) == copy(*TRAINS, edited="reports/tables")


@pytest.mark.parametrize("name", ["data/labels", "seeding"])
def test_splits_depend_on_labels_and_seeds(copy: Callable[..., str], name: str) -> None:
    assert copy("data.prepare") != copy("data.prepare", edited=name)


def test_covers_every_module_that_is_imported() -> None:
    script = (
        "import sys, lightning_lora.data.prepare\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('lightning_lora.')), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    imported = {Path(name) for name in done.stdout.split() if not name.endswith("__init__.py")}
    assert len(imported) > 5
    assert imported <= set(import_closure("data.prepare"))
