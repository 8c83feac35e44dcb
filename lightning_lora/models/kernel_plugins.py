"""Kernels for particular processors, from plugins that are installed beside this package.

A plugin is a distribution with an entry point in the group ``lightning_lora.kernels`` that names an object with the
methods of ``KernelPlugin``. ``plugins/amx_kernels`` is one.
"""

from functools import cache
from importlib.metadata import entry_points
from typing import Protocol

from torch import nn

from lightning_lora.errors import UserError
from lightning_lora.models.base import Base

GROUP = "lightning_lora.kernels"


class KernelPlugin(Protocol):
    """What a plugin offers."""

    #: Names of the ways of evaluating that it offers besides the default, such as "int8".
    engines: tuple[str, ...]

    def install(self, base: Base) -> list[str]:
        """Replace modules of a model by faster equivalents, and describe in words what was done.

        Called once, after the fine-tuning method was applied; an empty list where nothing can be replaced.
        """

    def attention(self, chosen: str) -> str:
        """Return the name of the attention implementation to use in place of the chosen one, or that one."""

    def check_engine(self, engine: str, model: nn.Module, attention: str | None) -> int:
        """Return the number of layers that one of its engines can evaluate.

        Args:
            engine: The engine's name.
            model: The model to be evaluated.
            attention: The name of its attention; None where frozen weights are not kept in bfloat16.

        Raises:
            UserError: There are none, or this machine cannot.
        """

    def begin_evaluation(self, model: nn.Module, engine: str | None) -> None:
        """Prepare the model for evaluation; its weights do not change until ``end_evaluation``."""

    def end_evaluation(self, model: nn.Module) -> None:
        """Undo ``begin_evaluation``; called without it, do nothing."""


@cache
def kernel_plugins() -> tuple[KernelPlugin, ...]:
    """The installed plugins, in the order of their names."""
    return tuple(point.load() for point in sorted(entry_points(group=GROUP), key=lambda point: point.name))


def check_engine(engine: str, model: nn.Module, attention: str | None) -> int:
    """Return the number of layers that an engine of an installed plugin can evaluate, as ``KernelPlugin.check_engine``.

    Raises:
        UserError: No installed plugin has it, or it cannot.
    """
    for plugin in kernel_plugins():
        if engine in plugin.engines:
            return plugin.check_engine(engine, model, attention)
    known = sorted({name for plugin in kernel_plugins() for name in plugin.engines})
    raise UserError(f"engine '{engine}': no installed plugin offers it (available: {', '.join(known) or 'none'})")
