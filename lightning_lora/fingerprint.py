"""A fingerprint of code: equal while what a module and everything it imports compute is unchanged."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = "lightning_lora"


@cache
def code_fingerprint(*modules: str) -> str:
    """Return a SHA-256 over the syntax trees of the modules and of all modules of this package that they import.

    Docstrings, comments and layout do not count: results do not depend on them.

    Args:
        modules: Dotted names within the package, such as "training.module".
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in import_closure(*modules):
        digest.update(f"{path.relative_to(root)}\0{_read(path)[0]}\0".encode())
    return digest.hexdigest()


def import_closure(*modules: str) -> list[Path]:
    """Return the files of the modules and of all modules of this package that they import, anywhere in a file."""
    root = Path(__file__).parent
    found: set[Path] = set()
    waiting = [_file(root, name.split(".")) for name in modules]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in found:
            found.add(path)
            waiting += (_file(root, parts) for parts in _read(path)[1])
    return sorted(found)


@cache
def _read(path: Path) -> tuple[str, list[list[str]]]:
    """Return a file's syntax tree without docstrings, and what it imports of this package."""
    tree = ast.parse(path.read_bytes())
    names: list[list[str]] = []
    for node in ast.walk(tree):
        names += _imports(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return ast.dump(tree), names


def _file(root: Path, parts: list[str]) -> Path | None:
    """Return the file of a module; None where the parts name something else, such as a function."""
    path = root.joinpath(*parts)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if parts and p.is_file()), None)


def _imports(node: ast.AST) -> Iterator[list[str]]:
    """Yield dotted names within the package that a statement imports; the last may be a function or class."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        package, *parts = name.split(".")
        if package == _PACKAGE:
            yield parts
