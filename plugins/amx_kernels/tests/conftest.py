"""The core's fixtures, with the plugin in use whether or not it is installed."""

import pytest

from lightning_lora.models import kernel_plugins, speedups
from lightning_lora_amx import plugin
from tests.conftest import make_base, own_folders, reviews, tiny_base  # noqa: F401


@pytest.fixture(autouse=True)
def with_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed, and nothing else."""
    for module in (kernel_plugins, speedups):
        monkeypatch.setattr(module, "kernel_plugins", lambda: (plugin,))
