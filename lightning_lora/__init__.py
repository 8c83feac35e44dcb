"""Fine-tune text classifiers with LoRA on PyTorch Lightning.

Data flows one way: config -> data -> model -> training -> evaluation -> runs -> reports.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lora.data.datamodule import TextDataModule
    from lightning_lora.inference.loaded_run import LoadedRun, load_run, predict
    from lightning_lora.training.length import training_length
    from lightning_lora.training.module import TextClassifier

__all__ = [
    "LoadedRun",
    "TextClassifier",
    "TextDataModule",
    "__version__",
    "load_run",
    "predict",
    "training_length",
]

__version__ = "0.1.0"

# Said at its import, before any command can hold it back: a kernel that nobody asked for is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_PUBLIC = {
    "TextDataModule": "data.datamodule",
    "TextClassifier": "training.module",
    "training_length": "training.length",
}
_PUBLIC |= dict.fromkeys(("LoadedRun", "load_run", "predict"), "inference.loaded_run")


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: ``main.py --help`` does not wait for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
