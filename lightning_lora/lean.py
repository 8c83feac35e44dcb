"""Imports without what libraries load only to have it: a second and a half of each start, and 130 MB."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
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


class StandIn(ModuleType):
    """What a module is taken for while others are imported; whoever uses it later uses the module itself.

    Args:
        name: Of the module.
        names: What is asked of it while others are imported.
    """

    def __init__(self, name: str, **names: Any) -> None:
        super().__init__(name)
        vars(self).update(names)
        self._names = list(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or sys.modules.get(self.__name__) is self:  # what the import system asks; unforeseen
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)

    def step_aside(self) -> None:
        """Knows nothing of itself any more."""
        for name in self._names:
            vars(self).pop(name, None)


@contextmanager
def standing_in(*modules: StandIn) -> Iterator[None]:
    """Importing any of the modules gives what stands in for it, if it is not there; later it gives the module."""
    missing = [module for module in modules if module.__name__ not in sys.modules]
    sys.modules.update({module.__name__: module for module in missing})
    try:
        yield
    finally:
        for module in missing:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
            package, _, name = module.__name__.rpartition(".")
            if vars(sys.modules.get(package, module)).get(name) is module:
                delattr(sys.modules[package], name)
            module.step_aside()


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when the function is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call


class LaterClass(type):
    """A class that is asked only what is an instance of it, of which the class of that name in its module decides."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, getattr(import_module(cls.__module__), cls.__name__))


class LaterStyle(ContextDecorator):
    """matplotlib's style, from when it is entered on."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.entered: list[Any] = []

    def __enter__(self) -> None:
        self.entered.append(import_module("matplotlib.pyplot").style.context(*self.args))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def without_pictures_and_signals() -> AbstractContextManager[None]:
    """torchmetrics 1.9 can draw, and gives scipy.signal back a name that one audio package looks for."""

    def asked(module: str, name: str) -> StandIn:
        return StandIn(module, **{name: LaterClass(name, (), {"__module__": module})})

    axes, colors = asked("matplotlib.axes", "Axes"), asked("matplotlib.colors", "Colormap")
    pyplot = StandIn("matplotlib.pyplot", Figure=object, style=SimpleNamespace(context=LaterStyle))
    matplotlib = StandIn("matplotlib", axes=axes, colors=colors, pyplot=pyplot)
    signal = StandIn("scipy.signal", hamming=None)
    if "matplotlib" in sys.modules or find_spec("scienceplots"):  # all of it or nothing
        return standing_in(signal)
    return standing_in(matplotlib, axes, colors, pyplot, signal)


def without_assignment() -> AbstractContextManager[None]:
    """transformers 5.23 loads the losses of all models, of which those that find objects in pictures need scipy."""
    name = "linear_sum_assignment"
    return standing_in(StandIn("scipy.optimize", **{name: later("scipy.optimize", name)}))


#: In what a module's code is run when it is imported.
LEAN: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "bitsandbytes": compiling_later,
    "torchmetrics": without_pictures_and_signals,
    "transformers.loss.loss_utils": without_assignment,
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
