"""Imports without what libraries load only to have it: a second of each start, and 70 MB."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def install() -> None:
    """Has the modules in ``LEAN`` imported so from now on; once a process."""
    if not any(isinstance(finder, LeanFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LeanFinder())


@contextmanager
def compiling_later() -> Iterator[None]:
    """``torch.compile`` asks for its compiler not where it is written, but where its result is first called.

    bitsandbytes 0.50 decorates four functions with it, which loads torch's whole compiler.
    """
    import torch

    real = torch.compile

    def later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda function: later(function, **options)
        compiled: list[Any] = []

        @wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(real(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = real


@contextmanager
def without_signal() -> Iterator[None]:
    """``import scipy.signal`` gives a placeholder; nothing keeps it, and the real one can be imported afterwards.

    torchmetrics 1.9 imports it to give it back a name that one audio package looks for.
    """
    name = "scipy.signal"
    if name in sys.modules:
        yield
        return
    placeholder = ModuleType(name)
    placeholder.hamming = None  # type: ignore[attr-defined]  # the name: there is nothing to give back
    sys.modules[name] = placeholder
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        scipy: Any = sys.modules.get("scipy")
        if scipy is not None and vars(scipy).get("signal") is placeholder:
            del scipy.signal


#: In what a module's code is run when it is imported.
LEAN: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "bitsandbytes": compiling_later,
    "torchmetrics": without_signal,
}


class LeanFinder(MetaPathFinder):
    """Finds the modules in ``LEAN`` where they always are."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The usual specification, with a loader that runs the module's code in its context."""
        spec = PathFinder.find_spec(fullname, path) if fullname in LEAN else None
        if spec is not None and spec.loader is not None:
            spec.loader = LeanLoader(spec.loader, LEAN[fullname])
        return spec


class LeanLoader(Loader):
    """A loader that runs a module's code in a context.

    Args:
        loader: The module's own.
        context: Makes the context.
    """

    def __init__(self, loader: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
        self.loader = loader
        self.context = context

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As its own."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As its own, in the context."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # what asks for the module's files finds them as ever
        with self.context():
            self.loader.exec_module(module)
