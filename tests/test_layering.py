"""Imports point one way, so that each room can be read without the ones after it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_lora"
#: Which rooms a room may import from; modules at the top level (errors, files, ...) serve all.
MAY_IMPORT = {
    "data": set(),
    "models": set(),
    "evaluation": set(),
    "runs": set(),
    "training": {"data", "models", "evaluation", "runs"},
    "config": {"data", "models", "evaluation", "runs", "training"},
    "inference": {"data", "models", "evaluation", "runs", "training", "config", "export"},
    "export": {"data", "models", "evaluation", "runs", "training", "config"},
    "experiments": {"data", "models", "evaluation", "runs", "training", "config"},
    "reports": {"runs", "experiments", "evaluation"},
}
MAY_IMPORT["commands"] = {*MAY_IMPORT}
#: All modules but the public API, which names what lies in any room.
MODULES = sorted({*ROOT.rglob("*.py")} - {ROOT / "__init__.py"})


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_comes_before_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0] if path.parent != ROOT else None
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("lightning_lora.")} & set(MAY_IMPORT)
    allowed = MAY_IMPORT[room] | {room} if room else set()
    assert rooms <= allowed


def test_what_needs_no_torch_imports_none() -> None:
    """In a process of its own, with all that these modules import in turn."""
    names = [
        "cli",
        "runs.folder",
        "evaluation.intervals",
        "evaluation.metric_table",
        "experiments.results",
        "experiments.given_runs",
    ]
    names += [f"reports.{path.stem}" for path in (ROOT / "reports").glob("*.py")] + ["commands.report"]
    code = (
        "import importlib, sys; [importlib.import_module(f'lightning_lora.{name}') for name in sys.argv[1:]]; "
        "print(*sorted({'torch', 'lightning', 'transformers', 'peft', 'datasets', 'torchmetrics'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_room_is_in_the_table() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)
