"""A public class or constant has a name of its own, so that a search for it finds one thing."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lightning_lora"


def defined(path: Path) -> Iterator[str]:
    """Public classes and constants of a module; functions may share a name, such as each command's ``run``."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def test_no_two_modules_define_one_name() -> None:
    found = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        if path.name != "__init__.py":
            for name in defined(path):
                found[name].append(str(path.relative_to(ROOT)))
    assert len(found) > 100
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
