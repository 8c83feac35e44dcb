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
        tree = ast.dump(_without_docstrings(ast.parse(path.read_bytes())))
        digest.update(f"{path.relative_to(root)}\0{tree}\0".encode())
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
            waiting += (_file(root, parts) for parts in _imports(ast.parse(path.read_bytes())))
    return sorted(found)


def _file(root: Path, parts: list[str]) -> Path | None:
    """Return the file of a module; None where the parts name something else, such as a function."""
    path = root.joinpath(*parts)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if parts and p.is_file()), None)


def _imports(tree: ast.Module) -> Iterator[list[str]]:
    """Yield dotted names within the package that a file imports; the last part may be a module, function or class."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, *parts = name.split(".")
            if package == _PACKAGE:
                yield parts


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return tree
